"""How much a VAE shrinks what it is given."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Compression:
    """Pixels per latent cell: ``time`` frames (the first cell holds one frame alone), ``space`` px a side."""

    time: int = 4
    space: int = 8


VIDEO = Compression()
"""HunyuanVideo's."""

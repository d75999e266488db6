"""How fast a conversion is and how much memory it takes: ``k1.py bench convert``."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from kandinsky5.circumstances import circumstances
from kandinsky5.conversion.convert import convert
from kandinsky5.conversion.plan import laid_out
from kandinsky5.errors import UserError
from kandinsky5.memory import meter
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.recipes import CHUNK_VALUES, TensorSpec, bytes_of
from kandinsky5.output.atomic import require_space

_SMALL = DiTConfig(
    model_dim=128, ff_dim=256, num_text_blocks=1, num_visual_blocks=1, axes_dims=(16, 24, 24)
)


def conversion(*, blocks: int = 2, folder: str | None = None) -> dict[str, Any]:
    """Convert a made-up bf16 checkpoint in Lite's shapes to int8, and measure.

    Args:
        blocks: visual blocks; 32 is the whole of Lite, 4 GB.
        folder: where there is room for one and a half such files; the system's temporary one if left out.

    Returns:
        JSON-ready: seconds, bytes before and after, ``extra_rss_bytes``: peak of resident memory above
        what the process had before (0 where the system does not tell).

    Raises:
        UserError: field ``blocks``, not 1 to 512.
    """
    if not 1 <= blocks <= 512:
        raise UserError("blocks", blocks, "1 to 512")
    with tempfile.TemporaryDirectory(dir=folder, prefix="k1-bench-") as name:
        source, out = Path(name) / "source.safetensors", Path(name) / "int8.safetensors"
        write_checkpoint(source, _SMALL)
        convert(source, out, "int8")  # what is loaded and kept for the first time is not its own
        write_checkpoint(source, dataclasses.replace(DiTConfig(), num_visual_blocks=blocks))
        meter.start_measuring()
        before_bytes = meter.peaks().rss_bytes  # just begun, the peak is what there is now
        started = time.monotonic()
        done = convert(source, out, "int8")
        seconds = time.monotonic() - started
        extra_rss_bytes = meter.peaks().rss_bytes - before_bytes
    return {
        "benchmark": "convert",
        "blocks": blocks,
        "source_bytes": done.source_bytes,
        "size_bytes": done.size_bytes,
        "seconds": round(seconds, 2),
        "source_bytes_per_s": round(done.source_bytes / seconds),
        "extra_rss_bytes": extra_rss_bytes,
        "threads": torch.get_num_threads(),
        **circumstances(),
    }


def write_checkpoint(path: Path, config: DiTConfig) -> None:
    """A bf16 checkpoint with random numbers, written a few million at a time."""
    with torch.device("meta"):
        state = DiffusionTransformer3D(config).state_dict()
    entries = [(name, TensorSpec(torch.bfloat16, tuple(t.shape))) for name, t in state.items()]
    header, _, size_bytes = laid_out(entries, {})
    require_space(path, size_bytes)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(CHUNK_VALUES, generator=generator).mul_(0.02).bfloat16()
    with path.open("wb") as file:
        file.write(header)
        for _, tensor in state.items():
            for first in range(0, tensor.numel(), CHUNK_VALUES):
                file.write(bytes_of(numbers[: min(CHUNK_VALUES, tensor.numel() - first)]))

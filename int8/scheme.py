"""How numbers become 8-bit integers: the one description that files, kernels and references share.

A row (a token of the input, an output channel of the weights) is cut into groups of K. Each group has a
float32 scale absmax/127 and integers round(value/scale), ties to even. The int32 products of a group are
exact; groups are added in float32. Before that, K may be rotated in blocks of 128 by a fixed orthogonal
matrix, the same for inputs and weights, so that the product stays what it was while outliers are spread
over their block (QuaRot, arXiv 2404.00456). docs/decisions/0003-int8-scheme.md says why these numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCHEME_VERSION = 1
"""Raised whenever files of an older program would be read wrongly."""

INT8_MAX = 127
ROTATION_BLOCK = 128
SIGN_BITS = 0x243F6A8885A308D313198A2E03707344
"""First 128 bits of π − 3: where bit i, from the left, is 1, channel i of a block changes its sign."""

MIN_ABSMAX = 1e-30
"""A group that stays below this is stored as zeros with scale 0: 127/absmax must not overflow."""

GROUPS = (128, 256, 512, 1024)
"""Group lengths the kernels take. 127²·1024 < 2^24: the sum of a group is exact even in float32."""


@dataclass(frozen=True)
class Int8Scheme:
    """Choices of one quantisation.

    Args:
        group: how many consecutive input channels share a scale; one of ``GROUPS``.
        rotate: whether K is rotated in blocks of 128; a tail shorter than a block stays as it is.

    Raises:
        ValueError: a group length the kernels do not have.
    """

    group: int = 1024
    rotate: bool = True

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"int8 group of {self.group} channels; allowed are {GROUPS}")

    def groups(self, in_features: int) -> int:
        """How many scales a row of ``in_features`` values has; the last group may be shorter."""
        return -(-in_features // self.group)

    def rotated(self, in_features: int) -> int:
        """How many of the first channels are rotated: whole blocks of 128, or none."""
        return in_features // ROTATION_BLOCK * ROTATION_BLOCK if self.rotate else 0

    def to_dict(self) -> dict[str, Any]:
        """For a file's header; ``from_dict`` reads it back."""
        return {"version": SCHEME_VERSION, "group": self.group, "rotate": self.rotate}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Int8Scheme:
        """The scheme of a file's header.

        Raises:
            ValueError: written by a newer program, or not a scheme.
        """
        version = values.get("version")
        if not isinstance(version, int) or not 1 <= version <= SCHEME_VERSION:
            raise ValueError(
                f"int8 scheme version {version!r}; this program reads 1 to {SCHEME_VERSION}:"
                " update it, or convert the original file again"
            )
        group, rotate = values.get("group"), values.get("rotate")
        if type(group) is not int or type(rotate) is not bool:
            raise ValueError(f"int8 scheme with group {group!r} and rotate {rotate!r} is damaged")
        return cls(group=group, rotate=rotate)


DEFAULT = Int8Scheme()
COMMUNITY = Int8Scheme(group=128, rotate=False)
"""Files of the community program: ``X.weight_int8`` with ``X.weight_scales`` float32 [out, in/128]."""

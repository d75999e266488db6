"""Tile sizes of the matmul kernel: which are tried, and which is taken where nothing was tried.

Two accumulators, int32 inside a group and float32 across groups, fill the registers: 128×128 over eight
warps is the largest tile without spills.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch


@dataclass(frozen=True)
class MatmulConfig:
    """One way to cut the matmul.

    Args:
        block_m, block_n: outputs of one program.
        block_k: channels of one step; a divisor of the scheme's group.
        super_m: tiles of M that run through before the next tile of N begins.
        warps, stages: warps of a program, and steps of K in flight.
    """

    block_m: int
    block_n: int
    block_k: int
    super_m: int
    warps: int
    stages: int

    @classmethod
    def from_list(cls, values: list[int]) -> MatmulConfig:
        """Inverse of ``to_list``. Raises ValueError for anything but six positive integers."""
        if len(values) != 6 or not all(type(value) is int and value > 0 for value in values):
            raise ValueError(f"not the six sizes of a config: {values}")
        return cls(*values)

    def to_list(self) -> list[int]:
        return list(astuple(self))


FEW_ROWS = MatmulConfig(32, 64, 128, 1, 4, 4)
SOME_ROWS = MatmulConfig(64, 128, 128, 4, 4, 3)
FEW_ROWS_MOST = 64
SOME_ROWS_MOST = 1024

SMALL_SHARED = (
    MatmulConfig(128, 128, 64, 8, 8, 4),
    MatmulConfig(128, 128, 128, 8, 8, 3),
    MatmulConfig(128, 64, 128, 8, 4, 3),
)
"""Many rows with 99 KB of shared memory (sm_86, 89, 120); the first is the untried choice."""

LARGE_SHARED = (
    MatmulConfig(128, 128, 128, 8, 8, 4),
    MatmulConfig(128, 128, 64, 8, 8, 4),
    MatmulConfig(64, 128, 128, 8, 4, 4),
)
"""Many rows with 160 KB or more (sm_80, 100)."""

HOPPER = (
    MatmulConfig(128, 128, 128, 8, 8, 4),
    MatmulConfig(128, 128, 128, 16, 8, 6),
    MatmulConfig(128, 128, 64, 8, 8, 6),
    MatmulConfig(64, 128, 128, 16, 4, 4),
)
"""sm_90: every step waits for its tensor-core work, so two smaller programs side by side are tried too."""

QUANTIZE_ROWS = 1
QUANTIZE_WARPS = 1
"""The quantisation kernel: one warp a row needs no barrier; a group of 1024 is 32 values a lane."""


def configs_for(capability: tuple[int, int], rows: int, group: int) -> tuple[MatmulConfig, ...]:
    """What to try for so many rows on so new a card, the choice without trying first; never empty.

    Args:
        capability: compute capability, (8, 0) or above.
        rows: M.
        group: of the scheme; steps of K must divide it.
    """
    if rows <= FEW_ROWS_MOST:
        return (FEW_ROWS,)
    if rows <= SOME_ROWS_MOST:
        return (SOME_ROWS,)
    table: tuple[MatmulConfig, ...]
    if capability[0] == 9:
        table = HOPPER
    else:
        table = LARGE_SHARED if capability in ((8, 0), (10, 0), (10, 3)) else SMALL_SHARED
    return tuple(config for config in table if group % config.block_k == 0)


def row_bucket(rows: int) -> int:
    """The power of two that stands for so many rows in the cache of choices."""
    return 1 << max(0, (rows - 1).bit_length())


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; for the interpreter, any will do."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)

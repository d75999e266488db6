"""Tiles chosen by the memory they need: arithmetic only.

The formulas follow the tensors alive at the widest layer; ``k1.py bench decode-work`` holds them against
bytes counted with the published VAE's shapes (within 10 %).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from vae_tiling.tiles import (
    OVERLAP_PX,
    VIDEO,
    Compression,
    TilePlan,
    plan_tiles,
    spans_of,
)

__all__ = [
    "Compression",
    "DecoderDims",
    "TilePlan",
    "decode_peak_bytes",
    "encode_peak_bytes",
    "plan_for_budget",
    "plan_tiles",
    "smaller_plan",
]

AT_ONCE = 2**24
"""Numbers that a norm takes together; some copies of these live beside everything else."""


@dataclass(frozen=True)
class DecoderDims:
    """What the decoder's memory depends on; fields as in the VAE's ``config.json``."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16


def plan_for_budget(
    frames: int,
    height: int,
    width: int,
    dims: DecoderDims,
    budget_bytes: int,
    *,
    dtype_bytes: int = 2,
    overlap: int = OVERLAP_PX,
    compression: Compression = VIDEO,
) -> TilePlan:
    """The fewest tiles that keep :func:`decode_peak_bytes` within a budget.

    Raises:
        ValueError: not even the smallest tiles fit; the message says what they need.
    """
    plan = plan_tiles(frames, height, width, compression=compression)
    while True:
        needed = decode_peak_bytes(plan, dims, dtype_bytes)
        if needed <= budget_bytes:
            return plan
        smaller = smaller_plan(plan, overlap=overlap)
        if smaller is None:
            raise ValueError(
                f"decoding {width}×{height}, {frames} frames takes {needed / 1e9:.2f} GB in the smallest "
                f"tiles; the budget is {budget_bytes / 1e9:.2f} GB"
            )
        plan = smaller


def smaller_plan(plan: TilePlan, *, overlap: int = OVERLAP_PX) -> TilePlan | None:
    """The next plan with less memory: one more tile along the longer side of a tile; None at the end."""
    space = plan.compression.space
    cells = overlap // space
    tile_height, tile_width = plan.largest_tile
    _, height, width = plan.latent_shape
    sides = [(tile_height, height, plan.rows, "rows"), (tile_width, width, plan.columns, "columns")]
    for _, length, spans, name in sorted(sides, key=lambda side: side[0], reverse=True):
        parts = len(spans) + 1
        size = math.ceil((length + (parts - 1) * cells) / parts)
        if size >= 2 * cells and size < spans[0].length:
            more = spans_of(length, size, cells)
            return replace(plan, rows=more) if name == "rows" else replace(plan, columns=more)
    return None


def decode_peak_bytes(plan: TilePlan, dims: DecoderDims, dtype_bytes: int = 2) -> int:
    """Most bytes alive on the device while a plan is decoded, without the VAE's weights.

    Three stages: the narrowest layers go over all frames at once (grows with the duration, but slowly); the
    statistics are taken on samples; the rest goes frame by frame with the convolutions' last frames carried
    along (neither grows). The largest counts. Features and finished frames are taken to be parked.
    """
    stages = (_narrow_numbers, _calibrating_numbers, _rolling_numbers)
    return dtype_bytes * max(numbers(plan, dims) for numbers in stages)


def encode_peak_bytes(plan: TilePlan, dims: DecoderDims, dtype_bytes: int = 2) -> int:
    """The same for encoding a plan's tiles, each with all of its frames: its widest layer counts."""
    frame_px = plan.compression.space**2 * math.prod(plan.largest_tile)
    return dtype_bytes * frame_px * dims.block_out_channels[0] * (6 * plan.frames + 2)


def _narrow_numbers(plan: TilePlan, dims: DecoderDims) -> int:
    """Activations, keys and values of every frame, or twice the activations and a layer's output."""
    frames, height, width = plan.latent_shape
    return (3 * frames + 4) * height * width * dims.block_out_channels[-1]


def _rolling_numbers(plan: TilePlan, dims: DecoderDims) -> int:
    """Frames carried at every convolution, and the widest layer's work on one frame."""
    cells = math.prod(plan.largest_tile)
    looked_back = min(2, plan.latent_shape[0])
    carried = looked_back * cells * dims.block_out_channels[-1]
    working = 0
    for level, (into, width) in enumerate(_levels(dims), start=1):
        area = cells * _growth(level)
        carried += area * looked_back * (into + (2 * dims.layers_per_block + 1) * width)
        carried += area * width if level + 1 < len(dims.block_out_channels) else 0
        working = max(working, _resnet_numbers(area, into, width) + area // 4 * into)
    carried += looked_back * area * width  # of the last convolution
    if looked_back == 1:
        carried -= area * into  # the frame carried is the frame at work
    return carried + working + _kernel_numbers(dims)


def _calibrating_numbers(plan: TilePlan, dims: DecoderDims) -> int:
    """Samples behind the widest layer, those before it that are still to go, and the work on one."""
    _, height, width = plan.latent_shape
    pieces = [sample.height * sample.width for sample in plan.moving_samples()]
    whole = height * width
    stored, most = whole * len(plan.still_samples()), 0
    for level, (into, width) in enumerate(_levels(dims), start=1):
        growth = _growth(level)
        before, after = (1 + 2 ** max(0, level - 1 - by) for by in (1, 0))
        waiting = growth // 4 * into * (1 + before) * sum(pieces)
        grown = growth * width * (stored + (1 + after) * sum(pieces))
        entering = growth * width * stored + waiting + _resnet_numbers(growth * whole, into, width)
        most = max(most, entering, grown + _resnet_numbers(growth * whole, width, width))
        if pieces:
            piece = growth * max(pieces)
            carried = 2 * piece * (into + width)
            most = max(most, grown + carried + _resnet_numbers(piece, into, width))
    return most + _kernel_numbers(dims)


def _levels(dims: DecoderDims) -> list[tuple[int, int]]:
    """(channels in, channels out) of the levels behind the narrow stage."""
    widths = dims.block_out_channels[::-1]
    return list(pairwise(widths))


def _growth(level: int) -> int:
    """Pixels of a level's frames for each latent cell."""
    return 4 ** min(level, 3)


def _resnet_numbers(area: int, into: int, width: int) -> int:
    """A frame, normed, convolved; and the copies of a part of it while it is normed."""
    return area * (2 * into + width) + 2 * min(AT_ONCE, area * into)


def _kernel_numbers(dims: DecoderDims) -> int:
    """Kernels of growing layers, their taps added up: 3×4 or 2×4 of 2×2 or twice that."""
    first, *others = dims.block_out_channels[:0:-1]
    return 48 * first**2 + sum(64 * width**2 for width in others)

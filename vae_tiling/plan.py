"""Tiles chosen by the memory they need: arithmetic only.

The formulas follow the tensors alive at the widest layer; ``k1.py bench decode-work`` holds them against
bytes counted with the published VAE's shapes (within 10 %).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from vae_tiling.samples import FRAMES_BEFORE, FRAMES_KEPT, sample_sizes
from vae_tiling.tiles import (
    OVERLAP_PX,
    VIDEO,
    Compression,
    TilePlan,
    overlap_within,
    plan_tiles,
    spans_of,
)

__all__ = [
    "Compression",
    "DecoderDims",
    "TilePlan",
    "at_once_plan",
    "decode_peak_bytes",
    "encode_peak_bytes",
    "parked_bytes",
    "plan_for_budget",
    "plan_tiles",
    "smaller_plan",
]

NORMED_TOGETHER = 2**24
"""Numbers that a norm takes together; some copies of these live beside everything else."""


AT_ONCE_BYTES = 2_000_000_000
"""A video of which all frames together need no more is not cut into frames."""


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


def at_once_plan(plan: TilePlan, dims: DecoderDims, dtype_bytes: int = 2) -> TilePlan | None:
    """The plan with all frames decoded together, which is exact; None unless that is small.

    One tile, and at most :data:`AT_ONCE_BYTES`: beyond, memory would grow with the duration, and a layer's
    numbers pass 2³¹, which convolutions of three dimensions are not made for.
    """
    whole = replace(plan, at_once=True)
    small = plan.tiles == 1 and decode_peak_bytes(whole, dims, dtype_bytes) <= AT_ONCE_BYTES
    return whole if small else None


def smaller_plan(plan: TilePlan, *, overlap: int = OVERLAP_PX) -> TilePlan | None:
    """The next plan with less memory; None at the end.

    From all frames at once to one after another in the same tiles; from the published tiling to tiles of its
    size; then one more tile along the longer side of a tile.
    """
    if plan.at_once:
        return replace(plan, at_once=False)
    if plan.published is not None:
        height, width = plan.published.height_px, plan.published.width_px
        return plan_tiles(
            plan.frames,
            plan.height_px,
            plan.width_px,
            tile_height=height,
            tile_width=width,
            overlap=overlap_within(min(height, width), overlap),
            compression=plan.compression,
        )
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
    if plan.at_once or plan.published is not None:
        return dtype_bytes * _together_numbers(plan, dims)
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


def _together_numbers(plan: TilePlan, dims: DecoderDims) -> int:
    """The last growth, grown in three copies, padded and convolved; and colours that wait to be blended."""
    frames, waiting = plan.frames, 0
    if plan.published is not None:
        frames = min(frames, plan.published.frames)
        waiting = 4 * 3 * frames * plan.height_px * plan.width_px
    area = plan.compression.space**2 * math.prod(plan.largest_tile)
    return area * dims.block_out_channels[0] * (9 * frames + 3) + waiting


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


@dataclass(frozen=True)
class _SampleCells:
    """What is sampled of a video, in latent cells.

    Attributes:
        standing: of all that are looked at as stills.
        moving: of one frame each of those that move.
        frames: of a moving one, those before it included.
        still, quarter: (height, width) of the largest still and of the largest that moves.
    """

    standing: int
    moving: int
    frames: int
    still: tuple[int, int]
    quarter: tuple[int, int]


def _sample_cells(plan: TilePlan) -> _SampleCells:
    frames, height, width = plan.latent_shape
    sizes = sample_sizes(plan)
    if sizes.run:
        return _SampleCells(0, height * width, frames, (0, 0), (height, width))
    halves = [sum(piece.area for piece in half) for half in sizes.halves]
    moving = sum(halves[index % len(halves)] for index in range(sizes.moving))
    standing = sizes.stills * height * width + moving  # what moves is looked at as a still too
    quarter = (-(-height // 2), -(-width // 2))
    return _SampleCells(
        standing, moving, 1 + min(FRAMES_BEFORE, frames - 1), (height, width), quarter
    )


def _held(cells: _SampleCells, levels: int, *, run: bool) -> list[tuple[int, int]]:
    """(frames entering, frames behind) each level, of a moving sample."""
    held, held_at = cells.frames, []
    for level in range(1, levels + 1):
        kept = held if run or level == 1 else max(FRAMES_KEPT, 1 + 2 ** (level - 2))
        entering = min(held, kept)
        held = 1 + (entering - 1) * (2 if level > 1 else 1)
        held_at.append((entering, held))
    return held_at


def _calibrating_numbers(plan: TilePlan, dims: DecoderDims) -> int:
    """Samples behind a layer, those before it that are still to go, and the work on one.

    With several tiles they wait in main memory: beside what they are taken from, the work on a part is all.
    """
    sizes, cells, levels = sample_sizes(plan), _sample_cells(plan), _levels(dims)
    if sizes.window is not None:
        taken = cells.frames * cells.moving + (0 if sizes.run else cells.standing - cells.moving)
        working = _part_numbers(cells, sizes.window, dims) + _kernel_numbers(dims)
        return taken * dims.block_out_channels[-1] + working
    whole, quarter = math.prod(cells.still), math.prod(cells.quarter) if cells.moving else 0
    held_at = _held(cells, len(levels), run=sizes.run)
    most = 0
    for level, ((into, width), (entering, held)) in enumerate(
        zip(levels, held_at, strict=True), start=1
    ):
        growth = _growth(level)
        moved, stood = growth * width * held * cells.moving, growth * width * cells.standing
        for here, channels in (
            (growth // 4 * into * entering * cells.moving, into),
            (moved, width),
        ):
            worked = _resnet_numbers(growth * quarter, channels, width)
            worked += 2 * growth * quarter * (channels + width)  # carried from frame to frame
            of_still = stood + _resnet_numbers(growth * whole, channels, width) + here
            most = max(most, stood + moved + worked if quarter else 0, of_still if whole else 0)
    return most + _kernel_numbers(dims)


def _part_numbers(cells: _SampleCells, window: tuple[int, int], dims: DecoderDims) -> int:
    """The work on the largest part of a sample, with two pixels more on each side it is cut at."""
    most = 0
    for sample, looks_back in ((cells.still, 0), (cells.quarter if cells.moving else (0, 0), 2)):
        counts = [-(-side // most_side) for side, most_side in zip(sample, window, strict=True)]
        for level, (into, width) in enumerate(_levels(dims), start=1):
            for channels, scale in ((into, 2 ** (level - 1)), (width, 2**level)):
                area = math.prod(
                    scale * -(-side // count) + 4 * min(2, count - 1) // 2 if count else 0
                    for side, count in zip(sample, counts, strict=True)
                )
                grown = area * 4**level // scale**2
                work = _resnet_numbers(grown, channels, width) + (
                    area * into if grown > area else 0
                )
                most = max(most, work + looks_back * grown * (channels + width))
    return most


def parked_bytes(plan: TilePlan, dims: DecoderDims, dtype_bytes: int = 2) -> int:
    """Most bytes of samples that wait in main memory while statistics for several tiles are taken.

    One of them is there twice at a time, before and behind a layer.
    """
    sizes, cells, levels = sample_sizes(plan), _sample_cells(plan), _levels(dims)
    if sizes.window is None or plan.at_once or plan.published is not None:
        return 0
    held_at = _held(cells, len(levels), run=sizes.run)
    twice = max(math.prod(cells.still), held_at[-1][1] * math.prod(cells.quarter))
    return dtype_bytes * max(
        _growth(level) * width * (cells.standing + held * cells.moving + twice)
        for level, ((_, width), (_, held)) in enumerate(zip(levels, held_at, strict=True), start=1)
    )


def _levels(dims: DecoderDims) -> list[tuple[int, int]]:
    """(channels in, channels out) of the levels behind the narrow stage."""
    widths = dims.block_out_channels[::-1]
    return list(pairwise(widths))


def _growth(level: int) -> int:
    """Pixels of a level's frames for each latent cell."""
    return 4 ** min(level, 3)


def _resnet_numbers(area: int, into: int, width: int) -> int:
    """A frame, normed, convolved; and the copies of a part of it while it is normed."""
    return area * (2 * into + width) + 2 * min(NORMED_TOGETHER, area * into)


def _kernel_numbers(dims: DecoderDims) -> int:
    """Kernels of growing layers, their taps added up: 3×4 or 2×4 of 2×2 or twice that."""
    first, *others = dims.block_out_channels[:0:-1]
    return 48 * first**2 + sum(64 * width**2 for width in others)

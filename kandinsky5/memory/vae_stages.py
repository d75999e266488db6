"""Ways to run the VAE: encoding the input picture, decoding the result. Arithmetic only, no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from itertools import pairwise

from kandinsky5.memory.budget import Budget
from kandinsky5.memory.demand import PlanRequest
from kandinsky5.memory.stage import Option, StagePlan, stage
from kandinsky5.presets import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from vae_tiling.plan import (
    Compression,
    DecoderDims,
    TilePlan,
    at_once_plan,
    decode_peak_bytes,
    encode_peak_bytes,
    parked_bytes,
    plan_tiles,
    smaller_plan,
)
from vae_tiling.published_tiles import PublishedTiles, published_tiles
from vae_tiling.tiles import OVERLAP_PX, overlap_within, published_plan

SECONDS_PER_MEGAPIXEL = 0.1
"""Decoding a million pixels of one frame: an assumption, to tell fewer tiles from more."""
FRAME_BYTES_PER_PIXEL = 3
"""Frames wait in main memory as 8-bit colours."""
MAX_IMAGE_TILE_PX = 1024 * 1024
"""Larger pictures are decoded in tiles of at most so many pixels: those the image VAE is used at."""
COMPRESSION = Compression(TEMPORAL_COMPRESSION, SPATIAL_COMPRESSION)
OWN_STATISTICS_OVERLAP_PX = 128
"""Where each tile is normed by itself (all but the video decoder's) neighbours differ more and share more."""


def decode_options(job: PlanRequest, budget: Budget) -> Iterator[Option[TilePlan]]:
    """From all frames at once, where that is little, over one tile to the smallest ones."""
    for tiles in _decode_ladder(job):
        yield decode_option(job, budget, tiles)


def decode_option(job: PlanRequest, budget: Budget, tiles: TilePlan) -> Option[TilePlan]:
    """Decoding in these tiles."""
    vae, samples_bytes = job.models.vae, 0
    if vae.is_video:
        samples_bytes = parked_bytes(tiles, dims_of(job), job.number_bytes)
    stages = (_stage(job, budget, tiles, "decode", decode_bytes, samples_bytes=samples_bytes),)
    return Option(tiles, stages, rank=0 if tiles.at_once else 1)


def encode_options(job: PlanRequest, budget: Budget) -> Iterator[Option[TilePlan]]:
    """Encoding the input picture, a video of one frame."""
    for tiles in _ladder(job, 1, OWN_STATISTICS_OVERLAP_PX):
        yield encode_option(job, budget, tiles)


def encode_option(job: PlanRequest, budget: Budget, tiles: TilePlan) -> Option[TilePlan]:
    """Encoding in these tiles."""
    return Option(tiles, (_stage(job, budget, tiles, "encode image", _encode_bytes),))


def decode_overlap_px(job: PlanRequest) -> int:
    """What neighbouring tiles of the result share."""
    return OVERLAP_PX if job.models.vae.is_video else OWN_STATISTICS_OVERLAP_PX


def dims_of(job: PlanRequest) -> DecoderDims:
    vae = job.models.vae
    return DecoderDims(vae.widths, vae.layers, vae.latent_channels)


def _decode_ladder(job: PlanRequest) -> Iterator[TilePlan]:
    tiling, tile_px = job.choices.vae_tiling, job.choices.vae_tile
    if tiling == "published":
        sizes = published_tiles(tile_px) if tile_px else PublishedTiles()
        yield published_plan(job.frames, job.height_px, job.width_px, sizes)
        return
    for tiles in _ladder(job, job.frames, decode_overlap_px(job)):
        if not job.models.vae.is_video or tiling == "rolling":
            yield tiles
        elif tiling == "whole":
            yield dataclasses.replace(tiles, at_once=True)
            return
        else:
            if whole := at_once_plan(tiles, dims_of(job), job.number_bytes):
                yield whole
            yield tiles


def _ladder(job: PlanRequest, frames: int, overlap_px: int) -> Iterator[TilePlan]:
    largest = job.choices.vae_tile
    sides = {"height": job.height_px, "width": job.width_px}
    tiles: TilePlan | None = plan_tiles(
        frames,
        **sides,
        tile_height=_tile_px(job.height_px, largest),
        tile_width=_tile_px(job.width_px, largest),
        overlap=overlap_px if largest is None else overlap_within(largest, overlap_px),
        compression=COMPRESSION,
    )
    whole_px = math.inf if job.models.vae.is_video or largest is not None else MAX_IMAGE_TILE_PX
    while tiles is not None:
        if math.prod(tiles.largest_tile) * COMPRESSION.space**2 <= whole_px:
            yield tiles
        tiles = smaller_plan(tiles, overlap=overlap_px) if largest is None else None


def _tile_px(side_px: int, largest_px: int | None) -> int | None:
    if largest_px is None or largest_px >= side_px:
        return None
    return largest_px // SPATIAL_COMPRESSION * SPATIAL_COMPRESSION


def _stage(
    job: PlanRequest,
    budget: Budget,
    tiles: TilePlan,
    name: str,
    peak_bytes: Callable[[PlanRequest, TilePlan], int],
    *,
    samples_bytes: int = 0,
) -> StagePlan:
    vae = job.models.vae
    weights = vae.total_bytes(job.number_bytes)
    pixels = tiles.frames * job.width_px * job.height_px
    computed = tiles.frames * COMPRESSION.space**2
    computed *= sum(row.length for row in tiles.rows) * sum(c.length for c in tiles.columns)
    loading = weights / budget.speeds.disk_bytes_per_s
    return stage(
        name,
        device={"VAE": weights, "latent": _latent_bytes(job, tiles)},
        activations=peak_bytes(job, tiles),
        host={
            "staging": weights,
            "frames": FRAME_BYTES_PER_PIXEL * pixels,
            "narrow features": math.prod(tiles.latent_shape) * vae.widths[-1] * job.number_bytes,
            "samples": samples_bytes,
        },
        seconds=loading + computed / 1e6 * SECONDS_PER_MEGAPIXEL,
        does=_in_words(tiles),
        on_cpu=budget.on_cpu,
    )


def _latent_bytes(job: PlanRequest, tiles: TilePlan) -> int:
    """Of the whole result or picture, in float32 and in what is computed in."""
    cells = math.prod(tiles.latent_shape) * job.models.vae.latent_channels
    return cells * (4 + job.number_bytes)


def decode_bytes(job: PlanRequest, tiles: TilePlan) -> int:
    """Most bytes of activations alive while a tile is decoded."""
    vae = job.models.vae
    if vae.is_video:
        return decode_peak_bytes(tiles, dims_of(job), job.number_bytes)
    numbers = 0
    for level, (into, width) in enumerate(pairwise((vae.widths[-1], *reversed(vae.widths)))):
        # A level's input is kept through it. Its first block norms and activates as many channels; a later
        # one has its own input, its first half, and that normed and activated.
        numbers = max(numbers, 4**level * max(3 * into, into + 4 * width))
    return numbers * math.prod(tiles.largest_tile) * job.number_bytes


def _encode_bytes(job: PlanRequest, tiles: TilePlan) -> int:
    """Most bytes of activations alive while a tile is encoded: in the first level, on all pixels."""
    if job.models.vae.is_video:
        return encode_peak_bytes(tiles, dims_of(job), job.number_bytes)
    pixels = math.prod(tiles.largest_tile) * COMPRESSION.space**2
    return 5 * job.models.vae.widths[0] * pixels * job.number_bytes  # as later blocks when decoding


def _in_words(tiles: TilePlan) -> str:
    if tiles.tiles == 1 and tiles.published is None:
        return "all frames at once" if tiles.at_once else "in one piece"
    height, width = (COMPRESSION.space * cells for cells in tiles.largest_tile)
    published = "the published " if tiles.published is not None else ""
    return f"in {published} {len(tiles.rows)}×{len(tiles.columns)} tiles of at most {width}×{height} px"

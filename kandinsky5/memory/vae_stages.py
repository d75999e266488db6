"""Ways to run the VAE: encoding the input picture, decoding the result. Arithmetic only, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kandinsky5.memory.budget import Budget
from kandinsky5.memory.demand import PlanRequest
from kandinsky5.memory.stage import Option, StagePlan, stage
from kandinsky5.presets import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from vae_tiling.plan import (
    Compression,
    DecoderDims,
    TilePlan,
    decode_peak_bytes,
    plan_tiles,
    smaller_plan,
)

SECONDS_PER_MEGAPIXEL = 0.1
"""Decoding a million pixels of one frame: an assumption, to tell fewer tiles from more."""
FRAME_BYTES_PER_PIXEL = 3
"""Frames wait in main memory as 8-bit colours."""
MAX_IMAGE_TILE_PX = 1024 * 1024
"""Larger pictures are decoded in tiles of at most so many pixels: those the image VAE is used at."""
IMAGE_COPIES = 4
"""Feature maps alive at once in the image VAE's widest layer: input, norm, its activation, and one to spare
for what the library takes to convolve."""
COMPRESSION = Compression(TEMPORAL_COMPRESSION, SPATIAL_COMPRESSION)
OVERLAP_PX = 128


def decode_options(job: PlanRequest, budget: Budget) -> Iterator[Option[TilePlan]]:
    """From one tile to the smallest ones."""
    for tiles in _ladder(job, job.frames):
        yield decode_option(job, budget, tiles)


def decode_option(job: PlanRequest, budget: Budget, tiles: TilePlan) -> Option[TilePlan]:
    """Decoding in these tiles."""
    return Option(tiles, (_stage(job, budget, tiles, "decode"),))


def encode_options(job: PlanRequest, budget: Budget) -> Iterator[Option[TilePlan]]:
    """Encoding the input picture; it is reckoned to take no more than decoding one frame."""
    for tiles in _ladder(job, 1):
        yield Option(tiles, (_stage(job, budget, tiles, "encode image"),))


def dims_of(job: PlanRequest) -> DecoderDims:
    vae = job.models.vae
    return DecoderDims(vae.widths, vae.layers, vae.latent_channels)


def _ladder(job: PlanRequest, frames: int) -> Iterator[TilePlan]:
    largest = job.choices.tile_px
    sides = {"height": job.height_px, "width": job.width_px}
    tiles: TilePlan | None = plan_tiles(
        frames,
        **sides,
        tile_height=_tile_px(job.height_px, largest),
        tile_width=_tile_px(job.width_px, largest),
        overlap=OVERLAP_PX if largest is None else min(OVERLAP_PX, largest // 32 * 8),
        compression=COMPRESSION,
    )
    whole_px = math.inf if job.models.vae.is_video or largest is not None else MAX_IMAGE_TILE_PX
    while tiles is not None:
        if math.prod(tiles.largest_tile) * COMPRESSION.space**2 <= whole_px:
            yield tiles
        tiles = smaller_plan(tiles, overlap=OVERLAP_PX) if largest is None else None


def _tile_px(side_px: int, largest_px: int | None) -> int | None:
    if largest_px is None or largest_px >= side_px:
        return None
    return largest_px // SPATIAL_COMPRESSION * SPATIAL_COMPRESSION


def _stage(job: PlanRequest, budget: Budget, tiles: TilePlan, name: str) -> StagePlan:
    vae = job.models.vae
    weights = vae.total_bytes(job.number_bytes)
    pixels = tiles.frames * job.width_px * job.height_px
    computed = tiles.frames * COMPRESSION.space**2
    computed *= sum(row.length for row in tiles.rows) * sum(c.length for c in tiles.columns)
    loading = weights / budget.speeds.disk_bytes_per_s
    return stage(
        name,
        device={"VAE": weights},
        activations=_peak_bytes(job, tiles),
        host={
            "staging": weights,
            "frames": FRAME_BYTES_PER_PIXEL * pixels,
            "narrow features": math.prod(tiles.latent_shape) * vae.widths[-1] * job.number_bytes,
        },
        seconds=loading + computed / 1e6 * SECONDS_PER_MEGAPIXEL,
        does=_in_words(tiles),
        on_cpu=budget.on_cpu,
    )


def _peak_bytes(job: PlanRequest, tiles: TilePlan) -> int:
    """Most bytes of activations alive while a tile is computed."""
    vae = job.models.vae
    if vae.is_video:
        return decode_peak_bytes(tiles, dims_of(job), job.number_bytes)
    cells = math.prod(tiles.largest_tile)
    inputs = zip((vae.widths[-1], *reversed(vae.widths)), range(len(vae.widths)), strict=False)
    widest = max(width * 4**level for width, level in inputs)  # of each level of the decoder
    return IMAGE_COPIES * widest * cells * job.number_bytes


def _in_words(tiles: TilePlan) -> str:
    if tiles.tiles == 1:
        return "in one piece"
    height, width = (COMPRESSION.space * cells for cells in tiles.largest_tile)
    return f"in {len(tiles.rows)}×{len(tiles.columns)} tiles of at most {width}×{height} px"

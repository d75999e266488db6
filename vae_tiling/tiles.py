"""Where tiles lie: arithmetic only.

A video of [frames, height, width] pixels has a latent of [(frames + 3) / 4, height / 8, width / 8]. Sizes
are given in pixels, as people give them; spans are kept in latent cells, the unit in which tiles are cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from vae_tiling.compression import VIDEO, Compression
from vae_tiling.published_tiles import PublishedTiles

OVERLAP_PX = 64
"""What neighbours share. With held statistics a pixel depends on no cell further than 52 px away, and hardly
on those beyond 16."""


@dataclass(frozen=True)
class Span:
    """Cells [start, stop) of one axis; the first ``lead`` of them are shared with the span before."""

    start: int
    stop: int
    lead: int = 0

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class TilePlan:
    """Spatial tiles, each decoded over the whole duration, frame by frame unless said otherwise.

    Attributes:
        frames, height_px, width_px: of the video, exactly what comes out.
        rows, columns: spans of the tiles in latent cells; neighbours share cells.
        compression: pixels per cell.
        at_once: all frames of a tile are decoded together, untiled in time: exact with one tile.
        published: the sizes of the published tiling, if it is to be followed; rows and columns are its.
    """

    frames: int
    height_px: int
    width_px: int
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    compression: Compression = VIDEO
    at_once: bool = False
    published: PublishedTiles | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Cells [t, h, w] of the whole video."""
        time, space = self.compression.time, self.compression.space
        return (self.frames - 1) // time + 1, self.height_px // space, self.width_px // space

    @property
    def tiles(self) -> int:
        return len(self.rows) * len(self.columns)

    @property
    def time_steps(self) -> int:
        """How many times a tile's place is decoded, one after another in time."""
        frames = self.latent_shape[0]
        if self.published is not None:
            cells = self.published.in_cells
            length, stride = cells.tile[0], cells.stride[0]
            return 1 if frames <= length else math.ceil(frames / stride)
        return 1 if self.at_once else frames

    @cached_property
    def largest_tile(self) -> tuple[int, int]:
        """Cells (height, width)."""
        return max(s.length for s in self.rows), max(s.length for s in self.columns)


def plan_tiles(
    frames: int,
    height: int,
    width: int,
    *,
    tile_height: int | None = None,
    tile_width: int | None = None,
    overlap: int = OVERLAP_PX,
    compression: Compression = VIDEO,
) -> TilePlan:
    """Tiles of exactly the sizes asked for.

    Args:
        frames, height, width: of the video in pixels.
        tile_height, tile_width: of a tile in pixels; None is the whole side. The last tile of a side is
            moved back so as to end at the edge, so it may share more than ``overlap``.
        overlap: pixels that neighbours share, over which they are blended.

    Raises:
        ValueError: a size that cannot be met exactly, with what is allowed.
    """
    time, space = compression.time, compression.space
    if frames < 1 or (frames - 1) % time:
        raise ValueError(f"frames must be {time}·n + 1, not {frames}")
    sides = {"height": (height, tile_height), "width": (width, tile_width)}
    spans = []
    for name, (side, tile) in sides.items():
        if side < space or side % space:
            raise ValueError(f"{name} must be a multiple of {space} px, not {side}")
        tile = side if tile is None else tile
        if tile < space or tile % space:
            raise ValueError(f"tile_{name} must be a multiple of {space} px, not {tile}")
        if tile < side and (overlap % space or not 0 <= overlap <= tile // 2):
            raise ValueError(
                f"overlap must be a multiple of {space} px and at most half a tile "
                f"({tile // 2} px), not {overlap}"
            )
        spans.append(spans_of(side // space, tile // space, overlap // space))
    return TilePlan(frames, height, width, spans[0], spans[1], compression)


def overlap_within(tile_px: int, wanted_px: int = OVERLAP_PX) -> int:
    """What neighbouring tiles of a side share: what is wanted, or half of a small tile, in whole cells."""
    return min(wanted_px, tile_px // 2 // VIDEO.space * VIDEO.space)


def published_plan(frames: int, height: int, width: int, tiles: PublishedTiles) -> TilePlan:
    """The published tiling of a video.

    Raises:
        ValueError: a size that no video has.
    """
    whole = plan_tiles(frames, height, width, compression=tiles.compression)
    lengths, sizes, strides = (
        whole.latent_shape[1:],
        tiles.in_cells.tile[1:],
        tiles.in_cells.stride[1:],
    )
    if lengths[0] <= sizes[0] and lengths[1] <= sizes[1]:
        return replace(whole, published=tiles)
    rows, columns = (
        tuple(
            Span(start, min(start + size, length), size - stride if start else 0)
            for start in range(0, length, stride)
        )
        for length, size, stride in zip(lengths, sizes, strides, strict=True)
    )
    return replace(whole, rows=rows, columns=columns, published=tiles)


def spans_of(length: int, size: int, overlap: int) -> tuple[Span, ...]:
    """Spans of ``size`` cells that cover ``length``, sharing at least ``overlap``; one if it fits."""
    if size >= length:
        return (Span(0, length),)
    starts = [*range(0, length - size, size - overlap), length - size]
    return tuple(
        Span(start, start + size, before + size - start if index else 0)
        for index, (before, start) in enumerate(zip([0, *starts], starts, strict=False))
    )


def blend_ramp(length: int) -> list[float]:
    """Weight of the later of two neighbours at each of the pixels they share.

    It rises over the middle half alone: close to its edge a tile knows least of what lies beyond.
    """
    quarter = length // 4
    steps = length - 2 * quarter
    return [
        min(1.0, max(0.0, (pixel - quarter + 0.5) / steps)) if steps else 0.5
        for pixel in range(length)
    ]

"""Where tiles lie: arithmetic only.

A video of [frames, height, width] pixels has a latent of [(frames + 3) / 4, height / 8, width / 8]. Sizes
are given in pixels, as people give them; spans are kept in latent cells, the unit in which tiles are cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

FEWEST_STILLS, MOST_STILLS = 2, 8
"""So many latent frames tell the statistics of a whole video."""

OVERLAP_PX = 64
"""What neighbours share. With held statistics a pixel depends on no cell further than 52 px away, and hardly
on those beyond 16."""


@dataclass(frozen=True)
class Compression:
    """Pixels per latent cell: ``time`` frames (the first cell holds one frame alone), ``space`` px a side."""

    time: int = 4
    space: int = 8


VIDEO = Compression()
"""HunyuanVideo's."""


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
class Sample:
    """A piece of one latent frame, in cells."""

    frame: int
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class TilePlan:
    """Spatial tiles, each decoded over the whole duration, frame by frame.

    Attributes:
        frames, height_px, width_px: of the video, exactly what comes out.
        rows, columns: spans of the tiles in latent cells; neighbours share cells.
        compression: pixels per cell.
    """

    frames: int
    height_px: int
    width_px: int
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    compression: Compression = VIDEO

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Cells [t, h, w] of the whole video."""
        time, space = self.compression.time, self.compression.space
        return (self.frames - 1) // time + 1, self.height_px // space, self.width_px // space

    @property
    def tiles(self) -> int:
        return len(self.rows) * len(self.columns)

    @cached_property
    def largest_tile(self) -> tuple[int, int]:
        """Cells (height, width)."""
        return max(s.length for s in self.rows), max(s.length for s in self.columns)

    def still_samples(self) -> tuple[int, ...]:
        """Latent frames on which the whole video's statistics are taken, spread evenly over its time.

        Never the first (which is decoded to one frame, not four) unless there is no other. Fewer where tiles
        are small: they are taken of whole frames, and must not need more memory than the tiles.
        """
        frames, height, width = self.latent_shape
        share = math.prod(self.largest_tile) / (height * width)
        first = min(1, frames - 1)
        most = max(FEWEST_STILLS, min(MOST_STILLS, int(33 * share) - 12))
        count = min(most, frames - first)
        return tuple(first + int((i + 0.5) * (frames - first) / count) for i in range(count))

    def moving_samples(self) -> tuple[Sample, ...]:
        """Pieces of latent frames that are looked at together with the frame before; none of a single frame.

        One tile: two whole frames. Several: one frame, in pieces of half a tile that cover it once.
        """
        frames, height, width = self.latent_shape
        if frames == 1:
            return ()
        if self.tiles == 1:
            later = sorted({1 + (frames - 1) // 4, 1 + 3 * (frames - 1) // 4})
            return tuple(Sample(frame, 0, 0, height, width) for frame in later)
        size = list(self.largest_tile)
        longer = size.index(max(size))
        size[longer] = math.ceil(size[longer] / 2)
        return tuple(
            Sample(max(1, frames // 2), top, left, bottom - top, right - left)
            for top, bottom in _parts(height, size[0])
            for left, right in _parts(width, size[1])
        )


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


def _parts(length: int, size: int) -> list[tuple[int, int]]:
    """The fewest pieces (start, stop), about equal and at most ``size``, that cover ``length`` once."""
    count = math.ceil(length / size)
    ends = [i * length // count for i in range(count + 1)]
    return list(pairwise(ends))

"""The published way to tile: overlapping tiles in time and space, each decoded afresh, blended in order.

Kept for comparison and for results equal to other programs'. It decodes most frames twice and takes
GroupNorm's statistics tile by tile. The order of blending and the sizes are those of the ``tiled_decode``
and ``tiled_encode`` of diffusers' ``AutoencoderKLHunyuanVideo`` 0.42: every tile is blended into its
neighbour above, left and before it in place, so that where four tiles meet the blends run one over another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from vae_tiling.tiles import VIDEO, Compression

TimeStep = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PublishedTiles:
    """Tile sizes and strides in pixels.

    Attributes:
        frames, stride_frames: of a tile in time, and from one to the next. A tile of 17 frames is five
            latent frames; strides are multiples of four frames.
        height_px, width_px, stride_height_px, stride_width_px: the same in space; multiples of 8.
        compression: pixels per latent cell.

    Raises:
        ValueError: a size that is no multiple of a cell, or a stride longer than its tile.
    """

    frames: int = 17
    stride_frames: int = 8
    height_px: int = 256
    width_px: int = 256
    stride_height_px: int = 192
    stride_width_px: int = 192
    compression: Compression = VIDEO

    def __post_init__(self) -> None:
        time, space = self.compression.time, self.compression.space
        checks = (
            ("frames", self.frames - 1, self.stride_frames, time),
            ("height_px", self.height_px, self.stride_height_px, space),
            ("width_px", self.width_px, self.stride_width_px, space),
        )
        for name, size, stride, cell in checks:
            if size < cell or size % cell or stride < cell or stride % cell or stride > size:
                raise ValueError(
                    f"{name}: sizes and strides must be multiples of {cell} (frames: plus 1 for the "
                    f"size), the stride no longer than the size; not {size} and {stride}"
                )

    @property
    def in_pixels(self) -> _Sizes:
        return _Sizes(
            (self.frames - 1, self.height_px, self.width_px),
            (self.stride_frames, self.stride_height_px, self.stride_width_px),
        )

    @property
    def in_cells(self) -> _Sizes:
        time, space = self.compression.time, self.compression.space
        return self.in_pixels.divided_by((time, space, space))


@dataclass(frozen=True)
class _Sizes:
    """(time, height, width) of a tile and of the step to the next; time without a tile's first frame."""

    tile: tuple[int, int, int]
    stride: tuple[int, int, int]

    def divided_by(self, cell: tuple[int, int, int]) -> _Sizes:
        return _Sizes(_divided(self.tile, cell), _divided(self.stride, cell))

    def overlap(self, axis: int) -> int:
        return self.tile[axis] - self.stride[axis]


def published_decode(
    decode_tile: TimeStep, latents: torch.Tensor, tiles: PublishedTiles
) -> Iterator[torch.Tensor]:
    """Latent [B, C, t, h, w] → pieces [B, 3, n, 8h, 8w] in order of time, 4t−3 frames in all.

    ``decode_tile`` takes a latent tile to its pixels. Frames leave when their last blend is done.
    """
    return _tiled(decode_tile, latents, tiles.in_cells, tiles.in_pixels)


def published_encode(
    encode_tile: TimeStep, video: torch.Tensor, tiles: PublishedTiles
) -> torch.Tensor:
    """Video [B, 3, T, H, W] → blended moments [B, 2C, (T+3)/4, H/8, W/8]."""
    return torch.cat(list(_tiled(encode_tile, video, tiles.in_pixels, tiles.in_cells)), dim=2)


def _tiled(
    run_tile: TimeStep, given: torch.Tensor, source: _Sizes, target: _Sizes
) -> Iterator[torch.Tensor]:
    """Tiles in time; ``source`` are the sizes of what goes in, ``target`` of what comes out."""
    frames = given.shape[2]
    if frames <= source.tile[0]:
        yield _tiled_in_space(run_tile, given, source, target)
        return
    out_frames = 1 + (frames - 1) * target.tile[0] // source.tile[0]
    before, done = None, 0
    for start in range(0, frames, source.stride[0]):
        piece = given[:, :, start : start + source.tile[0] + 1]
        tile = _tiled_in_space(run_tile, piece, source, target)
        if before is None:
            ready = tile[:, :, : target.stride[0] + 1]
        else:
            tile = _blended(before, tile[:, :, 1:], 2, target.overlap(0))
            ready = tile[:, :, : min(target.stride[0], out_frames - done)]
        before, done = tile, done + ready.shape[2]
        if ready.shape[2]:
            yield ready


def _tiled_in_space(
    run_tile: TimeStep, given: torch.Tensor, source: _Sizes, target: _Sizes
) -> torch.Tensor:
    height, width = given.shape[3:]
    if height <= source.tile[1] and width <= source.tile[2]:
        return run_tile(given)
    out_rows: list[torch.Tensor] = []
    above: list[torch.Tensor] = []
    for top in range(0, height, source.stride[1]):
        row: list[torch.Tensor] = []
        for left in range(0, width, source.stride[2]):
            piece = given[:, :, :, top : top + source.tile[1], left : left + source.tile[2]]
            tile = run_tile(piece)
            if above:
                tile = _blended(above[len(row)], tile, 3, target.overlap(1))
            if row:
                tile = _blended(row[-1], tile, 4, target.overlap(2))
            row.append(tile)
        kept = [tile[:, :, :, : target.stride[1], : target.stride[2]] for tile in row]
        out_rows.append(torch.cat(kept, dim=4))
        above = row
    return torch.cat(out_rows, dim=3)


def _blended(before: torch.Tensor, tile: torch.Tensor, dim: int, overlap: int) -> torch.Tensor:
    """``tile`` with its first cells along ``dim`` faded in over the last ones of its neighbour."""
    overlap = min(before.shape[dim], tile.shape[dim], overlap)
    if overlap == 0:
        return tile
    shape = [1] * tile.dim()
    shape[dim] = overlap
    ramp = (torch.arange(overlap, device=tile.device) / overlap).to(tile.dtype).view(shape)
    faded = before.narrow(dim, before.shape[dim] - overlap, overlap) * (1 - ramp)
    faded = faded + tile.narrow(dim, 0, overlap) * ramp
    rest = tile.narrow(dim, overlap, tile.shape[dim] - overlap)
    return torch.cat([faded, rest], dim=dim)


def _divided(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[int, int, int]:
    return a[0] // b[0], a[1] // b[1], a[2] // b[2]

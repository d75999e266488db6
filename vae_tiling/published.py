"""The published way to tile: overlapping tiles in time and space, each decoded afresh, blended in order.

Kept for comparison and for results equal to other programs'. It decodes most frames twice and takes
GroupNorm's statistics tile by tile. The order of blending and the sizes are those of the ``tiled_decode``
and ``tiled_encode`` of diffusers' ``AutoencoderKLHunyuanVideo`` 0.42: every tile is blended into its
neighbour above, left and before it in place, so that where four tiles meet the blends run one over another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vae_tiling.published_tiles import PublishedTiles, Sizes

TimeStep = Callable[[torch.Tensor], torch.Tensor]


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
    run_tile: TimeStep, given: torch.Tensor, source: Sizes, target: Sizes
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
    run_tile: TimeStep, given: torch.Tensor, source: Sizes, target: Sizes
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

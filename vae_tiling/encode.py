"""Pixels to latents: whole where it fits, else in spatial tiles with blended seams.

Tiles change the latent a little (GroupNorm's statistics are each tile's own), so one tile is the rule: a
single picture, which is all that image-to-video encodes, takes little room.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vae_tiling.published import published_encode
from vae_tiling.published_tiles import PublishedTiles
from vae_tiling.tiles import TilePlan, blend_ramp


def tiled_encode(
    encode_tile: Callable[[torch.Tensor], torch.Tensor],
    video: torch.Tensor,
    plan: TilePlan | PublishedTiles,
) -> torch.Tensor:
    """Encode a video tile by tile.

    Args:
        encode_tile: pixels [B, 3, T, h, w] → latent moments [B, M, (T+3)/4, h/8, w/8].
        video: [B, 3, T, H, W] in [−1, 1].
        plan: where the tiles lie; one tile encodes untiled, to the bit.

    Returns:
        Moments [B, M, (T+3)/4, H/8, W/8].

    Raises:
        ValueError: the video is not that of the plan.
    """
    if isinstance(plan, PublishedTiles):
        return published_encode(encode_tile, video, plan)
    if plan.published is not None:
        return published_encode(encode_tile, video, plan.published)
    expected = (plan.frames, plan.height_px, plan.width_px)
    if tuple(video.shape[2:]) != expected:
        raise ValueError(
            f"video must be {list(expected)} for this plan, not {list(video.shape[2:])}"
        )
    if plan.tiles == 1:
        return encode_tile(video)
    space = plan.compression.space
    rows = []
    for row in plan.rows:
        across = [
            encode_tile(
                video[
                    ...,
                    row.start * space : row.stop * space,
                    column.start * space : column.stop * space,
                ]
            )
            for column in plan.columns
        ]
        rows.append(_joined(across, [column.lead for column in plan.columns], dim=4))
    return _joined(rows, [row.lead for row in plan.rows], dim=3)


def _joined(tiles: list[torch.Tensor], leads: list[int], dim: int) -> torch.Tensor:
    """Neighbours along ``dim``, each faded in over the cells it shares with the one before."""
    joined = tiles[0]
    for tile, lead in zip(tiles[1:], leads[1:], strict=True):
        kept = joined.shape[dim] - lead
        shape = [1] * tile.dim()
        shape[dim] = lead
        ramp = torch.tensor(blend_ramp(lead), dtype=tile.dtype, device=tile.device).view(shape)
        shared = torch.lerp(joined.narrow(dim, kept, lead), tile.narrow(dim, 0, lead), ramp)
        rest = tile.narrow(dim, lead, tile.shape[dim] - lead)
        joined = torch.cat([joined.narrow(dim, 0, kept), shared, rest], dim=dim)
    return joined

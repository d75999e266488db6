"""Tiles of the image VAE against diffusers' tiled decode and encode with the same tile sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.model.test_image_vae import TINY, pair
from vae_tiling import Compression, PublishedTiles, plan_tiles, tiled_decode, tiled_encode
from vae_tiling.decode import as_floats

STILL = Compression(time=1)


def tiles_of(side_px: int, share: float) -> PublishedTiles:
    """Square tiles of one frame whose neighbours share a part, as diffusers' ``tile_overlap_factor``."""
    stride = round(side_px * (1 - share))
    return PublishedTiles(2, 1, side_px, side_px, stride, stride, STILL)


@pytest.mark.parametrize(
    ("side_px", "share", "cells"), [(32, 0.25, (7, 5)), (64, 0.25, (9, 17)), (32, 0.5, (4, 9))]
)
def test_a_picture_in_tiles_is_that_of_diffusers(
    side_px: int, share: float, cells: tuple[int, int]
) -> None:
    ours, oracle = pair(dataclasses.replace(TINY, use_quant_conv=True, use_post_quant_conv=True))
    oracle.enable_tiling()
    oracle.tile_sample_min_size = side_px
    oracle.tile_latent_min_size = side_px // 8
    oracle.tile_overlap_factor = share
    generator = torch.Generator().manual_seed(side_px)
    z = torch.randn(1, 6, *cells, generator=generator)
    picture = torch.rand(1, 3, 8 * cells[0], 8 * cells[1], generator=generator) * 2 - 1
    tiles = tiles_of(side_px, share)
    with torch.inference_mode():
        decoded = tiled_decode(
            lambda tile: ours.decode(tile[:, :, 0])[:, :, None],
            z[:, :, None],
            tiles,
            convert=as_floats,
        )
        (frame,) = torch.cat(list(decoded))
        expected = oracle.decode(z).sample[0].permute(1, 2, 0)
        assert frame.shape == expected.shape
        assert (frame - expected).abs().max() <= 1e-4
        encoded = tiled_encode(
            lambda tile: torch.cat(ours.encode(tile[:, :, 0]), dim=1)[:, :, None],
            picture[:, :, None],
            tiles,
        )
        posterior = oracle.encode(picture).latent_dist
        mean, logvar = encoded[:, :, 0].chunk(2, dim=1)
        assert (mean - posterior.mean).abs().max() <= 1e-4
        assert (logvar - posterior.logvar).abs().max() <= 1e-4


def test_one_tile_is_the_untiled_picture_to_the_bit() -> None:
    ours, _ = pair(TINY)
    z = torch.randn(1, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        (frames,) = tiled_decode(
            lambda tile: ours.decode(tile[:, :, 0])[:, :, None],
            z[:, :, None],
            plan_tiles(1, 40, 56),
            convert=as_floats,
        )
        assert torch.equal(frames[0], ours.decode(z)[0].permute(1, 2, 0))

"""The published tiling with our VAE against diffusers' tiled decode and encode of the same tile sizes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky5.model.loading import load_video_vae
from kandinsky5.model.vae import VideoVAE, VideoVAEConfig
from tests.model.test_vae import TINY, clip, diffusers_vae, pair
from vae_tiling import PublishedTiles, plan_tiles, tiled_decode, tiled_encode
from vae_tiling.decode import as_floats
from vae_tiling.published import published_decode, published_encode

DEMO_VAE = Path(__file__).resolve().parents[2] / "kandinsky5/demo/model/vae"
TILES = [
    (PublishedTiles(17, 8, 32, 32, 24, 16), (9, 7, 6)),
    (PublishedTiles(17, 12, 32, 48, 16, 40), (5, 4, 9)),
    (PublishedTiles(9, 8, 64, 64, 48, 48), (4, 5, 5)),
    (PublishedTiles(17, 8, 24, 24, 8, 8), (6, 7, 5)),
    (PublishedTiles(17, 16, 32, 32, 32, 32), (1, 5, 4)),
    (PublishedTiles(17, 8, 64, 64, 48, 48), (6, 4, 4)),
]


def tile_as(tiles: PublishedTiles, reference: Any) -> None:
    reference.use_framewise_encoding = reference.use_framewise_decoding = True
    reference.enable_tiling(
        tiles.height_px,
        tiles.width_px,
        tiles.frames - 1,
        tiles.stride_height_px,
        tiles.stride_width_px,
        tiles.stride_frames,
    )


def moments(vae: VideoVAE) -> Any:
    return lambda video: vae.quant_conv(vae.encoder(video))


@pytest.mark.parametrize(("tiles", "cells"), TILES, ids=lambda value: str(value)[:40])
def test_tiny_vae_decodes_and_encodes_in_tiles_as_diffusers(
    tiles: PublishedTiles, cells: tuple[int, int, int]
) -> None:
    ours, reference = pair(TINY)
    tile_as(tiles, reference)
    frames, height, width = 4 * cells[0] - 3, 8 * cells[1], 8 * cells[2]
    latent = torch.randn(1, 16, *cells, generator=torch.Generator().manual_seed(1))
    video = clip(frames, height, width)
    with torch.inference_mode():
        decoded = torch.cat(list(published_decode(ours.decode, latent, tiles)), dim=2)
        assert decoded.shape == (1, 3, frames, height, width)
        assert (decoded - reference.decode(latent).sample).abs().max() <= 1e-4
        encoded = published_encode(moments(ours), video, tiles)
        assert encoded.shape == (1, 32, *cells)
        assert (encoded - reference._encode(video)).abs().max() <= 1e-4


def test_demo_vae_decodes_and_encodes_in_tiles_as_diffusers() -> None:
    values = json.loads((DEMO_VAE / "config.json").read_text())
    config = VideoVAEConfig.from_dict(values)
    ours = load_video_vae(DEMO_VAE, device=torch.device("cpu"), dtype=torch.float32)
    reference = diffusers_vae(dataclasses.replace(config, scaling_factor=1.0))
    reference.load_state_dict(ours.state_dict())
    tiles = PublishedTiles(9, 4, 32, 32, 24, 24)
    tile_as(tiles, reference)
    video = clip(13, 32, 48) / 2
    with torch.inference_mode():
        encoded = tiled_encode(moments(ours), video, tiles)
        assert (encoded - reference._encode(video)).abs().max() <= 1e-4
        latent = encoded[:, :16]
        batches = list(tiled_decode(ours.decode, latent, tiles, convert=as_floats))
        assert [len(batch) for batch in batches] == [5, 4, 4]
        expected = as_floats(reference.decode(latent).sample)
        assert (torch.cat(batches) - expected).abs().max() <= 1e-4


def test_one_tile_encodes_as_untiled_to_the_bit() -> None:
    ours, _ = pair(TINY)
    picture = clip(1, 32, 48)
    with torch.inference_mode():
        tiled = tiled_encode(moments(ours), picture, plan_tiles(1, 32, 48))
        assert torch.equal(tiled, moments(ours)(picture))


@pytest.mark.parametrize(
    "sizes",
    [{"frames": 16}, {"stride_frames": 6}, {"height_px": 100}, {"stride_width_px": 264}],
    ids=str,
)
def test_sizes_that_are_no_tiles_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(sizes)).removeprefix('stride_')}.*multiples"):
        PublishedTiles(**sizes)

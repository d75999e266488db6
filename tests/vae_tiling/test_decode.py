"""Tiles put together again, with decoders whose every pixel says where it belongs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_tiling import Places, TilePlan, plan_tiles, tiled_decode, tiled_encode, to_uint8
from vae_tiling.decode import RollingDecoder, as_floats
from vae_tiling.statistics import Samples

FAR_OFF = 1e6


def addresses(plan: TilePlan) -> torch.Tensor:
    """Latent [1, 3, t, h, w] of each cell's own (t, y, x)."""
    axes = [torch.arange(length, dtype=torch.float32) for length in plan.latent_shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def grown(cells: torch.Tensor, *, is_start: bool) -> torch.Tensor:
    """Each cell repeated over its pixels; a video's first cell is one frame, all others four."""
    cells = cells.repeat_interleave(8, 3).repeat_interleave(8, 4).repeat_interleave(4, 2)
    return cells[:, :, 3:] if is_start else cells


def spoiled_at_edges(pixels: torch.Tensor) -> torch.Tensor:
    """What a tile cannot know: its outermost pixels."""
    pixels = pixels.clone()
    pixels[..., :1, :] = pixels[..., -1:, :] = pixels[..., :, :1] = pixels[..., :, -1:] = FAR_OFF
    return pixels


def inside(frames: torch.Tensor) -> torch.Tensor:
    return frames[:, 1:-1, 1:-1]


class Addresses:
    """A rolling decoder whose pixels are addresses, spoiled at the edges of tiles."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def narrow(self, latents: torch.Tensor) -> torch.Tensor:
        self.calls.append("narrow")
        return latents + 100

    def calibrate(self, samples: Samples, places: Places) -> None:
        self.calls.append("calibrate")
        self.samples = samples

    def start(self) -> Tile:
        self.calls.append("start")
        return Tile()


class Tile:
    def __init__(self) -> None:
        self.pushed = 0

    def push(self, features: torch.Tensor) -> torch.Tensor:
        assert features.shape[2] == 1
        assert (features[0, 0] == self.pushed + 100).all(), "frames come in order, each once"
        self.pushed += 1
        return spoiled_at_edges(grown(features - 100, is_start=self.pushed == 1))


@st.composite
def small_plans(draw: st.DrawFn, least_overlap: int = 8) -> TilePlan:
    """``least_overlap`` in pixels, 8 or 32."""
    sides = st.integers(1, 8).map(lambda n: 16 * n)
    frames = draw(st.integers(0, 3).map(lambda n: 4 * n + 1))
    tile = draw(st.integers(max(2, least_overlap // 8), 8).map(lambda n: 16 * n))
    overlap = draw(st.integers(least_overlap // 8, tile // 16).map(lambda n: 8 * n))
    return plan_tiles(
        frames, draw(sides), draw(sides), tile_height=tile, tile_width=tile, overlap=overlap
    )


def expected_of(plan: TilePlan) -> torch.Tensor:
    return grown(addresses(plan), is_start=True)[0].permute(1, 2, 3, 0)


@settings(deadline=None, max_examples=40)
@given(small_plans())
def test_rolled_tiles_give_every_pixel_its_own_value_and_the_exact_size(plan: TilePlan) -> None:
    decoder = Addresses()
    batches = list(tiled_decode(decoder, addresses(plan), plan, convert=as_floats))
    frames = torch.cat(batches)
    assert frames.shape == (plan.frames, plan.height_px, plan.width_px, 3)
    torch.testing.assert_close(inside(frames), inside(expected_of(plan)), rtol=0, atol=2e-5)
    assert [len(batch) for batch in batches] == [1] + [4] * (plan.latent_shape[0] - 1)
    assert decoder.calls == ["narrow", "calibrate"] + ["start"] * plan.tiles


@settings(deadline=None, max_examples=25)
@given(small_plans())
def test_tiles_decoded_at_once_give_every_pixel_its_own_value(plan: TilePlan) -> None:
    def decode_tile(z: torch.Tensor) -> torch.Tensor:
        return spoiled_at_edges(grown(z, is_start=True))

    (frames,) = tiled_decode(decode_tile, addresses(plan), plan, convert=as_floats)
    torch.testing.assert_close(inside(frames), inside(expected_of(plan)), rtol=0, atol=2e-5)


@settings(deadline=None, max_examples=25)
@given(small_plans(least_overlap=32))
def test_encoded_tiles_give_every_cell_its_own_value(plan: TilePlan) -> None:
    """From 32 px on, where the cell at a tile's edge is left to its neighbour."""
    video = grown(addresses(plan), is_start=True)

    def encode_tile(pixels: torch.Tensor) -> torch.Tensor:
        return spoiled_at_edges(pixels[:, :, ::4, ::8, ::8])

    moments = tiled_encode(encode_tile, video, plan)[..., 1:-1, 1:-1]
    torch.testing.assert_close(moments, addresses(plan)[..., 1:-1, 1:-1], rtol=0, atol=2e-5)


def test_frames_of_one_tile_leave_before_the_next_piece_is_begun() -> None:
    plan = plan_tiles(13, 32, 32)
    begun: list[int] = []
    seen = []
    for batch in tiled_decode(
        Addresses(), addresses(plan), plan, before_piece=lambda done, total: begun.append(done)
    ):
        seen.append((len(batch), begun[-1]))
    assert seen == [(1, 0), (4, 1), (4, 2), (4, 3)]


def test_what_before_piece_raises_ends_the_decode_and_it_counts_every_piece() -> None:
    plan = plan_tiles(9, 64, 96, tile_width=64, overlap=32)
    counted: list[tuple[int, int]] = []

    def before_piece(done: int, total: int) -> None:
        counted.append((done, total))
        if done == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        list(tiled_decode(Addresses(), addresses(plan), plan, before_piece=before_piece))
    assert counted == [(done, 6) for done in range(5)]


def test_features_and_frames_are_parked_and_only_pieces_fetched() -> None:
    plan = plan_tiles(9, 64, 96, tile_width=64, overlap=32)
    parked: list[torch.Size] = []
    fetched: list[torch.Size] = []

    def park(tensor: torch.Tensor) -> torch.Tensor:
        parked.append(tensor.shape)
        return tensor

    def fetch(tensor: torch.Tensor) -> torch.Tensor:
        fetched.append(tensor.shape)
        return tensor

    frames = list(
        tiled_decode(Addresses(), addresses(plan), plan, places=Places(park=park, fetch=fetch))
    )
    assert sum(map(len, frames)) == 9
    assert parked[0] == (1, 3, 3, 8, 12)
    assert set(parked[1:]) == {torch.Size((n, 64, 64, 3)) for n in (1, 4)}
    assert fetched == [torch.Size((1, 3, 1, 8, 8))] * 6


def test_pixels_become_bytes_and_blends_are_rounded() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 1, 5).expand(1, 3, 1, 1, 5)
    assert to_uint8(pixels)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    plan = plan_tiles(1, 16, 48, tile_width=32, overlap=16)

    def decode_tile(z: torch.Tensor) -> torch.Tensor:
        return torch.full((1, 3, 1, 16, 32), -1.0 + 2 * float(z[0, 0, 0, 0, 0] > 0))

    latents = torch.zeros(1, 4, 1, 2, 6)
    latents[..., 2:] = 1.0
    (frames,) = tiled_decode(decode_tile, latents, plan)
    assert frames.dtype == torch.uint8
    ramp = [round(255 * (i + 0.5) / 8) for i in range(8)]
    assert frames[0, 0, :, 0].tolist() == [0] * 20 + ramp + [255] * 20


def test_latents_of_another_plan_are_refused() -> None:
    plan = plan_tiles(9, 64, 64)
    with pytest.raises(ValueError, match=r"latents must be \[1, 3, 3, 8, 8\].*\[1, 3, 3, 8, 9\]"):
        list(tiled_decode(Addresses(), torch.zeros(1, 3, 3, 8, 9), plan))
    with pytest.raises(ValueError, match=r"video must be \[9, 64, 64\]"):
        tiled_encode(lambda x: x, torch.zeros(1, 3, 5, 64, 64), plan)


def test_a_function_is_no_rolling_decoder() -> None:
    assert isinstance(Addresses(), RollingDecoder)
    assert not isinstance(iterate, RollingDecoder)


def iterate(z: Any) -> Iterator[Any]:
    yield z

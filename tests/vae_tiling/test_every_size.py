"""Every legal size: exact, each pixel written once by weights that add up to one, from tiles that know it."""

from __future__ import annotations

import pytest
import torch

from vae_tiling import PublishedTiles, TilePlan, plan_tiles, smaller_plan, tiled_decode
from vae_tiling.decode import as_floats
from vae_tiling.tiles import OVERLAP_PX, Span, overlap_within

SIDES = range(16, 1408 + 1, 16)
FRAMES = range(1, 241 + 1, 4)
SPACE = 8
REACH = 1 / 4
"""Of what tiles share: so far from a tile's inner edge the stub's pixels are spoiled (16 px of 64)."""


class Marking:
    """A rolling decoder whose pixels are their column's number, or far off where a tile cannot know it."""

    def __init__(self, plan: TilePlan) -> None:
        self._length = plan.latent_shape[2]
        shared_px = overlap_within(SPACE * plan.largest_tile[1])
        self._reach_px = int(REACH * shared_px)

    def narrow(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def calibrate(self, samples: object, places: object) -> None:
        pass

    def start(self) -> Marking:
        self._first = True
        return self

    def push(self, features: torch.Tensor) -> torch.Tensor:
        pixels = features.repeat_interleave(SPACE, 3).repeat_interleave(SPACE, 4)
        pixels = pixels.clone()
        if features[0, 0, 0, 0, 0] > 0:
            pixels[..., : self._reach_px] = 1e9
        if features[0, 0, 0, 0, -1] < self._length - 1:
            pixels[..., -self._reach_px :] = 1e9
        frames, self._first = 1 if self._first else 4, False
        return pixels.expand(-1, -1, frames, -1, -1)


def columns_of(plan: TilePlan) -> torch.Tensor:
    return torch.arange(plan.latent_shape[2], dtype=torch.float32).expand(1, 1, *plan.latent_shape)


def every_plan(side: int) -> list[TilePlan]:
    """Strips of a side: whole, the ladder's tiles, and tiles that a user may ask for."""
    plans = [plan_tiles(1, SPACE, side)]
    while (smaller := smaller_plan(plans[-1])) is not None:
        plans.append(smaller)
    asked = [tile for tile in (64, 80, 112, 128, 256, 272, 512) if tile < side]
    return plans + [
        plan_tiles(1, SPACE, side, tile_width=tile, overlap=overlap_within(tile)) for tile in asked
    ]


@pytest.mark.parametrize("from_px", range(16, 1409, 176))
def test_every_side_is_written_by_tiles_that_know_each_pixel(from_px: int) -> None:
    for side in range(from_px, min(from_px + 176, 1409), 16):
        for plan in every_plan(side):
            (frames,) = tiled_decode(Marking(plan), columns_of(plan), plan, convert=as_floats)
            expected = torch.arange(side // SPACE).repeat_interleave(SPACE).float()
            assert frames.shape == (1, SPACE, side, 1)
            torch.testing.assert_close(
                frames[0, :, :, 0], expected.expand(SPACE, -1), rtol=0, atol=1e-3
            )


def test_every_length_has_its_frames() -> None:
    for frames in FRAMES:
        for tile in (None, 128):
            plan = plan_tiles(frames, SPACE, 192, tile_width=tile)
            batches = list(tiled_decode(Marking(plan), columns_of(plan), plan, convert=as_floats))
            assert [len(batch) for batch in batches] == [1] + [4] * ((frames - 1) // 4)


def test_tiles_share_what_was_asked_for_at_every_side() -> None:
    for side in SIDES:
        for plan in every_plan(side):
            later: tuple[Span, ...] = plan.columns[1:]
            shared_px = min(OVERLAP_PX, SPACE * plan.largest_tile[1] // 2 // SPACE * SPACE)
            assert all(span.lead * SPACE >= shared_px >= 32 for span in later)


@pytest.mark.parametrize("frames", [1, 5, 17, 21, 25, 61])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (256, 272), (304, 512)], ids=str)
def test_the_published_tiling_has_every_frame_and_tells_each_tile(
    frames: int, height: int, width: int
) -> None:
    cells = (1, 1, (frames + 3) // 4, height // SPACE, width // SPACE)
    told: list[tuple[int, int]] = []

    def decode_tile(tile: torch.Tensor) -> torch.Tensor:
        grown = tile.repeat_interleave(4, 2)[:, :, 3:]
        return grown.repeat_interleave(SPACE, 3).repeat_interleave(SPACE, 4)

    batches = tiled_decode(
        decode_tile,
        torch.ones(cells),
        PublishedTiles(),
        convert=as_floats,
        before_piece=lambda done, total: told.append((done, total)),
    )
    video = torch.cat(list(batches))
    assert video.shape == (frames, height, width, 1)
    torch.testing.assert_close(video, torch.ones_like(video))
    assert told == [(done, len(told)) for done in range(len(told))]

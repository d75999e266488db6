"""What a video's statistics are taken on, and what each sample counts."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_tiling import plan_tiles
from vae_tiling.samples import (
    FRAMES_BEFORE,
    LONGEST_RUN,
    chosen_moving,
    chosen_stills,
    sample_sizes,
)
from vae_tiling.statistics import taken, unlikeness


def unlike_of(values: list[float]) -> list[list[float]]:
    """Frames that are one number each."""
    return [[(a - b) ** 2 for b in values] for a in values]


VALUES = st.lists(st.floats(0, 9, allow_nan=False), min_size=2, max_size=31)


@settings(deadline=None, max_examples=100)
@given(VALUES, st.integers(1, 8))
def test_every_frame_is_stood_for_by_one_still(values: list[float], count: int) -> None:
    stills = chosen_stills(count, unlike_of(values))
    assert 1 <= len(stills) <= min(count, len(values))
    assert [s.frame for s in stills] == sorted({s.frame for s in stills})
    assert sum(s.stands_for for s in stills) == len(values) - 1
    assert sum(s.first for s in stills) == 1


@settings(deadline=None, max_examples=100)
@given(VALUES, st.integers(1, 4))
def test_every_later_frame_is_stood_for_by_one_that_moves(values: list[float], count: int) -> None:
    moving = chosen_moving(count, unlike_of(values))
    assert len(moving) == min(count, len(values) - 1)
    assert all(1 <= sample.frame < len(values) for sample in moving)
    assert sum(sample.stands_for for sample in moving) == len(values) - 1


def test_short_scenes_count_as_much_as_there_is_of_them() -> None:
    stills = chosen_stills(3, unlike_of([0, 0.1, 0.2, 5, 5.1, 9, 9, 9, 9, 9, 9]))
    assert [(s.stands_for, s.first) for s in stills] == [(2, True), (2, False), (6, False)]


def test_the_typical_frame_of_a_scene_stands_for_it_not_the_odd_one_at_its_edge() -> None:
    (scene, _) = chosen_stills(2, unlike_of([0, 1, 1, 1, 1.9, 9, 9]))
    assert scene.frame in (1, 2, 3) and scene.stands_for == 4


def test_a_cut_is_its_own_group_of_changes_and_counts_once() -> None:
    steady = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 8.0, 8.1, 8.2, 8.3]
    moving = chosen_moving(2, unlike_of(steady))
    assert [(m.frame, m.stands_for) for m in moving if m.frame == 6] == [(6, 1)]
    assert sorted(m.stands_for for m in moving) == [1, 8]


def test_changes_are_parted_where_they_differ_least() -> None:
    """Against every other way of parting them."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(9, generator=generator).cumsum(0).tolist()
    changes = sorted(abs(b - a) for a, b in pairwise(values))

    def spread(part: list[float]) -> float:
        mean = sum(part) / len(part)
        return sum((value - mean) ** 2 for value in part)

    best = min(
        (spread(changes[:i]) + spread(changes[i:j]) + spread(changes[j:]), (i, j - i, 8 - j))
        for i in range(1, 7)
        for j in range(i + 1, 8)
    )
    assert tuple(m.stands_for for m in chosen_moving(3, unlike_of(values))) == best[1]


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 60), st.integers(1, 88), st.integers(1, 88), st.integers(4, 88))
def test_samples_cover_a_frame_once_and_stay_few(
    frames: int, height: int, width: int, tile: int
) -> None:
    plan = plan_tiles(
        4 * frames + 1,
        16 * height,
        16 * width,
        tile_height=16 * tile,
        tile_width=16 * tile,
        overlap=8,
    )
    sizes = sample_sizes(plan)
    _, rows, columns = plan.latent_shape
    seen = torch.zeros(rows, columns, dtype=torch.int32)
    for piece in sizes.pieces:
        seen[piece.top : piece.top + piece.height, piece.left : piece.left + piece.width] += 1
    assert (seen == 1).all()
    assert sizes.run == (1 < plan.frames <= LONGEST_RUN and plan.tiles == 1)
    if not sizes.run:
        assert 1 <= sizes.stills <= min(7, frames + 1)
        assert (sizes.moving == 0) == (frames == 0)
        assert sizes.moving <= min(3, frames)


def features_of(frames: int, *, cut: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    video = torch.rand(1, 4, frames, 8, 12, generator=generator) / 10
    video[:, :, cut:] += 3.0
    return video


def test_samples_are_copies_of_whole_stills_and_of_pieces_behind_the_frames_before() -> None:
    plan = plan_tiles(33, 64, 96, tile_width=64, overlap=32)
    features = features_of(9, cut=5)
    samples = taken(features, plan)
    assert samples.run is None
    for still in samples.stills:
        assert any(torch.equal(still.features[:, 0], frame) for frame in features[0].unbind(1))
        assert still.features._base is None
    total = sum(piece.stands_for for piece in samples.moving)
    assert total == pytest.approx(8)
    at_cut = [m for m in samples.moving if m.features[:, -1].mean() - m.features[:, -2].mean() > 1]
    assert sum(m.stands_for for m in at_cut) == pytest.approx(1)
    pieces = sample_sizes(plan).pieces
    for moving in samples.moving:
        assert moving.features.shape[2:] in {(p.height, p.width) for p in pieces}
        assert 2 <= moving.features.shape[1] <= 1 + FRAMES_BEFORE


def test_a_short_video_is_looked_at_from_its_first_frame_to_its_last() -> None:
    features = features_of(6, cut=3)
    samples = taken(features, plan_tiles(21, 64, 96))
    assert samples.run is not None and torch.equal(samples.run, features[0])
    assert not samples.stills and not samples.moving


def test_unlikeness_is_the_mean_square_difference_and_needs_no_contents_to_be_counted() -> None:
    video = features_of(4, cut=2)[0].bfloat16()
    unlike = unlikeness(video)
    for one in range(4):
        for other in range(4):
            exact = (video[:, one].double() - video[:, other].double()).square().mean().item()
            assert unlike[one][other] == pytest.approx(exact, rel=1e-3, abs=1e-9)
    assert all(math.isfinite(value) for row in unlikeness(video.to("meta")) for value in row)

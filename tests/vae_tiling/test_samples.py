"""What a video's statistics are taken on, and what each sample counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, cycle

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
def test_stills_stand_for_all_frames_and_no_more(values: list[float], count: int) -> None:
    stills = chosen_stills(count, unlike_of(values))
    assert len(stills) == min(count, len(values))
    assert [s.frame for s in stills] == sorted({s.frame for s in stills})
    assert all(s.stands_for >= 0 and s.first >= 0 for s in stills)
    assert sum(s.stands_for for s in stills) == pytest.approx(len(values) - 1)
    assert sum(s.first for s in stills) == pytest.approx(1)


@settings(deadline=None, max_examples=100)
@given(VALUES, st.integers(1, 6))
def test_what_moves_stands_for_every_later_frame(values: list[float], count: int) -> None:
    moving = chosen_moving(count, unlike_of(values))
    assert len(moving) == min(count, len(values) - 1)
    assert all(1 <= sample.frame < len(values) for sample in moving)
    assert sum(sample.stands_for for sample in moving) == pytest.approx(len(values) - 1)


def test_short_scenes_count_as_much_as_there_is_of_them() -> None:
    stills = chosen_stills(3, unlike_of([0, 0, 0, 5, 5, 9, 9, 9, 9, 9, 9]))
    assert [s.stands_for for s in stills] == pytest.approx([2, 2, 6], abs=1e-4)
    assert [s.first for s in stills] == pytest.approx([1, 0, 0], abs=1e-4)


def test_the_typical_frame_of_a_scene_stands_for_it_not_the_odd_one_at_its_edge() -> None:
    (scene, _) = chosen_stills(2, unlike_of([0, 1, 1, 1, 1.9, 9, 9]))
    assert scene.frame in (1, 2, 3) and scene.stands_for == pytest.approx(4, abs=0.3)


def test_frames_between_two_that_are_looked_at_count_for_both() -> None:
    """A fade: its mean is that of what is looked at, with whatever weights that takes."""
    values = [0.0, 0.1, 0.3, 0.6, 1.0, 1.5, 2.1, 2.8, 3.6, 4.5, 5.5]
    stills = chosen_stills(4, unlike_of(values))
    for power in (1, 2):
        estimate = sum(s.stands_for * values[s.frame] ** power for s in stills)
        assert estimate == pytest.approx(sum(v**power for v in values), rel=0.02)
    grouped = sum(
        min((values[s.frame] for s in stills), key=lambda at: abs(at - v)) ** 2 for v in values
    )
    assert (
        abs(grouped / sum(v**2 for v in values) - 1) > 0.05
    )  # each for its group: not near enough


def test_those_chosen_leave_least_of_all_to_be_unlike() -> None:
    """Against every other choice."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(9, generator=generator) * 9).tolist()
    unlike = unlike_of(values)

    def left(chosen: Sequence[int]) -> float:
        return sum(min(row[c] for c in chosen) for row in unlike)

    found = [still.frame for still in chosen_stills(3, unlike)]
    assert left(found) == pytest.approx(min(map(left, combinations(range(9), 3))))


def test_a_cut_is_a_change_of_its_own_and_counts_once() -> None:
    steady = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 8.0, 8.1, 8.2, 8.3]
    moving = chosen_moving(3, unlike_of(steady))
    (at_cut,) = [m for m in moving if m.frame == 6]
    assert at_cut.stands_for == pytest.approx(1, abs=0.1)


def test_going_into_white_and_coming_out_of_it_are_two_changes() -> None:
    """Though they are equally large."""
    moving = chosen_moving(3, unlike_of([0.0, 0.1, 0.2, 9.0, 0.3, 0.4, 0.5, 0.6]))
    assert {3, 4} < {m.frame for m in moving}


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 60), st.integers(1, 88), st.integers(1, 88), st.integers(4, 88))
def test_halves_cover_a_frame_once_and_samples_are_the_same_for_any_tiles(
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
    for piece in (piece for half in sizes.halves for piece in half):
        seen[piece.top : piece.top + piece.height, piece.left : piece.left + piece.width] += 1
    assert (seen == 1).all()
    assert sizes.run == (1 < plan.frames <= LONGEST_RUN)
    assert sizes.stills == min(7, frames + 1)
    assert sizes.moving == min(6, frames)
    assert (sizes.window is None) == (plan.tiles == 1)
    whole = sample_sizes(plan_tiles(plan.frames, plan.height_px, plan.width_px))
    assert replace(sizes, window=None) == whole, "how many tiles there are plays no part"


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
    assert sum(m.stands_for for m in at_cut) == pytest.approx(1, abs=0.1)
    halves = cycle(sample_sizes(plan).halves)
    shapes = [(p.height, p.width) for _, half in zip(range(6), halves, strict=False) for p in half]
    assert [tuple(m.features.shape[2:]) for m in samples.moving] == shapes
    assert all(2 <= m.features.shape[1] <= 1 + FRAMES_BEFORE for m in samples.moving)
    assert samples.window == plan.largest_tile


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

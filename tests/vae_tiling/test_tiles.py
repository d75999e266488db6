"""Where tiles lie, for every legal size: they cover all, and their weights add up to one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_tiling.plan import smaller_plan
from vae_tiling.tiles import Span, TilePlan, blend_ramp, plan_tiles

SIDES = st.integers(1, 88).map(lambda n: 16 * n)
FRAMES = st.integers(0, 60).map(lambda n: 4 * n + 1)


@st.composite
def plans(draw: st.DrawFn) -> TilePlan:
    height, width = draw(SIDES), draw(SIDES)
    tile = draw(st.integers(4, 88).map(lambda n: 16 * n))
    overlap = draw(st.integers(1, tile // 16).map(lambda n: 8 * n))
    return plan_tiles(
        draw(FRAMES), height, width, tile_height=tile, tile_width=tile, overlap=overlap
    )


def weights_of(spans: Sequence[Span], length_px: int, space: int) -> list[list[float]]:
    """Per pixel the weight of every tile, as tiles laid one after another leave it."""
    weights = [[0.0] * len(spans) for _ in range(length_px)]
    for index, span in enumerate(spans):
        ramp = blend_ramp(span.lead * space)
        for offset in range(span.length * space):
            share = ramp[offset] if offset < len(ramp) else 1.0
            pixel = weights[span.start * space + offset]
            pixel[:] = [weight * (1.0 - share) for weight in pixel]
            pixel[index] += share
    return weights


@settings(deadline=None, max_examples=60)
@given(plans())
def test_weights_are_none_negative_and_add_up_to_one_at_every_pixel(plan: TilePlan) -> None:
    space = plan.compression.space
    for spans, length_px in ((plan.rows, plan.height_px), (plan.columns, plan.width_px)):
        for pixel in weights_of(spans, length_px, space):
            assert min(pixel) >= 0.0
            assert sum(pixel) == pytest.approx(1.0, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(plans())
def test_a_tile_counts_for_nothing_at_its_own_inner_edges(plan: TilePlan) -> None:
    space = plan.compression.space
    for spans, length_px in ((plan.rows, plan.height_px), (plan.columns, plan.width_px)):
        weights = weights_of(spans, length_px, space)
        for index, span in enumerate(spans):
            if span.start > 0:
                assert weights[span.start * space][index] == 0.0
            if span.stop * space < length_px:
                assert weights[span.stop * space - 1][index] == 0.0


@settings(deadline=None, max_examples=100)
@given(plans())
def test_tiles_have_the_size_asked_for_and_end_at_the_edge(plan: TilePlan) -> None:
    _, height, width = plan.latent_shape
    for spans, length in ((plan.rows, height), (plan.columns, width)):
        assert spans[0].start == 0 and spans[0].lead == 0
        assert spans[-1].stop == length
        assert len({span.length for span in spans}) == 1
        for before, span in pairwise(spans):
            assert span.start > before.start
            assert span.lead == before.stop - span.start > 0


@settings(deadline=None, max_examples=60)
@given(FRAMES, SIDES, SIDES)
def test_smaller_plans_end_and_every_one_has_smaller_tiles(
    frames: int, height: int, width: int
) -> None:
    plan = plan_tiles(frames, height, width)
    assert plan.tiles == 1
    while (smaller := smaller_plan(plan)) is not None:
        assert smaller.largest_tile != plan.largest_tile
        assert all(
            new <= old for new, old in zip(smaller.largest_tile, plan.largest_tile, strict=True)
        )
        assert (smaller.frames, smaller.height_px, smaller.width_px) == (frames, height, width)
        plan = smaller
    assert max(plan.largest_tile) * 8 < 256 or max(height, width) < 256


def test_a_ramp_rises_from_nothing_to_all_in_its_middle_half() -> None:
    assert blend_ramp(8) == [0.0, 0.0, 0.125, 0.375, 0.625, 0.875, 1.0, 1.0]
    assert blend_ramp(0) == []


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"frames": 10}, "frames must be 4·n + 1, not 10"),
        ({"frames": 0}, "frames must be 4·n + 1, not 0"),
        ({"height": 100}, "height must be a multiple of 8 px, not 100"),
        ({"tile_width": 60}, "tile_width must be a multiple of 8 px, not 60"),
        ({"tile_width": 64, "overlap": 40}, "at most half a tile (32 px), not 40"),
        ({"tile_width": 64, "overlap": 20}, "overlap must be a multiple of 8 px"),
    ],
    ids=str,
)
def test_a_size_that_cannot_be_met_exactly_is_refused(sizes: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError) as refused:
        plan_tiles(**{"frames": 9, "height": 128, "width": 128, **sizes})
    assert named in str(refused.value)

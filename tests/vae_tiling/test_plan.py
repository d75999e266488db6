"""Tiles chosen by memory."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_tiling.plan import (
    DecoderDims,
    decode_peak_bytes,
    encode_peak_bytes,
    plan_for_budget,
    plan_tiles,
    smaller_plan,
)

DIMS = DecoderDims()


def test_the_published_sizes_fit_their_targets_with_the_weights() -> None:
    weights_bytes = 2 * 246_478_803
    for frames in (121, 241):
        plan = plan_for_budget(frames, 512, 768, DIMS, 4_000_000_000 - weights_bytes)
        assert plan.tiles == 1
        plan = plan_for_budget(frames, 1024, 1024, DIMS, 6_000_000_000 - weights_bytes)
        assert plan.tiles == 2


@pytest.mark.parametrize(("height", "width"), [(512, 768), (1024, 1024), (768, 1280)])
def test_the_peak_does_not_depend_on_the_duration(height: int, width: int) -> None:
    budget_bytes = 5_500_000_000
    plans = [plan_for_budget(frames, height, width, DIMS, budget_bytes) for frames in (61, 241)]
    short, long = (decode_peak_bytes(plan, DIMS) for plan in plans)
    assert short == long <= budget_bytes


def test_a_budget_is_kept_with_the_fewest_tiles() -> None:
    plan = plan_for_budget(121, 1024, 1024, DIMS, 4_500_000_000)
    assert decode_peak_bytes(plan, DIMS) <= 4_500_000_000
    fewer = plan_tiles(121, 1024, 1024)
    while (after := smaller_plan(fewer)) != plan:
        assert after is not None
        fewer = after
    assert decode_peak_bytes(fewer, DIMS) > 4_500_000_000


def test_a_budget_that_no_tile_keeps_is_refused_with_numbers() -> None:
    with pytest.raises(ValueError, match=r"1024×1024, 121 frames takes 1\.\d\d GB .* 1\.00 GB"):
        plan_for_budget(121, 1024, 1024, DIMS, 1_000_000_000)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 88), st.integers(2, 88), st.integers(0, 60))
def test_smaller_tiles_never_need_more(height: int, width: int, frames: int) -> None:
    plan = plan_tiles(4 * frames + 1, 16 * height, 16 * width)
    peak = decode_peak_bytes(plan, DIMS)
    while (smaller := smaller_plan(plan)) is not None:
        below = decode_peak_bytes(smaller, DIMS)
        assert below <= 1.1 * peak
        plan, peak = smaller, below


def test_float32_takes_twice_as_much() -> None:
    plan = plan_tiles(121, 512, 768)
    assert decode_peak_bytes(plan, DIMS, 4) == 2 * decode_peak_bytes(plan, DIMS)
    assert encode_peak_bytes(plan, DIMS, 4) == 2 * encode_peak_bytes(plan, DIMS)

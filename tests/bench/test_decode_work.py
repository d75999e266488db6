"""A8: the decode's work and memory with the published VAE's shapes, counted without weights."""

from __future__ import annotations

import dataclasses
import functools
import weakref

import pytest
import torch

from kandinsky5.bench import decode_work
from kandinsky5.bench.decode_work import (
    CASES,
    WORK_TARGET,
    dims_of,
    peak_case,
    rolling_cost,
    untiled_multiply_adds,
)
from kandinsky5.benches import BENCHES
from kandinsky5.model.vae import VideoVAEConfig
from vae_tiling import Places, decode_peak_bytes, encode_peak_bytes, plan_tiles
from vae_tiling.plan import _calibrating_numbers, parked_bytes

TINY = VideoVAEConfig(block_out_channels=(16, 32, 32, 48), layers_per_block=1, norm_num_groups=8)
DIMS = dims_of(VideoVAEConfig())

counted_cost = functools.cache(rolling_cost)
"""Counting takes seconds: what several tests look at is counted once."""


def test_work_stays_below_the_untiled_decode_at_512x768x121() -> None:
    plan = plan_tiles(121, 512, 768)
    ratio = counted_cost(plan).multiply_adds / untiled_multiply_adds(plan)
    assert ratio == pytest.approx(1.07, abs=0.01)
    assert ratio <= WORK_TARGET


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_the_peak_keeps_its_limit_and_the_prediction(case: tuple[int, int, int, int]) -> None:
    """With few frames: the stage that decides is the same for any number, as the plan's tests show."""
    _, height, width, limit_bytes = case
    counted = peak_case(13, height, width, limit_bytes)
    assert counted["peak_bytes"] <= limit_bytes
    assert counted["stage_peaks"]["narrow"] < max(counted["stage_peaks"].values())
    assert counted["peak_bytes"] == pytest.approx(counted["predicted_bytes"], rel=0.10)


def test_only_the_narrow_stage_grows_with_the_duration() -> None:
    short, long = (
        counted_cost(plan_tiles(n, 64, 64, overlap=16), TINY).stage_peaks for n in (41, 61)
    )
    assert long["narrow"] > 1.1 * short["narrow"]
    for stage in ("statistics", "frames"):  # what is left is the latent itself
        assert long[stage] == pytest.approx(short[stage], rel=0.02)


@pytest.mark.parametrize(
    ("frames", "height", "width", "tile"),
    [(1, 512, 768, None), (5, 256, 256, None), (29, 256, 384, 256)],
)
def test_the_predicted_peak_is_the_counted_one(
    frames: int, height: int, width: int, tile: int | None
) -> None:
    plan = plan_tiles(frames, height, width, tile_width=tile)
    counted = counted_cost(plan).peak_bytes
    assert decode_peak_bytes(plan, DIMS) == pytest.approx(counted, rel=0.10)


@pytest.mark.parametrize(("frames", "tile"), [(25, 96)])
def test_the_predicted_peak_of_the_statistics_of_several_tiles_is_the_counted_one(
    frames: int, tile: int
) -> None:
    """That stage alone, which seldom decides."""
    plan = plan_tiles(frames, 128, 192, tile_height=tile, tile_width=tile, overlap=32)
    counted = counted_cost(plan).stage_peaks["statistics"]
    assert 2 * _calibrating_numbers(plan, DIMS) == pytest.approx(counted, rel=0.10)


def test_what_is_predicted_to_wait_in_main_memory_is_what_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_tiles(25, 64, 64, tile_height=40, tile_width=40, overlap=16)
    waiting: dict[int, int] = {}
    most = 0

    def park(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most
        parked = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        waiting[id(parked)] = parked.nbytes
        weakref.finalize(parked, waiting.pop, id(parked))
        most = max(most, sum(waiting.values()))
        return parked

    monkeypatch.setattr(decode_work, "_HOST", Places(park=park, fetch=lambda tensor: tensor))
    rolling_cost(plan, TINY)
    assert parked_bytes(plan, dims_of(TINY)) == pytest.approx(most, rel=0.10)
    assert parked_bytes(plan_tiles(25, 64, 64), dims_of(TINY)) == 0


@pytest.mark.parametrize(("frames", "side"), [(1, 128), (5, 128), (25, 64)])
def test_the_predicted_peak_of_all_frames_at_once_is_the_counted_one(
    frames: int, side: int
) -> None:
    plan = dataclasses.replace(plan_tiles(frames, side, side), at_once=True)
    counted = decode_work.at_once_peak_counted(plan)
    assert decode_peak_bytes(plan, DIMS) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(("frames", "side"), [(1, 512), (9, 128)])
def test_the_predicted_peak_of_encoding_is_the_counted_one(frames: int, side: int) -> None:
    plan = plan_tiles(frames, side, side)
    counted = decode_work.encode_peak_counted(plan)
    assert encode_peak_bytes(plan, DIMS) == pytest.approx(counted, rel=0.05)


def test_each_tile_is_counted_with_the_pixels_that_it_shares() -> None:
    """Two tiles of 40 of 64 px: 1.25 times the work behind the narrow stage, which has no tiles."""

    whole, tiled = (
        counted_cost(plan_tiles(41, 64, 64, tile_width=tile, overlap=16), TINY)
        for tile in (None, 40)
    )
    assert tiled.frame_multiply_adds == pytest.approx(1.25 * whole.frame_multiply_adds, rel=1e-3)
    assert tiled.multiply_adds > 10 * tiled.frame_multiply_adds  # eleven, the first of them short


def test_the_benchmark_reports_its_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_work, "CASES", ((5, 64, 64, 4_000_000_000),))
    report = BENCHES["decode-work"].run({"height": 64, "width": 64})
    assert report["benchmark"] == "decode-work"
    assert report["work_ratio"] < WORK_TARGET
    assert [case["tiles"] for case in report["peaks"]] == [1]
    assert report["reached"] is True

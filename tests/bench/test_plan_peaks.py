"""Predicted peaks of the device are those that the stages themselves allocate, within a tenth."""

from __future__ import annotations

from functools import cache

import pytest

from kandinsky5.bench import plan_peaks as bench
from kandinsky5.bench.plan_peaks import (
    CASES,
    WITHIN,
    PeakCase,
    bare_bytes,
    count,
    largest_error,
    plan_peaks,
    planned,
)
from kandinsky5.bench.stage_counts import COUNTS
from kandinsky5.errors import UserError
from kandinsky5.memory.budget import GB
from kandinsky5.memory.demand import PlanChoices
from kandinsky5.memory.plan import MemoryPlan

MUST_FIT = {
    "pro-sd-8gb": ("pro-t2v-5s-sd", 8, 32),
    "pro-hd-24gb": ("pro-t2v-10s-hd", 24, 32),
    "lite-6gb": ("lite-i2v-5s", 6, 32),
    "image-4gb": ("image-t2i", 4, 32),
}
"""Plans that have to fit: preset, VRAM, RAM."""
SMALL = {"width_px": 384, "height_px": 256}
FEW_STEPS = 3


@cache
def plan_of(name: str) -> MemoryPlan:
    return planned(next(case for case in CASES if case.name == name))


def predicted(plan: MemoryPlan, stage: str) -> int:
    return bare_bytes(next(item for item in plan.stages if item.name == stage))


@pytest.mark.parametrize("name", MUST_FIT)
def test_the_plans_that_have_to_fit_do(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    assert (case.preset, case.vram_gb, case.ram_gb) == MUST_FIT[name]
    plan = plan_of(name)
    assert plan.fits, plan.problems
    assert plan.peak_vram_bytes <= case.vram_gb * GB
    assert plan.peak_ram_bytes <= case.ram_gb * GB


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        *((name, "expand") for name in MUST_FIT),
        ("edit-6gb", "expand"),
        *((name, "encode text") for name in MUST_FIT),
        ("edit-4gb", "encode text"),
        ("lite-6gb", "encode image"),
        ("edit-4gb", "encode image"),
        *((name, "denoise") for name in MUST_FIT),
        ("pro-sd-8gb", "decode"),
        ("pro-hd-24gb", "decode"),
        ("image-4gb", "decode"),
    ],
)
def test_a_stage_takes_within_a_tenth_what_its_plan_says(name: str, stage: str) -> None:
    plan = plan_of(name)
    assert predicted(plan, stage) == pytest.approx(COUNTS[stage](plan), rel=WITHIN)


def test_lite_is_decoded_as_pro_is() -> None:
    assert plan_of("lite-6gb").decode_tiles == plan_of("pro-sd-8gb").decode_tiles


@pytest.mark.parametrize("name", ["pro-sd-8gb", "image-4gb"])
def test_preparing_a_schedule_takes_within_a_tenth_what_its_plan_says(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    plan = planned(case, steps=FEW_STEPS)
    assert predicted(plan, "prepare") == pytest.approx(COUNTS["prepare"](plan), rel=WITHIN)


@pytest.mark.parametrize(
    "choices",
    [
        PlanChoices(source="disk", resident_blocks=0),
        PlanChoices(source="pinned", slots=4, chunk_tokens=2048, chunk_heads=16),
        PlanChoices(source="pinned", resident_blocks=20, chunk_heads=8),
    ],
    ids=lambda choices: str(choices.made),
)
def test_other_ways_of_denoising_are_predicted_as_well(choices: PlanChoices) -> None:
    plan = planned(PeakCase("other", "pro-t2v-5s-sd", 24, 64, choices=choices, **SMALL))
    assert predicted(plan, "denoise") == pytest.approx(COUNTS["denoise"](plan), rel=WITHIN)


@pytest.mark.parametrize("preset", ["lite-i2v-5s", "image-i2i"])
def test_tiles_are_predicted_as_well_as_whole_pictures(preset: str) -> None:
    choices = PlanChoices(vae_tile=256)
    plan = planned(PeakCase("tiles", preset, 24, 64, choices=choices, **SMALL))
    assert plan.encode_tiles is not None
    assert min(plan.encode_tiles.tiles, plan.decode_tiles.tiles) > 1
    stages = ["encode image"] if preset == "lite-i2v-5s" else ["encode image", "decode"]
    for stage in stages:
        assert predicted(plan, stage) == pytest.approx(COUNTS[stage](plan), rel=WITHIN)


def test_the_plans_that_have_to_fit_expand_the_prompt_whole_and_streamed() -> None:
    used = {name: plan_of(name).text.expand for name in MUST_FIT}
    told = {name: (use.weights, use.source) for name, use in used.items() if use is not None}
    assert set(told) == set(MUST_FIT)
    assert set(told.values()) == {("bf16", "resident"), ("nf4", "resident"), ("nf4", "pinned")}


def test_a_row_of_the_benchmark_tells_of_every_stage() -> None:
    case = PeakCase("small", "image-i2i", 6, 32, "bf16", **SMALL)
    names = ("expand", "encode text", "encode image", "denoise", "decode")
    row = count(case, stages=names)
    assert set(row["stages"]) == set(names)
    assert largest_error(row) <= WITHIN, row["stages"]
    told = row["stages"]["denoise"]
    error = told["planned_bytes"] / told["counted_bytes"] - 1
    assert told["error"] == pytest.approx(error, abs=1e-4)
    assert (row["text_encoder"], row["writer"]) == ("bf16, pinned", "nf4, pinned")


def test_the_benchmark_names_its_cases_and_knows_a_plan_that_is_wrong(monkeypatch) -> None:
    with pytest.raises(UserError, match="pro-sd-8gb"):
        plan_peaks(case="none")
    monkeypatch.setattr(bench, "COUNTS", {"encode image": lambda plan: 1000, "decode": lambda p: 1})
    assert plan_peaks(case="lite-6gb")["reached"] == {"fits": True, "within_10_percent": False}


def test_the_cases_fit_and_have_every_member() -> None:
    assert {case.preset.split("-")[0] for case in CASES} == {"pro", "lite", "image"}
    assert all(planned(case).fits for case in CASES)

"""Predicted peaks of the device are those that the stages themselves allocate, within a tenth."""

from __future__ import annotations

import dataclasses

import pytest

from kandinsky5.bench.plan_peaks import (
    CASES,
    WITHIN,
    PeakCase,
    bare_bytes,
    count,
    counted_bytes,
    largest_error,
    planned,
)
from kandinsky5.memory.plan import MemoryPlan, make_plan

FEW = 3
"""Blocks: one more than there are slots."""
SMALL = {"width_px": 384, "height_px": 256}


def denoising(plan: MemoryPlan) -> int:
    """Bytes of the device that it is predicted to take."""
    return bare_bytes(next(item for item in plan.stages if item.name == "denoise"))


@pytest.mark.parametrize(
    "case",
    [
        PeakCase("pro-t2v-5s-sd", 8, 32, "int8", "pinned", 0, blocks=FEW),
        PeakCase("pro-t2v-5s-sd", 24, 64, "bf16", "disk", 0, blocks=FEW),
        PeakCase("image-t2i", 4, 32, "bf16", "pinned", 4, blocks=8),
        PeakCase("image-t2i", 24, 64, "int8", "resident", blocks=FEW),
    ],
    ids=lambda case: f"{case.preset}-{case.weights}-{case.source}",
)
def test_a_plan_predicts_within_a_tenth_what_denoising_takes(case: PeakCase) -> None:
    plan = planned(case)
    assert plan.denoise.source == case.source
    assert denoising(plan) == pytest.approx(counted_bytes(plan), rel=WITHIN)


def test_smaller_chunks_are_predicted_as_well_as_large_ones() -> None:
    case = PeakCase("pro-t2v-5s-sd", 24, 64, "bf16", "pinned", 0, blocks=FEW, **SMALL)
    plan = planned(case)
    choices = dataclasses.replace(plan.job.choices, chunk_tokens=2048, chunk_heads=16)
    smaller = make_plan(dataclasses.replace(plan.job, choices=choices), plan.budget)
    assert denoising(smaller) < denoising(plan)
    assert denoising(smaller) == pytest.approx(counted_bytes(smaller), rel=WITHIN)


def test_a_row_of_the_benchmark_tells_of_denoising_and_decoding() -> None:
    row = count(PeakCase("lite-t2v-5s-sft", 4, 32, "bf16", "pinned", 2, blocks=5, **SMALL))
    assert set(row["stages"]) == {"denoise", "decode"}
    assert largest_error(row) <= WITHIN, row["stages"]


def test_the_benchmark_has_every_member_that_makes_video_or_pictures() -> None:
    assert {case.preset.split("-")[0] for case in CASES} == {"pro", "lite", "image"}
    assert all(planned(case).fits for case in CASES)

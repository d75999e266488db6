"""A plan whose weights have no right or fast path: another format, a slower way, or a refusal, and said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from demo_runs import quick, ran

from int8 import backends, check
from kandinsky5.errors import OutOfMemory, UserError
from kandinsky5.memory.budget import Budget
from kandinsky5.memory.demand import PlanChoices, PlanRequest
from kandinsky5.memory.plan import MemoryPlan, make_plan
from kandinsky5.model.fast_weights import WeightsPath
from kandinsky5.pipeline import trusted_weights
from kandinsky5.pipeline.planning import plan_of, planned, settings_to_go_on
from kandinsky5.pipeline.trusted_weights import with_trusted_weights
from kandinsky5.request import GenerationRequest, settle

CARD = torch.device("cuda", 0)
WRONG = "int8 by triton on cuda:0: the product is off"
BY_INT_MM, BY_NOTHING = WeightsPath("int_mm", WRONG), WeightsPath(None, WRONG)
AMPLE, TIGHT = (8.0, 24.0), (3.3, 12.0)
"""(VRAM, RAM) in GB where auto takes int8: bf16 fits too, or it does not."""


def plan(size: tuple[float, float], **values: object) -> MemoryPlan:
    request, _ = settle(
        GenerationRequest(preset="pro-t2v-5s-sd", prompt="a kite", width=768, height=512)
    )
    choices = PlanChoices(weights=values.pop("weights", None))
    return make_plan(PlanRequest.of(request, choices=choices, **values), Budget.of_gb(*size))


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Callable[[WeightsPath], list[str]]:
    """Has the self-test find this; gives what was tested."""
    tested: list[str] = []

    def finds(found: WeightsPath) -> list[str]:
        monkeypatch.setattr(
            trusted_weights, "weights_path", lambda weights, device: tested.append(weights) or found
        )
        return tested

    return finds


def test_floats_are_never_tested(path) -> None:
    tested = path(BY_NOTHING)
    whole = plan((48.0, 64.0))
    assert whole.denoise.weights == "bf16" and with_trusted_weights(whole, CARD) is whole
    assert tested == []


def test_a_format_that_passes_is_kept(path) -> None:
    tested = path(WeightsPath("triton"))
    small = plan(AMPLE)
    assert small.denoise.weights == "int8" and with_trusted_weights(small, CARD) is small
    assert tested == ["int8"]


@pytest.mark.parametrize("found", [BY_INT_MM, BY_NOTHING])
def test_auto_chooses_again_without_a_format_that_fails(path, found) -> None:
    path(found)
    small = plan(AMPLE)
    small = dataclasses.replace(small, notices=(*small.notices, "said of the text encoder"))
    other = with_trusted_weights(small, CARD)
    assert other.denoise.weights == "bf16" and other.fits
    assert "said of the text encoder" in other.notices
    assert other.peak_vram_bytes <= other.budget.vram_bytes
    assert other.notices[-1] == f"int8 weights are not chosen: {WRONG}"


def test_a_file_stored_in_a_format_that_fails_is_read_as_bf16(path) -> None:
    path(BY_INT_MM)
    other = with_trusted_weights(plan(AMPLE, file_weights="int8"), CARD)
    assert other.denoise.weights == "bf16" and other.notices[-1].endswith(WRONG)


@pytest.mark.parametrize("stored", ["bf16", "int8"])
def test_where_nothing_else_fits_a_slower_way_is_taken_and_said(path, stored) -> None:
    path(BY_INT_MM)
    tight = plan(TIGHT, file_weights=stored)
    kept = with_trusted_weights(tight, CARD)
    assert kept.denoise == tight.denoise and kept.denoise.weights == "int8"
    assert kept.notices[-1].startswith("int8 weights are computed another way (int_mm), slower")
    path(BY_NOTHING)
    with pytest.raises(OutOfMemory, match="without int8 weights this job does not fit"):
        with_trusted_weights(tight, CARD)


def test_what_was_asked_for_runs_another_way_and_it_is_said(path) -> None:
    path(BY_INT_MM)
    asked = plan(AMPLE, weights="int8")
    kept = with_trusted_weights(asked, CARD)
    assert kept.denoise == asked.denoise
    assert kept.notices[-1] == (f"int8 weights are computed another way (int_mm), slower: {WRONG}")


def test_what_was_asked_for_and_has_no_way_is_refused_with_what_works(path) -> None:
    path(BY_NOTHING)
    with pytest.raises(UserError, match="bf16 works here; int8 by triton") as refusal:
        with_trusted_weights(plan(AMPLE, weights="int8"), CARD)
    assert refusal.value.field == "weights" and refusal.value.exit_code == 2


def test_a_device_without_a_fast_way_is_said_and_the_plan_kept(path) -> None:
    path(WeightsPath("torch", lacking="this card has no int8 tensor cores"))
    asked = plan(AMPLE, weights="int8")
    kept = with_trusted_weights(asked, CARD)
    assert kept.denoise == asked.denoise
    assert kept.notices[-1] == "int8 weights are slow here: this card has no int8 tensor cores"


def test_no_memory_for_the_test_is_told_as_such(monkeypatch) -> None:
    def no_room(weights: str, device: torch.device) -> WeightsPath:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trusted_weights, "weights_path", no_room)
    with pytest.raises(OutOfMemory, match="during the self-test of int8"):
        with_trusted_weights(plan(AMPLE), CARD)


def test_a_job_in_int8_runs_where_the_first_choice_of_arithmetic_fails(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(backends, "_distrusted", set())
    for module in (check, backends):
        monkeypatch.setattr(module, "backends_for", lambda device: ("int_mm", "torch"))
    right = check.problem_of
    monkeypatch.setattr(
        check,
        "problem_of",
        lambda backend, device: "int_mm: off" if backend == "int_mm" else right(backend, device),
    )
    check.examine.cache_clear()
    try:
        run = ran(tmp_path, quick(weights="int8", steps=1))
    finally:
        check.examine.cache_clear()
    assert "int8 weights are computed another way (torch), slower: int_mm: off" in run.notices
    assert run.result is not None and backends._distrusted == {("int_mm", "cpu", 0)}


def of_before(before: dict[str, object] | None, **values: object) -> MemoryPlan:
    """The plan of a run on the CPU that is gone on with."""
    request, _ = settle(quick(width=64, height=64, **values))
    dtype = torch.float32
    return plan_of(request, None, "bf16", device=torch.device("cpu"), dtype=dtype, before=before)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_a_resumed_run_keeps_the_format_it_was_begun_in(weights) -> None:
    begun = of_before(None, weights=weights)
    saved = settings_to_go_on(begun, is_lowered=False)
    assert saved["weights"] == weights
    assert of_before(saved).denoise.weights == weights


@pytest.mark.parametrize("said", ["bf16", "fp32"])
def test_a_run_in_float32_goes_on_in_float32(said) -> None:
    begun = of_before(None)
    assert begun.denoise.weights == "fp32"
    saved = {**settings_to_go_on(begun, is_lowered=False), "weights": said}
    assert of_before(saved).denoise.weights == "fp32"


def test_a_run_that_ran_out_of_memory_goes_on_with_no_more_blocks_resident_than_then() -> None:
    whole = plan((96.0, 128.0))
    most = whole.denoise.resident_blocks
    assert planned(whole, CARD) is whole
    assert planned(whole, CARD, settings_to_go_on(whole, is_lowered=True)) is whole
    for before in (7, 0):
        smaller = planned(whole, CARD, {"most_resident_blocks": before})
        assert smaller.denoise.resident_blocks <= before < most
        assert f"no more than {before} blocks stay" in smaller.notices[-1]
    for nonsense in (None, "all", -3.5, True):
        assert planned(whole, CARD, {"most_resident_blocks": nonsense}) is whole

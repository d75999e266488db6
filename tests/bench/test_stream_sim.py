"""The simulated schedules keep A3, and a machine that cannot is not said to."""

from __future__ import annotations

import json

import pytest

from kandinsky5.bench.stream_sim import CASES, Case, case_row, stream_sim
from kandinsky5.errors import UserError


def test_a3_is_reached() -> None:
    document = stream_sim(steps=3, schedules=20)
    assert document["reached"] == {"A3": True}
    assert document["random"] == {"schedules": 20, "violations": []}
    assert json.loads(json.dumps(document))["benchmark"] == "stream-sim"


@pytest.mark.parametrize("case", [case for case in CASES if case.model == "pro"])
def test_streaming_pro_is_free_even_from_a_fast_disk(case: Case) -> None:
    assert case_row(case, steps=3, slots=2, resident=0, seed=0)["stall_share"] <= 0.01


def test_one_slot_is_seen_to_stall() -> None:
    row = case_row(CASES[1], steps=3, slots=1, resident=0, seed=0)
    assert row["stall_share"] > 0.01 and not row["holds"]


def test_measured_times_make_a_case_of_their_own() -> None:
    document = stream_sim(steps=2, schedules=0, compute_ms=30.0, link_gb_s=12.0)
    assert document["cases"][-1]["case"] == "as given"
    assert document["cases"][-1]["copy_ms"] == pytest.approx(22.46, abs=0.01)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"slots": 0}, {"link_gb_s": 0.0}])
def test_numbers_that_cannot_be_are_refused(wrong) -> None:
    with pytest.raises(UserError):
        stream_sim(**wrong)

"""The counted bytes are those the targets state (A1, A2, A4)."""

from __future__ import annotations

import json

import pytest

from kandinsky5.bench.stream_bytes import (
    EXPECTED_MB,
    block_row,
    cached_row,
    step_row,
    stream_bytes,
)
from kandinsky5.errors import UserError


@pytest.mark.parametrize(("model", "weights"), EXPECTED_MB)
def test_a_block_weighs_what_the_published_shapes_say(model: str, weights: str) -> None:
    assert block_row(model, weights)["as_expected"]


def test_a_guided_step_of_pro_in_int8_moves_each_block_once_for_both_evaluations() -> None:
    row = step_row("pro", "int8", slots=2, resident=0, steps=3)
    assert row["loads"] == 60 and row["evaluations"] == 2
    assert row["schedule_h2d_bytes"] == 3 * row["h2d_bytes"] <= 3 * 16.2e9
    assert row["d2h_bytes"] == 0 and row["modulation_bytes"] == 0


def test_a_cached_schedule_moves_each_block_once_a_step_that_computes() -> None:
    row = cached_row("pro", "int8", slots=2, resident=0)
    assert (row["skipped"], row["evaluations"]) == (52, 100)
    assert (
        24 <= row["steps_computed"] < 50
    )  # both evaluations of a step need not be skipped together
    assert row["h2d_bytes"] <= row["steps_computed"] * 16.2e9 and row["d2h_bytes"] == 0


def test_resident_blocks_are_not_moved() -> None:
    row = step_row("lite", "bf16", slots=2, resident=10, steps=2)
    assert row["loads"] == 32 - 10


def test_the_benchmark_reaches_its_targets_and_is_one_json_document() -> None:
    document = stream_bytes(steps=2)
    assert document["reached"] == {"A1": True, "A2": True, "A4": True, "A11": True}
    assert json.loads(json.dumps(document))["benchmark"] == "stream-bytes"


@pytest.mark.parametrize("wrong", [{"slots": 0}, {"resident": -1}, {"steps": 1}])
def test_numbers_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="at least"):
        stream_bytes(**wrong)

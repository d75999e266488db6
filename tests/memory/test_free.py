"""What counts as free when the user gives no budget."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kandinsky5.errors import UserError
from kandinsky5.memory import free
from kandinsky5.memory.budget import GB
from kandinsky5.request import GenerationRequest


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 GB, 20 of them free, 30 in this process; a card with 6 GB free."""
    monkeypatch.setattr(free, "memory_bytes", lambda: (64 * GB, 20 * GB))
    monkeypatch.setattr(free, "own_bytes", lambda: 30 * GB)
    monkeypatch.setattr(free, "_card", lambda device: (6 * GB, 24 * GB))


def test_models_that_wait_in_this_process_are_no_loss_to_the_next_job() -> None:
    budget, notes = free.budget_for(GenerationRequest(prompt="x"))
    assert (budget.ram_bytes, budget.vram_bytes) == (50 * GB, 6 * GB)
    assert any("50.0 GB that are free" in note for note in notes)


def test_what_was_asked_for_is_obeyed_whatever_is_free() -> None:
    budget, notes = free.budget_for(GenerationRequest(prompt="x", vram=8, ram=12))
    assert (budget.ram_bytes, budget.vram_bytes, notes) == (12 * GB, 8 * GB, ())


def test_a_budget_beyond_the_card_is_told_where_torch_is_there_to_ask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", object())
    budget, _ = free.budget_for(GenerationRequest(prompt="x", vram=80))
    assert "80.0 GB of VRAM is more than this machine has (24.0 GB)" in " ".join(budget.notices)
    on_cpu = GenerationRequest(prompt="x", vram=80, device="cpu")
    assert free.budget_for(on_cpu)[0].notices == ()
    monkeypatch.delitem(sys.modules, "torch")
    assert free.budget_for(GenerationRequest(prompt="x", vram=80))[0].notices == ()


def test_a_budget_beyond_the_machine_is_told() -> None:
    budget, _ = free.budget_for(GenerationRequest(prompt="x", ram=128))
    assert "more than this machine has (64.0 GB)" in " ".join(budget.notices)


@pytest.mark.parametrize("name", ["vram", "ram"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), 10**9])
def test_budgets_that_cannot_be_are_refused_in_one_line(name: str, value: float) -> None:
    with pytest.raises(UserError) as refusal:
        free.budget_for(GenerationRequest.from_dict({"prompt": "x", name: value}))
    assert name in str(refusal.value) and "\n" not in str(refusal.value)
    assert refusal.value.exit_code == 2


def test_what_a_process_holds_is_measured() -> None:
    """In a fresh one: here whatever an earlier test freed may come between."""
    program = """
import numpy as np
from kandinsky5.memory.free import own_bytes
before = own_bytes()
block = np.ones(200_000_000, np.uint8)
print((own_bytes() - before) / block.nbytes)
"""
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert 0.75 < float(told.stdout) < 1.25

"""States are saved when it is time, and the newest are kept."""

from __future__ import annotations

import os

import pytest
import torch

from kandinsky5.output import atomic
from kandinsky5.output.atomic import DiskFull
from kandinsky5.output.autosave import Autosave, StateKeeper
from kandinsky5.output.run_state import RunState, SavedText, load_run_state
from kandinsky5.request import GenerationRequest, settle

STEPS = 10


def run(step: int = 1) -> RunState:
    asked = GenerationRequest(prompt="a red circle", seed=3, steps=STEPS, guidance=1.0)
    text = SavedText(torch.ones(2, 8), torch.ones(4))
    times = torch.linspace(1, 0, STEPS + 1)
    return RunState(settle(asked)[0], step, times, torch.ones(7, 8, 8, 16), text)


def steps_saved(autosave: Autosave, now: list[float], step_s: float, steps: int) -> list[int]:
    saved = []
    for step in range(1, steps + 1):
        now[0] += step_s
        if autosave.is_due(step):
            autosave.saved(step)
            saved.append(step)
    return saved


@pytest.mark.parametrize(
    ("every", "step_s", "expected"),
    [
        ({}, 60.0, [5, 10]),
        ({}, 400.0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ({}, 1.0, []),
        ({"every_minutes": 2}, 60.0, [2, 4, 6, 8, 10]),
        ({"every_minutes": None, "every_steps": 4}, 1.0, [4, 8]),
        ({"every_minutes": 3, "every_steps": 2}, 60.0, [2, 4, 6, 8, 10]),
        ({"every_minutes": None}, 1e6, []),
    ],
)
def test_states_are_due_by_time_and_by_steps(every, step_s, expected):
    now = [1000.0]
    autosave = Autosave(clock=lambda: now[0], **every)
    assert steps_saved(autosave, now, step_s, 10) == expected


@pytest.mark.parametrize("every", [{"every_minutes": 0}, {"every_steps": 0}])
def test_a_pace_that_means_nothing_is_refused(every):
    with pytest.raises(ValueError):
        Autosave(**every)


def test_the_newest_two_are_kept(tmp_path):
    keeper = StateKeeper(tmp_path / "job")
    assert keeper.newest() is None
    for step in (1, 2, 4):
        keeper.save(run(step=step))
    assert sorted(os.listdir(tmp_path / "job")) == [
        "step-00002.safetensors",
        "step-00004.safetensors",
    ]
    newest = keeper.newest()
    assert newest is not None and load_run_state(newest).step == 4


def test_a_single_one_can_be_kept(tmp_path):
    keeper = StateKeeper(tmp_path, keep=1)
    for step in (1, 2):
        keeper.save(run(step=step))
    assert os.listdir(tmp_path) == ["step-00002.safetensors"]


def test_a_full_disk_drops_no_state_and_is_not_asked_again_at_every_step(tmp_path, monkeypatch):
    now = [0.0]
    keeper = StateKeeper(tmp_path, autosave=Autosave(clock=lambda: now[0]))
    keeper.save(run(step=1))
    keeper.save(run(step=2))
    now[0] = 600.0
    monkeypatch.setattr(atomic, "free_bytes", lambda folder: 10)
    with pytest.raises(DiskFull):
        keeper.save(run(step=3))
    assert len(os.listdir(tmp_path)) == 2
    assert not keeper.is_due(4)


def test_a_finished_run_leaves_nothing_and_other_files_stay(tmp_path):
    keeper = StateKeeper(tmp_path / "job")
    keeper.discard()
    keeper.save(run())
    (tmp_path / "job" / ".k1-0123456789abcdef.part").write_bytes(b"half")
    keeper.discard()
    assert os.listdir(tmp_path) == []
    keeper.save(run())
    (tmp_path / "job" / "notes.txt").write_bytes(b"the user's")
    keeper.discard()
    assert os.listdir(tmp_path / "job") == ["notes.txt"]


def test_a_stop_can_be_asked_to_leave_a_state(tmp_path):
    keeper = StateKeeper(tmp_path)
    assert not keeper.save_on_stop
    keeper.ask_to_save_on_stop()
    assert keeper.save_on_stop

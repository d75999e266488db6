"""``resume`` and ``decode``: what they hand to the pipeline, and what is said when a run ends early."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kandinsky5 import resume_command
from kandinsky5.errors import Stopped, UserError
from kandinsky5.events import ignore
from kandinsky5.output.run_state import RunState, SavedText, save_run_state
from kandinsky5.output.state import save_latents
from kandinsky5.request import GenerationRequest, settle

STEPS = 4


def settled() -> GenerationRequest:
    asked = GenerationRequest(prompt="a red circle", seed=3, steps=STEPS, guidance=1.0)
    return settle(asked)[0]


def a_state() -> RunState:
    text = SavedText(torch.ones(2, 8), torch.ones(4))
    times = torch.linspace(1, 0, STEPS + 1)
    return RunState(settled(), 2, times, torch.ones(7, 8, 8, 16), text)


@pytest.fixture
def calls(monkeypatch) -> list[SimpleNamespace]:
    """What the pipeline was asked; it saves a state and is stopped when told so."""
    asked: list[SimpleNamespace] = []

    class Pipeline:
        def __init__(self, *, models_dirs) -> None:
            self.models_dirs = models_dirs

        def resume(self, path, *, out, emit, should_stop, states, **where):
            asked.append(SimpleNamespace(name="resume", path=path, out=out, states=states, **where))
            assert states.save_on_stop
            states.save(a_state())
            if should_stop():
                raise Stopped("stopped")
            return "the result"

        def decode(self, path, *, out, emit, should_stop):
            asked.append(SimpleNamespace(name="decode", path=path, out=out))
            return "the result"

    module = SimpleNamespace(Pipeline=Pipeline)
    monkeypatch.setitem(sys.modules, "kandinsky5.pipeline.pipeline", module)
    return asked


def typed(tmp_path: Path, *words: str, command: str = "resume") -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    getattr(resume_command, f"{command}_options")(parser)
    arguments = parser.parse_args(words)
    arguments.outdir, arguments.state_dir = tmp_path / "outputs", tmp_path / "state"
    arguments.models_dirs = []
    return arguments


def resumed(arguments: argparse.Namespace, told: list[str], *, stop: bool = False) -> object:
    return resume_command.resume(arguments, emit=ignore, should_stop=lambda: stop, tell=told.append)


def test_a_resumed_run_gets_a_new_name_says_what_it_is_and_leaves_no_state(tmp_path, calls):
    path = save_run_state(tmp_path / "run.safetensors", a_state())
    told: list[str] = []
    assert resumed(typed(tmp_path, str(path)), told) == "the result"
    (call,) = calls
    assert call.path == path and call.out.parent == tmp_path / "outputs"
    assert call.out.name.endswith("_demo-t2v_3.mp4")
    assert len(told) == 1 and "a red circle" in told[0] and "step 2 of 4" in told[0]
    assert os.listdir(tmp_path / "state" / "states") == []
    assert path.exists()


def test_the_file_that_was_asked_for_is_written(tmp_path, calls):
    path = save_run_state(tmp_path / "run.safetensors", a_state())
    resumed(typed(tmp_path, str(path), "--out", str(tmp_path / "x.mp4")), [])
    assert calls[0].out == tmp_path / "x.mp4"


def test_a_run_that_is_stopped_again_says_how_to_go_on(tmp_path, calls):
    path = save_run_state(tmp_path / "run.safetensors", a_state())
    told: list[str] = []
    with pytest.raises(Stopped):
        resumed(typed(tmp_path, str(path)), told, stop=True)
    newest = calls[0].states.newest()
    assert told[-1].endswith(f"k1.py resume {newest}") and newest.exists()


def test_only_a_state_of_one_s_own_says_where_latents_are_kept(tmp_path, calls):
    request = dataclasses.replace(settled(), save_latents="/home/somebody/.bashrc")
    state = dataclasses.replace(a_state(), request=request)
    given = save_run_state(tmp_path / "given.safetensors", state)
    own = save_run_state(tmp_path / "state" / "states" / "run-1" / "step-00002.safetensors", state)
    link = tmp_path / "state" / "states" / "link.safetensors"
    link.symlink_to(given)
    told: list[str] = []
    for path in (given, link, own):
        resumed(typed(tmp_path, str(path)), told)
    assert [call.keep_paths for call in calls] == [False, False, True]
    assert [call.save_latents for call in calls] == [None] * 3
    assert sum("--save-latents" in line for line in told) == 2
    resumed(typed(tmp_path, str(given), "--save-latents", str(tmp_path / "l")), told)
    assert calls[-1].save_latents == tmp_path / "l"


def test_a_state_of_one_s_own_goes_once_its_run_is_done(tmp_path, calls):
    folder = tmp_path / "state" / "states" / "run-1"
    path = save_run_state(folder / "step-00002.safetensors", a_state())
    with pytest.raises(Stopped):
        resumed(typed(tmp_path, str(path)), [], stop=True)
    assert path.exists()
    resumed(typed(tmp_path, str(path)), [])
    assert not folder.exists()


@pytest.mark.parametrize("words", [("--save-every-minutes", "0"), ("--save-every-steps", "1.5")])
def test_a_pace_of_saving_that_means_nothing_is_refused(tmp_path, words):
    with pytest.raises(UserError, match="above 0"):
        typed(tmp_path, "run.safetensors", *words)


def test_a_run_is_saved_as_often_as_was_asked(tmp_path, calls):
    path = save_run_state(tmp_path / "run.safetensors", a_state())
    resumed(typed(tmp_path, str(path), "--save-every-steps", "3"), [])
    assert [calls[0].states.is_due(step) for step in (4, 5)] == [False, True]  # after step 2


def test_a_file_that_is_no_state_is_refused_before_anything_is_loaded(tmp_path, calls):
    (tmp_path / "video.mp4").write_bytes(b"no state")
    with pytest.raises(UserError, match="file"):
        resumed(typed(tmp_path, str(tmp_path / "video.mp4")), [])
    assert calls == [] and not (tmp_path / "outputs").exists()


def test_latents_are_decoded_under_a_new_name(tmp_path, calls):
    save_latents(tmp_path / "a.safetensors", torch.ones(7, 8, 8, 16), settled())
    arguments = typed(tmp_path, str(tmp_path / "a.safetensors"), command="decode")
    assert resume_command.decode(arguments, emit=ignore, should_stop=lambda: False) == "the result"
    assert calls[0].name == "decode" and calls[0].out.name.endswith("_demo-t2v_3.mp4")


def test_a_state_behind_its_last_step_is_decoded_under_a_new_name(tmp_path, calls):
    state = save_run_state(tmp_path / "run.safetensors", dataclasses.replace(a_state(), step=STEPS))
    arguments = typed(tmp_path, str(state), command="decode")
    assert resume_command.decode(arguments, emit=ignore, should_stop=lambda: False) == "the result"
    assert calls[0].name == "decode" and calls[0].out.name.endswith("_demo-t2v_3.mp4")


def test_latents_of_unknown_origin_and_unfinished_runs_are_not_decoded(tmp_path, calls):
    import safetensors.torch

    noise = tmp_path / "noise.safetensors"
    safetensors.torch.save_file({"latents": torch.ones(1, 2, 2, 16)}, noise)
    state = save_run_state(tmp_path / "run.safetensors", a_state())
    no_file = tmp_path / "video.mp4"
    no_file.write_bytes(b"neither")
    for path, reason in (
        (noise, "do not say of what model"),
        (state, "2 of 4 steps left: resume it"),
        (no_file, "give a file that --save-latents wrote"),
    ):
        with pytest.raises(UserError, match=reason):
            resume_command.decode(
                typed(tmp_path, str(path), command="decode"),
                emit=ignore,
                should_stop=lambda: False,
            )
    assert calls == []


def test_in_what_it_goes_on_can_be_said_and_is_told(tmp_path, calls) -> None:
    told: list[str] = []
    words = ["--attention", "sdpa", "--dtype", "fp32"]
    path = save_run_state(tmp_path / "s.safetensors", a_state())
    resumed(typed(tmp_path, str(path), *words), told)
    assert calls[-1].otherwise == {"attention": "sdpa", "dtype": "fp32"}
    assert any("attention sdpa, dtype fp32: not to the bit" in line for line in told)

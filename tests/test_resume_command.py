"""``resume`` and ``decode``: what they hand to the pipeline, and what is said when a run ends early."""

from __future__ import annotations

import argparse
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

        def resume(self, path, *, out, emit, should_stop, states):
            asked.append(SimpleNamespace(name="resume", path=path, out=out, states=states))
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


def test_latents_of_unknown_origin_and_unfinished_runs_are_not_decoded(tmp_path, calls):
    import safetensors.torch

    noise = tmp_path / "noise.safetensors"
    safetensors.torch.save_file({"latents": torch.ones(1, 2, 2, 16)}, noise)
    state = save_run_state(tmp_path / "run.safetensors", a_state())
    for path, reason in ((noise, "do not say of what model"), (state, "not the one named")):
        with pytest.raises(UserError, match=reason):
            resume_command.decode(
                typed(tmp_path, str(path), command="decode"),
                emit=ignore,
                should_stop=lambda: False,
            )
    assert calls == []

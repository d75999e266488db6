"""A run that the user ends early: what is there is decoded, and the run can still be gone on with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from demo_runs import keeper, picture_request, quick, ran, video_of

from kandinsky5.errors import Stopped
from kandinsky5.events import StageStarted, StepDone
from kandinsky5.output.metadata import read_metadata, readable
from kandinsky5.output.run_state import load_run_state
from kandinsky5.output.state import save_latents
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.pipeline.steps import Steps
from kandinsky5.request import GenerationResult

STEPS, LAST = 4, 2


@pytest.fixture(scope="module")
def warm() -> Pipeline:
    return Pipeline()


class Impatient:
    """Wants no further step after :data:`LAST`; stops the decode when told so."""

    def __init__(self, *, stops_decode: bool = False) -> None:
        self.step, self.stage, self._stops_decode = 0, "", stops_decode

    def emit(self, event: object) -> None:
        if isinstance(event, StepDone):
            self.step = event.step
        elif isinstance(event, StageStarted):
            self.stage = event.stage

    def finishes(self) -> bool:
        return self.step >= LAST

    def stops(self) -> bool:
        return self._stops_decode and self.stage == "decode"


def ended_early(
    pipeline: Pipeline, folder: Path, mode: str, user: Impatient
) -> Callable[[], GenerationResult]:
    request = quick() if mode == "t2v" else picture_request(folder)
    return lambda: pipeline.run(
        request,
        out=folder / "early.mp4",
        emit=user.emit,
        should_stop=user.stops,
        should_finish=user.finishes,
        states=keeper(folder / "states"),
    )


@pytest.mark.parametrize("mode", ["t2v", "i2v"])
def test_the_result_is_the_estimate_of_the_last_step_and_the_run_goes_on_from_there(
    tmp_path, warm, mode, monkeypatch
) -> None:
    estimates = []
    of_state = Steps._clean
    monkeypatch.setattr(
        Steps, "_clean", lambda *given: estimates.append(of_state(*given)) or estimates[-1]
    )
    result = ended_early(warm, tmp_path, mode, Impatient())()
    assert (result.steps_run, result.evaluations_run) == (LAST, 2 * LAST)
    assert any(f"stopped at step {LAST} of {STEPS}" in text for text in result.notices)

    described = read_metadata(tmp_path / "early.mp4")
    assert (described["stopped_at_step"], described["request"]["steps"]) == (LAST, STEPS)
    assert f"Stopped at step: {LAST}" in readable(described)

    path = keeper(tmp_path / "states").newest()
    state = load_run_state(path)
    assert state.step == LAST
    if mode == "i2v":
        assert torch.equal(estimates[0][:1], state.first_frame)
    else:  # what is on the disk is what a decode of that estimate alone gives
        save_latents(tmp_path / "estimate.safetensors", estimates[0], state.request)
        warm.decode(tmp_path / "estimate.safetensors", out=tmp_path / "again.mp4")
        assert video_of(tmp_path / "again.mp4") == video_of(tmp_path / "early.mp4")

    unbroken = ran(tmp_path / "whole", state.request, pipeline=warm)
    assert video_of(tmp_path / "early.mp4") != video_of(unbroken.folder / "out.mp4")
    warm.resume(path, out=tmp_path / "whole.mp4")
    assert video_of(tmp_path / "whole.mp4") == video_of(unbroken.folder / "out.mp4")


def test_a_stop_while_that_is_decoded_leaves_the_state_and_no_file(tmp_path, warm) -> None:
    with pytest.raises(Stopped, match="while decoding"):
        ended_early(warm, tmp_path, "t2v", Impatient(stops_decode=True))()
    assert not (tmp_path / "early.mp4").exists()
    assert load_run_state(keeper(tmp_path / "states").newest()).step == LAST


def test_whoever_wants_it_early_from_the_start_gets_one_step(tmp_path, warm) -> None:
    user = Impatient()
    user.finishes = lambda: True
    assert ended_early(warm, tmp_path, "t2v", user)().steps_run == 1

"""A pipeline without models, importable in a spawned worker; the prompt says what it does.

Each run says its process id in a notice.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kandinsky5.errors import OutOfMemory, Stopped, UserError
from kandinsky5.events import (
    EventSink,
    Notice,
    PreviewReady,
    PromptExpanded,
    ReadingFile,
    StageStarted,
    StateSaved,
    StepDone,
)
from kandinsky5.output.autosave import StateKeeper
from kandinsky5.pipeline.expanded_prompt import ExpandedPrompt
from kandinsky5.pipeline.preview_pace import PreviewEvery
from kandinsky5.request import GenerationRequest, GenerationResult

STEPS = 3
LONGEST_WAIT_S = 60.0


class FakePipeline:
    def __init__(self, *, models_dirs: Sequence[Path] = ()) -> None:
        self.models_dirs = models_dirs
        self.runs = 0

    def run(
        self,
        request: GenerationRequest,
        *,
        out: Path,
        emit: EventSink,
        should_stop: Callable[[], bool],
        should_finish: Callable[[], bool] = lambda: False,
        previews: PreviewEvery | None = None,
        states: StateKeeper | None = None,
        first_step: int = 1,
    ) -> GenerationResult:
        self.runs += 1
        emit(StageStarted("load"))
        _read(request.prompt, emit)
        emit(Notice(f"pid {os.getpid()}"))
        emit(Notice(f"run {self.runs}"))
        emit(Notice(f"device {request.device}"))
        emit(PromptExpanded(f"{request.prompt}, in detail", done=True))
        emit(StageStarted("denoise"))
        done = first_step - 1
        for step in range(first_step, STEPS + 1):
            if should_stop():
                if states is not None and states.save_on_stop:
                    emit(saved(states, request, step - 1))
                raise Stopped(f"stopped before step {step}")
            if "in pieces" in request.prompt and step == 2 and states is not None:
                emit(saved(states, request, 1))
                where = "out of GPU memory during denoise, step 2 of 3"
                raise OutOfMemory(f"{where}; step 1 is kept: resume it", in_pieces=True)
            if should_finish() and step > first_step:
                assert states is not None
                emit(saved(states, request, step - 1))
                emit(StageStarted("decode"))
                if request.prompt == "hold, then for ever":
                    _wait_until(should_stop)
                    raise Stopped("stopped while decoding")
                break
            self._step(request.prompt, step, lambda: should_stop() or should_finish())
            done, left_s = step, 0.5 * (STEPS - step)
            emit(StepDone(step, STEPS, 0.5, left_s, h2d_bytes=1000 * step, stall_s=0.25))
            if previews is not None:
                emit(PreviewReady(step, STEPS, b"picture %d" % step))
            if states is not None and request.prompt.startswith("save"):
                emit(saved(states, request, step))
        emit(StageStarted("save"))
        out.write_bytes(b"a video")
        assert request.seed is not None
        return GenerationResult(
            output=str(out),
            frames=1,
            width=64,
            height=64,
            seed=request.seed,
            steps_run=done,
            evaluations_run=STEPS,
            evaluations_skipped=0,
            seconds={"total": 0.0},
            peak_vram_bytes=0,
            peak_rss_bytes=0,
        )

    def resume(self, path: Path, *, keep_paths: bool, **options: Any) -> GenerationResult:
        assert keep_paths  # the worker's own states
        state = json.loads(path.read_text())
        options["emit"](Notice(f"resumed after step {state['step']}"))
        request = GenerationRequest.from_dict(state["request"])
        return self.run(request, first_step=state["step"] + 1, **options)

    def expand(
        self,
        request: GenerationRequest,
        *,
        out: Path,
        emit: EventSink,
        should_stop: Callable[[], bool],
    ) -> ExpandedPrompt:
        emit(StageStarted("expand"))
        emit(PromptExpanded("in"))
        self._step(request.prompt, 2, should_stop)
        if should_stop():
            raise Stopped("stopped while it wrote")
        emit(PromptExpanded(f"{request.prompt}, in detail", done=True))
        return ExpandedPrompt(f"{request.prompt}, in detail", 0.5, (f"pid {os.getpid()}",))

    def _step(self, prompt: str, step: int, should_stop: Callable[[], bool]) -> None:
        if step != 2:
            return
        task, _, argument = prompt.partition(":")
        if task in ("hold", "save and hold", "hold, then for ever"):
            _wait_until(should_stop)
        elif task == "deaf":
            _wait_until(lambda: False)
        elif task == "wait for":
            _wait_until(Path(argument).exists)
        elif task == "explode":
            raise ValueError("the first line\nthe second line")
        elif task == "refuse":
            raise UserError("image", "cat.png", "a picture")
        elif task == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif task in ("leave", "save and leave"):
            os._exit(7)


def saved(states: StateKeeper, request: GenerationRequest, step: int) -> StateSaved:
    """Write what this pipeline can resume from."""
    states.folder.mkdir(parents=True, exist_ok=True)
    path = states.folder / f"step-{step:05d}.safetensors"
    goes_on = {"always in pieces": "always in pieces", "in pieces, hold": "hold"}
    then = goes_on.get(request.prompt, "on")
    path.write_text(json.dumps({"step": step, "request": {**request.to_dict(), "prompt": then}}))
    return StateSaved(step, STEPS, str(path), time.time())


def _read(prompt: str, emit: EventSink) -> None:
    """``read FILE and SIGNAL``: die of it while reading; ``read FILE, then SIGNAL``: afterwards."""
    if found := re.fullmatch(r"read (\S+?)(,? (?:and|then)) (SIG\w+)", prompt):
        emit(ReadingFile(found[1]))
        if found[2].startswith(","):
            emit(ReadingFile(None))
        os.kill(os.getpid(), signal.Signals[found[3]])


class UnbuildablePipeline:
    def __init__(self, *, models_dirs: Sequence[Path] = ()) -> None:
        raise ImportError("no engine here")


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST_WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("nobody released the fake pipeline")
        time.sleep(0.005)

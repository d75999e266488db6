"""A pipeline without models, importable in a spawned worker; the prompt says what it does.

Each run says its process id in a notice.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kandinsky5.errors import Stopped, UserError
from kandinsky5.events import (
    EventSink,
    Notice,
    PreviewReady,
    PromptExpanded,
    StageStarted,
    StateSaved,
    StepDone,
)
from kandinsky5.output.autosave import StateKeeper
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
        previews: PreviewEvery | None = None,
        states: StateKeeper | None = None,
        first_step: int = 1,
    ) -> GenerationResult:
        self.runs += 1
        emit(StageStarted("load"))
        emit(Notice(f"pid {os.getpid()}"))
        emit(Notice(f"run {self.runs}"))
        emit(Notice(f"device {request.device}"))
        emit(PromptExpanded(f"{request.prompt}, in detail", done=True))
        emit(StageStarted("denoise"))
        for step in range(first_step, STEPS + 1):
            if should_stop():
                if states is not None and states.save_on_stop:
                    emit(saved(states, request, step - 1))
                raise Stopped(f"stopped before step {step}")
            self._step(request.prompt, step, should_stop)
            left_s = 0.5 * (STEPS - step)
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
            steps_run=STEPS,
            evaluations_run=STEPS,
            evaluations_skipped=0,
            seconds={"total": 0.0},
            peak_vram_bytes=0,
            peak_rss_bytes=0,
        )

    def resume(self, path: Path, **options: Any) -> GenerationResult:
        state = json.loads(path.read_text())
        options["emit"](Notice(f"resumed after step {state['step']}"))
        request = GenerationRequest.from_dict(state["request"])
        return self.run(request, first_step=state["step"] + 1, **options)

    def _step(self, prompt: str, step: int, should_stop: Callable[[], bool]) -> None:
        if step != 2:
            return
        task, _, argument = prompt.partition(":")
        if task in ("hold", "save and hold"):
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
    path = states.folder / "state.json"
    path.write_text(json.dumps({"step": step, "request": {**request.to_dict(), "prompt": "on"}}))
    return StateSaved(step, STEPS, str(path), time.time())


class UnbuildablePipeline:
    def __init__(self, *, models_dirs: Sequence[Path] = ()) -> None:
        raise ImportError("no engine here")


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST_WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("nobody released the fake pipeline")
        time.sleep(0.005)

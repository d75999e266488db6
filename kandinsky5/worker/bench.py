"""How soon a warm worker begins: two jobs through a real worker process, timed by its events."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kandinsky5.circumstances import circumstances
from kandinsky5.errors import K1Error
from kandinsky5.events import StageStarted, StepDone
from kandinsky5.request import GenerationRequest
from kandinsky5.worker.handle import WorkerHandle, describe_death
from kandinsky5.worker.protocol import (
    DEFAULT_PIPELINE,
    Event,
    JobEvent,
    JobFailed,
    JobFinished,
    JobStarted,
    RunJob,
    Shutdown,
    WorkerReady,
    WorkerSettings,
)

PROMPTS = ("a red circle moves right", "a blue square moves up on a light background")
TARGET_S = 1.0
LEAVE_S = 10.0


def warm_start(
    *, preset: str = "demo-t2v", steps: int | None = None, pipeline: str = DEFAULT_PIPELINE
) -> dict[str, Any]:
    """Run one job after the other, with other words and another seed.

    Args:
        preset: one that makes a video from text.
        steps: of each job; None takes the preset's.
        pipeline: ``module:name``, as in :class:`~kandinsky5.worker.protocol.WorkerSettings`.

    Returns:
        ``ready_s`` from the worker's start until it waits for jobs; ``first`` and ``second`` with the seconds
        from submit to ``started``, ``denoise`` (the stage begins), ``first_step`` (is done) and ``finished``;
        ``reached`` whether the second began its first step within ``target_s``; and the circumstances.

    Raises:
        UserError: an unknown preset or steps out of range.
        K1Error: a job failed, or the worker died.
    """
    requests = [
        GenerationRequest(preset=preset, prompt=prompt, seed=seed, steps=steps)
        for seed, prompt in enumerate(PROMPTS)
    ]
    with tempfile.TemporaryDirectory(prefix="k1-bench-") as folder:
        began = time.monotonic()
        worker = _Listened(Path(folder), pipeline)
        try:
            worker.until(WorkerReady)
            ready_s = time.monotonic() - began
            first, second = (
                _run(worker, request, Path(folder) / f"{number}.mp4")
                for number, request in enumerate(requests)
            )
        finally:
            worker.end()
    return {
        "benchmark": "warm-start",
        "preset": preset,
        "ready_s": round(ready_s, 3),
        "first": first,
        "second": second,
        "target_s": TARGET_S,
        "reached": second["denoise"] <= TARGET_S,
        **circumstances(),
    }


@dataclass(frozen=True)
class _Heard:
    event: Event
    at_s: float


class _Listened:
    """A worker whose events come with the time at which they were heard."""

    def __init__(self, folder: Path, pipeline: str) -> None:
        self._log_file = str(folder / "worker.log")
        settings = WorkerSettings(
            log_file=self._log_file, parent_pid=os.getpid(), pipeline=pipeline
        )
        self.handle = WorkerHandle(settings)

    def until(self, kind: type[Event]) -> list[_Heard]:
        """What it says up to an event of that kind.

        Raises:
            K1Error: a job failed, or the worker is gone.
        """
        heard: list[_Heard] = []
        while not heard or not isinstance(heard[-1].event, kind):
            try:
                event = self.handle.receive()
            except (EOFError, OSError) as error:
                death = describe_death(self.handle.end(LEAVE_S), self._log_file)
                raise K1Error(death) from error
            if isinstance(event, JobFailed):
                raise K1Error(event.message)
            heard.append(_Heard(event, time.monotonic()))
        return heard

    def end(self) -> None:
        self.handle.send(Shutdown())
        self.handle.end(LEAVE_S)


def _run(worker: _Listened, request: GenerationRequest, out: Path) -> dict[str, float]:
    """Seconds from submit to each moment of one job."""
    submitted = time.monotonic()
    worker.handle.send(RunJob(out.stem, request.to_dict(), str(out)))
    moments: dict[str, float] = {}
    for heard in worker.until(JobFinished):
        if name := _moment(heard.event):
            moments.setdefault(name, round(heard.at_s - submitted, 3))
    return moments


def _moment(event: Event) -> str | None:
    if isinstance(event, JobStarted):
        return "started"
    if isinstance(event, JobFinished):
        return "finished"
    if isinstance(event, JobEvent):
        if event.event == StageStarted("denoise"):
            return "denoise"
        if isinstance(event.event, StepDone):
            return "first_step"
    return None

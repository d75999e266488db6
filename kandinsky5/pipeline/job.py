"""A job as the pipeline carries it out: what it works with, whom it tells, how it goes on in less memory."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from kandinsky5.errors import OutOfMemory
from kandinsky5.events import EventSink, Notice, StageDone, StageStarted
from kandinsky5.memory import meter
from kandinsky5.memory.fragmentation import lies_in_pieces
from kandinsky5.memory.plan import MemoryPlan, lowered
from kandinsky5.memory.residency import MEMORY_ERRORS, is_out_of_memory
from kandinsky5.model.dit import DiTConfig
from kandinsky5.model.files import ModelFiles
from kandinsky5.output.autosave import StateKeeper
from kandinsky5.pipeline.adapters import ChosenLora
from kandinsky5.pipeline.attending import Attending
from kandinsky5.pipeline.planning import changes
from kandinsky5.pipeline.preview_pace import PreviewEvery
from kandinsky5.presets import Preset
from kandinsky5.request import GenerationRequest

TRIES = 3
"""How often a stage is begun before a job gives up for want of memory."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Listeners:
    """Who is told of a job, and who may end it.

    Attributes:
        emit: gets its events.
        should_stop: asked between steps.
        previews: how often pictures of what is being painted are made; None makes none.
        states: keeps the unfinished run on disk; None keeps nothing.
        should_finish: asked between steps: whether to stop there and decode what has been painted.
    """

    emit: EventSink
    should_stop: Callable[[], bool]
    previews: PreviewEvery | None = None
    states: StateKeeper | None = None
    should_finish: Callable[[], bool] = lambda: False


@dataclass(kw_only=True)
class Job:
    """A job under way: its settled request, its plan, its listeners and what it has taken so far.

    Attributes:
        vae: the folder of its VAE.
        checkpoint: the transformer's file, named in the result; None where none takes part.
        expanded_prompt: what the text encoder made of the prompt, once it has; None where it has not.
        out: the final path.
        device, dtype: where and in what is computed.
        to: its listeners.
        place: in which stage, or step of it, it is.
        early_step: the step after which the user wanted no further one, where there was such.
        is_lowered: whether memory ran out and the plan is a smaller one than it began with.
    """

    request: GenerationRequest
    preset: Preset
    plan: MemoryPlan
    vae: Path
    checkpoint: Path | None = None
    expanded_prompt: str | None = None
    out: Path
    device: torch.device
    dtype: torch.dtype
    to: Listeners
    notices: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, meter.Peaks] = field(default_factory=dict)
    evaluations: int = 0
    evaluations_skipped: int = 0
    place: str = ""
    early_step: int | None = None
    is_lowered: bool = False

    @property
    def emit(self) -> EventSink:
        return self.to.emit

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce the stage, measure it, and say where memory ran out if it does."""
        self.place = name
        self.emit(StageStarted(name))
        meter.start_measuring()
        started = time.monotonic()
        try:
            yield
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            kind = "GPU memory" if self.device.type == "cuda" else "memory"
            said = f"out of {kind} during {self.place}"
            raise OutOfMemory(said, in_pieces=lies_in_pieces(error)) from error
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
            self.peaks[name] = meter.peaks().joined(self.peaks.get(name))
        self.emit(StageDone(name, self.seconds[name], **vars(self.peaks[name])))

    def notice(self, text: str) -> None:
        """Tell the user, once: a second try says nothing new."""
        if text not in self.notices:
            self.notices.append(text)
            self.emit(Notice(text))

    def with_less(
        self, stage: str, work: Callable[[], Result], *, progress: Callable[[], int] = lambda: 0
    ) -> Result:
        """Do the work of a stage; when memory runs out, again with the next smaller plan.

        Args:
            stage: for :func:`kandinsky5.memory.plan.lowered`.
            work: goes on from where it was, or does all of it again.
            progress: grows when a try gets further; failures are counted from there.

        Raises:
            OutOfMemory: it ran out :data:`TRIES` times in a row, or there is no smaller plan.
        """
        failures, reached = 0, progress()
        while True:
            try:
                return work()
            except OutOfMemory as error:
                failures, reached = 1 if progress() > reached else failures + 1, progress()
                smaller = lowered(self.plan, stage) if failures < TRIES else None
                if smaller is None:
                    raise
                forget_frames(error)
                self.notice(f"{error}: going on with less ({changes(self.plan, smaller)})")
                self.plan, self.is_lowered = smaller, True


def forget_frames(error: BaseException) -> None:
    """Let go of the tensors that a failure still holds through the frames of its traceback."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


@dataclass(kw_only=True)
class PaintingJob(Job):
    """A job that begins with noise, or goes on from a saved state.

    Attributes:
        files: the parts of its model.
        config: the transformer's dimensions.
        digests: of the files whose weights shape the result from the first step on, as they were when the
            job was accepted: what lies there later may be another file.
        picture: given to begin with.
        attending: what attention is computed with.
        loras: beside its transformer's layers.
    """

    files: ModelFiles
    config: DiTConfig
    digests: Mapping[str, str]
    picture: Image.Image | None = None
    attending: Attending = field(default_factory=Attending)
    loras: tuple[ChosenLora, ...] = ()

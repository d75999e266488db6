"""What a running job tells whoever listens: page, command line and log read the same events.

Only the standard library is needed here. An event sink is any callable that takes one event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STAGES = ("load", "expand", "encode text", "encode image", "prepare", "denoise", "decode")
"""Names of the stages a job passes through, in order; "expand" only when the prompt is rewritten,
"encode image" only when it has a picture."""


@dataclass(frozen=True)
class StageStarted:
    """The job entered a stage of :data:`STAGES`."""

    stage: str


@dataclass(frozen=True)
class StageDone:
    """The job left a stage; a stage that is come to again is told with all it has taken.

    Attributes:
        seconds: of wall time.
        vram_bytes, rss_bytes: most device and main memory in use.
        h2d_bytes, d2h_bytes: copied to the device and from it.
        stall_s: how long computing waited for weights.
    """

    stage: str
    seconds: float
    vram_bytes: int = 0
    rss_bytes: int = 0
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    stall_s: float = 0.0


@dataclass(frozen=True)
class StepDone:
    """One step of the schedule is done.

    Attributes:
        step: steps done so far, 1 … total.
        seconds_per_step: mean over this run.
        eta_s: seconds until the last step is done.
        h2d_bytes: of weights copied to the device in this step.
        d2h_bytes: of results copied back in this step; weights never are.
        peak_vram_bytes: most device memory in use since the loop began.
        stall_s: how long computing waited for weights in this step.
        evaluations_run, evaluations_skipped: in this step, by the step cache.
    """

    step: int
    total: int
    seconds_per_step: float
    eta_s: float
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    peak_vram_bytes: int = 0
    stall_s: float = 0.0
    evaluations_run: int = 0
    evaluations_skipped: int = 0


@dataclass(frozen=True)
class Notice:
    """Something the user should know that is not an error: a size snapped, a fallback taken."""

    text: str


@dataclass(frozen=True)
class PreviewReady:
    """A picture of the clean estimate after a step.

    Attributes:
        step: steps done, 1 … total.
        webp: animated WebP of all frames at reduced size.
    """

    step: int
    total: int
    webp: bytes


@dataclass(frozen=True)
class StateSaved:
    """The run can be resumed from this file.

    Attributes:
        step: steps done, 0 … total.
        path: absolute.
        saved_at: unix seconds.
    """

    step: int
    total: int
    path: str
    saved_at: float


@dataclass(frozen=True)
class ReadingFile:
    """A file of the user's is being read: if the process dies now, that file is the likely cause.

    Attributes:
        path: file or folder; None once it is read.
    """

    path: str | None


@dataclass(frozen=True)
class PromptExpanded:
    """The prompt as the text encoder rewrites it.

    Attributes:
        text: as far as it has come; the last one is what is encoded, the user's own prompt where the
            answer was of no use.
        done: whether this is the last one.
    """

    text: str
    done: bool = False


PipelineEvent = (
    StageStarted
    | StageDone
    | StepDone
    | Notice
    | PreviewReady
    | StateSaved
    | ReadingFile
    | PromptExpanded
)
EventSink = Callable[[PipelineEvent], None]


@contextmanager
def reading(emit: EventSink, path: object) -> Iterator[None]:
    """Say which file is read while the block runs; after a crash in it that is the last word."""
    emit(ReadingFile(str(path)))
    try:
        yield
    finally:
        emit(ReadingFile(None))


def ignore(event: PipelineEvent) -> None:
    """A sink for those who do not listen."""

"""What a running job tells whoever listens: page, command line and log read the same events.

Only the standard library is needed here. An event sink is any callable that takes one event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

STAGES = ("load", "expand", "encode text", "encode image", "prepare", "denoise", "decode")
"""Names of the stages a job passes through, in order; "expand" only when the prompt is rewritten,
"encode image" only when it has a picture."""


@dataclass(frozen=True)
class StageStarted:
    """The job entered a stage of :data:`STAGES`."""

    stage: str


@dataclass(frozen=True)
class StepDone:
    """One step of the schedule is done.

    Attributes:
        step: steps done so far, 1 … total.
        seconds_per_step: mean over this run.
        eta_s: seconds until the last step is done.
        h2d_bytes: of weights copied to the device in this step.
        stall_s: how long computing waited for weights in this step.
        evaluations_run, evaluations_skipped: in this step, by the step cache.
    """

    step: int
    total: int
    seconds_per_step: float
    eta_s: float
    h2d_bytes: int = 0
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
class PromptExpanded:
    """The prompt as the text encoder rewrites it.

    Attributes:
        text: as far as it has come; the last one is what is encoded, the user's own prompt where the
            answer was of no use.
        done: whether this is the last one.
    """

    text: str
    done: bool = False


PipelineEvent = StageStarted | StepDone | Notice | PreviewReady | StateSaved | PromptExpanded
EventSink = Callable[[PipelineEvent], None]


def ignore(event: PipelineEvent) -> None:
    """A sink for those who do not listen."""

"""What a running job tells whoever listens: page, command line and log read the same events.

Only the standard library is needed here. An event sink is any callable that takes one event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

STAGES = ("load", "encode text", "encode image", "denoise", "decode", "save")
"""Names of the stages a job passes through, in order; "encode image" only when it has a picture."""


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
    """

    step: int
    total: int
    seconds_per_step: float
    eta_s: float


@dataclass(frozen=True)
class Notice:
    """Something the user should know that is not an error: a size snapped, a fallback taken."""

    text: str


PipelineEvent = StageStarted | StepDone | Notice
EventSink = Callable[[PipelineEvent], None]


def ignore(event: PipelineEvent) -> None:
    """A sink for those who do not listen."""

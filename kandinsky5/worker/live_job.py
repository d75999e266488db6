"""The running job, as far as it is ahead of its row in the store."""

from __future__ import annotations

from dataclasses import dataclass, field

from kandinsky5.events import (
    Notice,
    PipelineEvent,
    PromptExpanded,
    StageStarted,
    StateSaved,
    StepDone,
)
from kandinsky5.worker.jobs import JobSnapshot
from kandinsky5.worker.run_files import MAX_PREVIEWS

START_AGAIN = "; start it again"


@dataclass
class LiveJob:
    """What is known of the running job beyond its row in the store."""

    id: str
    notices: list[str] = field(default_factory=list)
    previews: list[int] = field(default_factory=list)
    saved_step: int | None = None
    stage: str | None = None
    step: int = 0
    total: int = 0
    seconds_per_step: float | None = None
    eta_s: float | None = None
    h2d_bytes: int = 0
    stall_s: float = 0.0
    expanded_prompt: str | None = None
    stop_mode: str | None = None
    kill_at: float | None = None
    saved_at: float = 0.0

    @classmethod
    def of(cls, job: JobSnapshot) -> LiveJob:
        """The job as it begins: anew, or where its saved state stands."""
        if job.resume_from is None:
            return cls(job.id, notices=list(job.notices))
        return cls(
            job.id,
            notices=list(job.notices),
            previews=list(job.previews),
            saved_step=job.saved_step,
            step=job.saved_step or 0,
            total=job.total,
        )

    def interrupted(self, message: str | None) -> str | None:
        """The message of its interruption; it tells from where to resume, if that can be done."""
        if message is None or self.saved_step is None:
            return message
        return f"{message.removesuffix(START_AGAIN)}; resume it from step {self.saved_step}"

    def note(self, event: PipelineEvent) -> None:
        if isinstance(event, StageStarted):
            self.stage, self.eta_s = event.stage, None
        elif isinstance(event, StepDone):
            self.step, self.total = event.step, event.total
            self.seconds_per_step, self.eta_s = event.seconds_per_step, event.eta_s
            self.h2d_bytes, self.stall_s = event.h2d_bytes, event.stall_s
        elif isinstance(event, PromptExpanded):
            self.expanded_prompt = event.text
        elif isinstance(event, StateSaved):
            self.saved_step = event.step
        elif isinstance(event, Notice) and event.text not in self.notices:
            self.notices.append(event.text)

    def note_preview(self, step: int) -> None:
        """A picture of this step is there; a resumed run paints the steps after it anew."""
        kept = [other for other in self.previews if other < step]
        self.previews = [*kept, step][-MAX_PREVIEWS:]

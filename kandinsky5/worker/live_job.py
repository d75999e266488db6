"""The running job, as far as it is ahead of its row in the store."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kandinsky5.events import (
    Notice,
    PipelineEvent,
    PromptExpanded,
    ReadingFile,
    StageStarted,
    StateSaved,
    StepDone,
)
from kandinsky5.worker.job_snapshot import JobSnapshot
from kandinsky5.worker.protocol import RunJob, StopJob
from kandinsky5.worker.run_files import MAX_PREVIEWS, RunFiles

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
    told_mode: str | None = None
    kill_at: float | None = None
    saved_at: float = 0.0
    reading: str | None = None
    command: RunJob | None = None

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

    def begins(
        self, job: JobSnapshot, out: Path, files: RunFiles, models_dirs: tuple[str, ...]
    ) -> RunJob:
        """The command for a worker."""
        self.command = RunJob(
            job.id,
            job.request,
            str(out),
            resume_from=job.resume_from,
            previews_dir=str(files.previews_dir(job.id)),
            states_dir=str(files.states_dir(job.id)),
            kind=job.kind,
            models_dirs=models_dirs,
        )
        return self.command

    def goes_on_from(self, saved_state: str) -> RunJob:
        """The command for another worker, which is the last one to get it."""
        assert self.command is not None
        self.command = replace(self.command, resume_from=saved_state, may_change_worker=False)
        self.kill_at = self.reading = self.told_mode = None
        return self.command

    def died(self, cause: str) -> str:
        """The cause of its worker's death, with the file that was being read then."""
        if self.reading is None:
            return cause
        return f"{cause}; it was reading {self.reading}: that file may be damaged, get it again"

    def asks_to_stop(self, mode: str) -> bool:
        """Take note of a stop; False when it changes nothing. Only a decode can still be stopped itself."""
        if self.stop_mode not in (None, "decode") or mode == self.stop_mode:
            return False
        self.stop_mode = mode
        return True

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to stop and still is in its step; a decode of what is there is work again."""
        decodes = self.stop_mode == "decode" and self.stage == "decode"
        return self.stop_mode is not None and not decodes

    def stop_to_pass_on(self, grace_s: float) -> StopJob | None:
        """The stop that the worker has not been told of; from then on it has that time, and its step's."""
        if self.stop_mode is None or self.stop_mode == self.told_mode:
            return None
        self.told_mode = self.stop_mode
        patience_s = grace_s + 2.0 * (self.seconds_per_step or 0.0)
        # A decode takes as long as it takes.
        self.kill_at = None if self.stop_mode == "decode" else time.monotonic() + patience_s
        return StopJob(self.id, self.stop_mode)

    @property
    def is_overdue(self) -> bool:
        """Whether the worker has not stopped in its time."""
        return self.kill_at is not None and time.monotonic() >= self.kill_at

    def needs_no_state(self, state: str, result: dict[str, Any] | None) -> bool:
        """Whether nobody will go on from its saved states once it has ended like this."""
        if state == "done":
            is_early = self.stop_mode == "decode" and (result or {}).get("steps_run") != self.total
            return not is_early
        return state == "stopped" and self.stop_mode == "discard"

    def note(self, event: PipelineEvent) -> None:
        if isinstance(event, StageStarted):
            self.stage, self.eta_s = event.stage, None
        elif isinstance(event, StepDone):
            self.step, self.total = event.step, event.total
            self.seconds_per_step, self.eta_s = event.seconds_per_step, event.eta_s
            self.h2d_bytes, self.stall_s = event.h2d_bytes, event.stall_s
        elif isinstance(event, ReadingFile):
            self.reading = event.path
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

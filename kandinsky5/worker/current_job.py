"""The job that runs now: what is known of it beyond its row in the store, and what is written there.

Pages look at it from their threads while the pump's thread takes it on.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kandinsky5.events import (
    PipelineEvent,
    PromptExpanded,
    ReadingFile,
    StateSaved,
    StepDone,
)
from kandinsky5.worker.job_snapshot import JobSnapshot
from kandinsky5.worker.jobs import JobStore
from kandinsky5.worker.live_job import LiveJob
from kandinsky5.worker.run_files import RunFiles

SAVE_PROGRESS_EVERY_S = 2.0
FREQUENT = (StepDone, ReadingFile, PromptExpanded)
"""Events that come so often that not each of them is written to the store."""

log = logging.getLogger(__name__)


class CurrentJob:
    """The running job of a store, or none; every method may be called from any thread.

    Args:
        store: where the job comes from and where its progress and its end are noted.
        files: where previews and saved states lie.

    Attributes:
        live: what is known of the job; None while none runs.
    """

    def __init__(self, store: JobStore, files: RunFiles) -> None:
        self._store = store
        self._files = files
        self._lock = threading.RLock()
        self.live: LiveJob | None = None

    def claim(self) -> JobSnapshot | None:
        """Turn the first waiting job into the current one; None when none may begin."""
        with self._lock:
            job = self._store.claim_next()
            if job is not None:
                self.live = LiveJob.of(job)
            return job

    def asks_to_stop(self, job_id: str, mode: str) -> bool:
        """Take note of a stop; False when it changes nothing, as when another job runs."""
        with self._lock:
            live = self.live
            return live is not None and live.id == job_id and live.asks_to_stop(mode)

    def with_progress(self, read: Callable[[], tuple[JobSnapshot, ...]]) -> tuple[JobSnapshot, ...]:
        """What ``read`` takes from the store, the running job with its progress of this moment."""
        with self._lock:
            return tuple(self._seen_live(job) for job in read())

    def _seen_live(self, job: JobSnapshot) -> JobSnapshot:
        live = self.live
        if live is None or live.id != job.id or job.state != "running":
            return job
        return replace(
            job,
            stage=live.stage,
            step=live.step,
            total=live.total,
            seconds_per_step=live.seconds_per_step,
            eta_s=live.eta_s,
            h2d_bytes=live.h2d_bytes,
            stall_s=live.stall_s,
            expanded_prompt=live.expanded_prompt,
            is_stopping=live.is_stopping,
            notices=tuple(live.notices),
            previews=tuple(live.previews),
        )

    def note(self, live: LiveJob, event: PipelineEvent) -> None:
        """Take note of what the pipeline said, and write it down unless it comes all the time."""
        with self._lock:
            live.note(event)
        now = time.monotonic()
        if isinstance(event, FREQUENT) and now - live.saved_at < SAVE_PROGRESS_EVERY_S:
            return
        live.saved_at = now
        try:
            if isinstance(event, StateSaved):
                self._store.record_saved_state(
                    live.id, event.path, step=event.step, saved_at=event.saved_at
                )
            self._save_progress(live)
        except sqlite3.Error as error:  # a full disk must not end a job that still computes
            log.warning("progress could not be kept: %s", error)

    def note_preview(self, live: LiveJob, step: int) -> None:
        """A picture of this step is there."""
        with self._lock:
            live.note_preview(step)

    def _save_progress(self, live: LiveJob) -> None:
        self._store.record_progress(
            live.id,
            stage=live.stage,
            step=live.step,
            total=live.total,
            notices=live.notices,
            previews=live.previews,
        )

    def finish(
        self, state: str, *, message: str | None = None, result: dict[str, Any] | None = None
    ) -> None:
        """End the job, if there is one."""
        with self._lock:
            live, self.live = self.live, None
            if live is None:
                return
            self._save_progress(live)
            if state == "interrupted":
                message = live.interrupted(message)
            self._store.finish(live.id, state, message=message, result=result)
            if live.needs_no_state(state, result):
                self._store.forget_saved_state(live.id)
                self._files.forget_states(live.id)

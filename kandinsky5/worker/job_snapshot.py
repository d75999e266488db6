"""A job as it is seen from outside. Only the standard library is needed here."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from typing import Any

FINAL_STATES = ("done", "failed", "stopped", "interrupted")
STATES = ("queued", "running", *FINAL_STATES)


@dataclass(frozen=True)
class JobSnapshot:
    """A job at one moment.

    Attributes:
        id: names the job for good.
        state: one of :data:`STATES`.
        request: as :meth:`kandinsky5.request.GenerationRequest.to_dict` gives it, with its seed.
        kind: ``generate``, or ``expand``: its prompt is rewritten and nothing made.
        stage: of :data:`kandinsky5.events.STAGES`; None before the first.
        step, total: steps of the schedule, done and in all.
        seconds_per_step, eta_s: of a running job; None when not known.
        h2d_bytes, stall_s: of a running job's last step: weights copied to the device, and how long computing
            waited for them.
        expanded_prompt: of a running job: the prompt as the text encoder rewrites it, as far as it has come.
        is_stopping: it was told to stop and has not come to the end of its step.
        place: 0 running, n the n-th in the queue, −1 over.
        output: path of the file, once done; an early one stays there while the job goes on.
        message: one line, for failed and interrupted jobs.
        notices: what the user should know.
        result: as the ``to_dict`` of what the job's kind makes gives it, once done.
        created_at, started_at, finished_at: unix seconds.
        saved_state, saved_step, saved_at: the newest file from which the job can be resumed, the steps done
            in it and when it was written; None when there is none.
        resume_from: the file from which a queued or running job goes on.
        previews: steps of which there are pictures, in order.
        seed_drawn: its request came without a seed.
        outputs: paths of all files that it made, an early result's too.
    """

    id: str
    state: str
    request: dict[str, Any]
    kind: str = "generate"
    stage: str | None = None
    step: int = 0
    total: int = 0
    seconds_per_step: float | None = None
    eta_s: float | None = None
    h2d_bytes: int = 0
    stall_s: float = 0.0
    expanded_prompt: str | None = None
    is_stopping: bool = False
    place: int = -1
    output: str | None = None
    message: str | None = None
    notices: tuple[str, ...] = ()
    result: dict[str, Any] | None = None
    created_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    saved_state: str | None = None
    saved_step: int | None = None
    saved_at: float | None = None
    resume_from: str | None = None
    previews: tuple[int, ...] = ()
    seed_drawn: bool = False
    outputs: tuple[str, ...] = ()

    @property
    def is_resumable(self) -> bool:
        """Whether the job is over and can go on from a saved state; one with all its steps has none left."""
        return self.state in FINAL_STATES and self.saved_state is not None

    @property
    def can_be_edited(self) -> bool:
        """Whether another request can take the place of its own: it waits, and goes on from nothing saved."""
        return self.state == "queued" and self.kind == "generate" and self.resume_from is None


def snapshot_of(row: sqlite3.Row, *, place: int = 0) -> JobSnapshot:
    """The job of a row of the table ``jobs``; ``place`` is that of a waiting one."""
    state = row["state"]
    return JobSnapshot(
        id=row["id"],
        state=state,
        request=json.loads(row["request"]),
        kind=row["kind"],
        stage=row["stage"],
        step=row["step"],
        total=row["total"],
        place={"running": 0, "queued": place}.get(state, -1),
        output=row["output"],
        message=row["message"],
        notices=tuple(json.loads(row["notices"])),
        result=None if row["result"] is None else json.loads(row["result"]),
        created_at=row["created_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        saved_state=row["saved_state"],
        saved_step=row["saved_step"],
        saved_at=row["saved_at"],
        resume_from=row["resume_from"],
        previews=tuple(json.loads(row["previews"])),
        seed_drawn=bool(row["seed_drawn"]),
        outputs=tuple(json.loads(row["outputs"])),
    )

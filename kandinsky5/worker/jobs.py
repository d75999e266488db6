"""Jobs and their states, in SQLite, so that they survive reloads and restarts.

One program at a time owns a store. Only the standard library is needed here.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kandinsky5.errors import K1Error, UserError
from kandinsky5.worker.job_schema import open_store, own_store

FINAL_STATES = ("done", "failed", "stopped", "interrupted")
STATES = ("queued", "running", *FINAL_STATES)
TURN = "kind = 'generate', number"
"""Order of the queue: somebody looks at the page and waits for a prompt to be rewritten."""
LEFT_RUNNING = "the program ended during this job; start it again"
LEFT_RESUMABLE = "the program ended during this job; resume it from step "


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

    @property
    def is_resumable(self) -> bool:
        """Whether the job is over and can go on from a saved state; one with all its steps has none left."""
        return self.state in FINAL_STATES and self.saved_state is not None


class JobStore:
    """The jobs of one state folder; every method may be called from any thread.

    Opening it marks jobs that a former program left running as interrupted; queued ones stay queued.

    Args:
        file: the database; made when absent, like its folder.

    Raises:
        UserError: the folder cannot be written, another program has the store open, or the file is not a
            job store of this version.
    """

    def __init__(self, file: Path) -> None:
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._owner_lock = own_store(file)
        try:
            self._connection = open_store(file)
            self._interrupt_running()
        except sqlite3.Error as error:
            self.close()
            raise UserError(
                "state folder", str(file), f"not a usable job store ({error}); move this file away"
            ) from error
        except UserError:
            self.close()
            raise

    def add(
        self,
        request: dict[str, Any],
        *,
        token: str | None = None,
        notices: Sequence[str] = (),
        kind: str = "generate",
    ) -> str:
        """Queue a job; a token that came before gives the job of that time and adds none."""
        with self._lock:
            if token is not None and (known := self.id_of_token(token)) is not None:
                return known
            job_id = secrets.token_hex(8)
            self._change(
                "INSERT INTO jobs (id, token, state, kind, request, notices, created_at)"
                " VALUES (?, ?, 'queued', ?, ?, ?, ?)",
                (job_id, token, kind, json.dumps(request), json.dumps(list(notices)), time.time()),
            )
            return job_id

    def id_of_token(self, token: str) -> str | None:
        """The job that was added with this token."""
        rows = self._rows("SELECT id FROM jobs WHERE token = ?", (token,))
        return rows[0]["id"] if rows else None

    def claim_next(self) -> JobSnapshot | None:
        """Turn the first queued job into the running one; None when none waits."""
        with self._lock:
            rows = self._rows(f"SELECT id FROM jobs WHERE state = 'queued' ORDER BY {TURN} LIMIT 1")
            if not rows:
                return None
            self._change(
                "UPDATE jobs SET state = 'running', started_at = ? WHERE id = ?",
                (time.time(), rows[0]["id"]),
            )
            return self.get(rows[0]["id"])

    def stop_queued(self, job_id: str) -> bool:
        """Take a job out of the queue, with an early result it had as done; False when it was not in it."""
        changed = self._change(
            "UPDATE jobs SET state = CASE WHEN output IS NULL THEN 'stopped' ELSE 'done' END,"
            " finished_at = ? WHERE id = ? AND state = 'queued'",
            (time.time(), job_id),
        )
        return changed == 1

    def record_progress(
        self,
        job_id: str,
        *,
        stage: str | None,
        step: int,
        total: int,
        notices: Sequence[str],
        previews: Sequence[int] = (),
    ) -> None:
        """Keep how far a job has come."""
        self._change(
            "UPDATE jobs SET stage = ?, step = ?, total = ?, notices = ?, previews = ? WHERE id = ?",
            (stage, step, total, json.dumps(list(notices)), json.dumps(list(previews)), job_id),
        )

    def record_saved_state(self, job_id: str, path: str, *, step: int, saved_at: float) -> None:
        """Keep from which file the job can be resumed; a later one takes its place."""
        self._change(
            "UPDATE jobs SET saved_state = ?, saved_step = ?, saved_at = ? WHERE id = ?",
            (path, step, saved_at, job_id),
        )

    def forget_saved_state(self, job_id: str) -> None:
        """The job can no longer be resumed."""
        self._change(
            "UPDATE jobs SET saved_state = NULL, saved_step = NULL, saved_at = NULL WHERE id = ?",
            (job_id,),
        )

    def requeue(self, job_id: str) -> bool:
        """Put a job that is over before its last step back in its old place, to go on from its saved state.

        Returns:
            False when it is not over or has no saved state.
        """
        states = ", ".join(f"'{state}'" for state in FINAL_STATES)
        changed = self._change(
            "UPDATE jobs SET state = 'queued', resume_from = saved_state, message = NULL,"
            " started_at = NULL, finished_at = NULL"
            f" WHERE id = ? AND state IN ({states}) AND saved_state IS NOT NULL",
            (job_id,),
        )
        return changed == 1

    def finish(
        self,
        job_id: str,
        state: str,
        *,
        message: str | None = None,
        result: dict[str, Any] | None = None,
    ) -> None:
        """End a job in one of :data:`FINAL_STATES`; a job that is over already stays as it is.

        An early result that a job already had stays with it when it ends without another.
        """
        if state not in FINAL_STATES:
            raise ValueError(f"{state!r} does not end a job; one of {', '.join(FINAL_STATES)} does")
        self._change(
            "UPDATE jobs SET state = ?, message = ?, result = coalesce(?, result),"
            " output = coalesce(?, output), finished_at = ?"
            " WHERE id = ? AND state IN ('queued', 'running')",
            (
                state,
                message,
                None if result is None else json.dumps(result),
                None if result is None else result.get("output"),
                time.time(),
                job_id,
            ),
        )

    def _interrupt_running(self) -> None:
        """End whatever a former program left marked as running; the message says how to go on."""
        self._change(
            "UPDATE jobs SET state = 'interrupted', finished_at = ?, message ="
            " CASE WHEN saved_state IS NULL THEN ? ELSE ? || saved_step END WHERE state = 'running'",
            (time.time(), LEFT_RUNNING, LEFT_RESUMABLE),
        )
        self._change(
            "UPDATE jobs SET state = 'stopped', finished_at = ? WHERE state = 'queued' AND kind = 'expand'",
            (time.time(),),  # the page that waited for it is gone
        )

    def get(self, job_id: str) -> JobSnapshot:
        """The job as the store knows it.

        Raises:
            KeyError: there is no such job.
        """
        with self._lock:
            rows = self._rows("SELECT * FROM jobs WHERE id = ?", (job_id,))
            if not rows:
                raise KeyError(job_id)
            until_it = self._rows(
                f"SELECT id FROM jobs WHERE state = 'queued' AND ({TURN}) <= (?, ?)",
                (rows[0]["kind"] == "generate", rows[0]["number"]),
            )
        return _snapshot(rows[0], place=len(until_it))

    def queue(self) -> tuple[JobSnapshot, ...]:
        """The running job, then those that wait, in their order."""
        rows = self._rows(
            "SELECT * FROM jobs WHERE state IN ('running', 'queued')"
            f" ORDER BY state = 'queued', {TURN}"
        )
        running = sum(row["state"] == "running" for row in rows)
        return tuple(_snapshot(row, place=index - running + 1) for index, row in enumerate(rows))

    def history(self, limit: int, offset: int = 0) -> tuple[JobSnapshot, ...]:
        """Jobs that are over, the newest first; none that only rewrote a prompt."""
        rows = self._rows(
            "SELECT * FROM jobs WHERE finished_at IS NOT NULL AND kind = 'generate'"
            " ORDER BY finished_at DESC, number DESC LIMIT ? OFFSET ?",
            (max(limit, 0), max(offset, 0)),
        )
        return tuple(_snapshot(row) for row in rows)

    def close(self) -> None:
        """Let go of the file; calling it again does nothing."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            self._owner_lock.close()

    def _rows(self, query: str, values: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        with self._lock:
            return self._open_connection().execute(query, values).fetchall()

    def _change(self, statement: str, values: tuple[Any, ...]) -> int:
        """The number of rows changed."""
        with self._lock:
            return self._open_connection().execute(statement, values).rowcount

    def _open_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            raise K1Error("the studio is closing; start it again")
        return self._connection


def _snapshot(row: sqlite3.Row, *, place: int = 0) -> JobSnapshot:
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
    )

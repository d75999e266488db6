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
from pathlib import Path
from typing import Any

from kandinsky5.errors import K1Error, UserError
from kandinsky5.worker.job_schema import open_store, own_store
from kandinsky5.worker.job_snapshot import FINAL_STATES, JobSnapshot, snapshot_of

TURN = "kind = 'generate', position"
"""Order of the queue: somebody looks at the page and waits for a prompt to be rewritten."""
PAUSED = "EXISTS (SELECT 1 FROM queue_marks WHERE name = 'paused')"
LEFT_RUNNING = "the program ended during this job; start it again"
LEFT_RESUMABLE = "the program ended during this job; resume it from step "


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
        seed_drawn: bool = False,
    ) -> str:
        """Queue a job as the last; a token that came before gives the job of that time and adds none."""
        with self._lock:
            if token is not None and (known := self.id_of_token(token)) is not None:
                return known
            job_id = secrets.token_hex(8)
            self._change(
                "INSERT INTO jobs"
                " (id, token, state, kind, request, notices, created_at, seed_drawn, position)"
                " SELECT ?, ?, 'queued', ?, ?, ?, ?, ?, coalesce(max(position), 0) + 1 FROM jobs",
                (
                    job_id,
                    token,
                    kind,
                    json.dumps(request),
                    json.dumps(list(notices)),
                    time.time(),
                    seed_drawn,
                ),
            )
            return job_id

    def replace(
        self,
        job_id: str,
        request: dict[str, Any],
        *,
        notices: Sequence[str] = (),
        seed_drawn: bool = False,
    ) -> bool:
        """Let a waiting job make something else, in its place; False when it cannot be edited."""
        changed = self._change(
            "UPDATE jobs SET request = ?, notices = ?, seed_drawn = ? WHERE id = ?"
            " AND state = 'queued' AND kind = 'generate' AND resume_from IS NULL",
            (json.dumps(request), json.dumps(list(notices)), seed_drawn, job_id),
        )
        return changed == 1

    def move(self, job_id: str, places: int) -> bool:
        """Move a waiting job so many places back, or forward when negative, as far as the queue goes.

        Returns:
            False when it does not wait.
        """
        with self._lock:
            rows = self._rows(
                "SELECT id, position FROM jobs WHERE state = 'queued' AND kind = 'generate'"
                " ORDER BY position"
            )
            order = [row["id"] for row in rows]
            if job_id not in order:
                return False
            index = order.index(job_id)
            order.insert(max(index + places, 0), order.pop(index))
            placed = zip((row["position"] for row in rows), order, strict=True)
            with self._open_connection() as connection:
                connection.execute("BEGIN")
                connection.executemany("UPDATE jobs SET position = ? WHERE id = ?", placed)
        return True

    def set_paused(self, paused: bool) -> None:
        """Let no further job begin, over restarts too; rewriting a prompt goes on, somebody waits for it."""
        if paused:
            self._change("INSERT OR IGNORE INTO queue_marks (name) VALUES ('paused')")
        else:
            self._change("DELETE FROM queue_marks WHERE name = 'paused'")

    def is_paused(self) -> bool:
        """Whether no further job begins."""
        return bool(self._rows(f"SELECT {PAUSED} AS paused")[0]["paused"])

    def id_of_token(self, token: str) -> str | None:
        """The job that was added with this token."""
        rows = self._rows("SELECT id FROM jobs WHERE token = ?", (token,))
        return rows[0]["id"] if rows else None

    def claim_next(self) -> JobSnapshot | None:
        """Turn the first queued job into the running one; None when none waits, or none may begin."""
        with self._lock:
            rows = self._rows(
                "SELECT id FROM jobs WHERE state = 'queued'"
                f" AND (kind <> 'generate' OR NOT {PAUSED}) ORDER BY {TURN} LIMIT 1"
            )
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
        made = None if result is None else result.get("output")
        with self._lock:
            outputs = [*self._outputs(job_id), *([made] if made else [])]
            self._change(
                "UPDATE jobs SET state = ?, message = ?, result = coalesce(?, result),"
                " output = coalesce(?, output), outputs = ?, finished_at = ?"
                " WHERE id = ? AND state IN ('queued', 'running')",
                (
                    state,
                    message,
                    None if result is None else json.dumps(result),
                    made,
                    json.dumps(list(dict.fromkeys(outputs))),
                    time.time(),
                    job_id,
                ),
            )

    def _outputs(self, job_id: str) -> list[str]:
        """Files that a job has made; of one that a former version ran, the last alone is known."""
        rows = self._rows("SELECT output, outputs FROM jobs WHERE id = ?", (job_id,))
        known = json.loads(rows[0]["outputs"]) if rows else []
        return known or [row["output"] for row in rows if row["output"]]

    def remove(self, job_id: str) -> bool:
        """Forget a job that is over; False when it is not."""
        states = ", ".join(f"'{state}'" for state in FINAL_STATES)
        return (
            self._change(f"DELETE FROM jobs WHERE id = ? AND state IN ({states})", (job_id,)) == 1
        )

    def others(self, job_id: str) -> tuple[JobSnapshot, ...]:
        """Every job but this one, without their places."""
        rows = self._rows("SELECT * FROM jobs WHERE id <> ?", (job_id,))
        return tuple(snapshot_of(row) for row in rows)

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
                (rows[0]["kind"] == "generate", rows[0]["position"]),
            )
        return snapshot_of(rows[0], place=len(until_it))

    def queue(self) -> tuple[JobSnapshot, ...]:
        """The running job, then those that wait, in their order."""
        rows = self._rows(
            "SELECT * FROM jobs WHERE state IN ('running', 'queued')"
            f" ORDER BY state = 'queued', {TURN}"
        )
        running = sum(row["state"] == "running" for row in rows)
        return tuple(snapshot_of(row, place=index - running + 1) for index, row in enumerate(rows))

    def history(self, limit: int, offset: int = 0) -> tuple[JobSnapshot, ...]:
        """Jobs that are over, the newest first; none that only rewrote a prompt."""
        rows = self._rows(
            "SELECT * FROM jobs WHERE finished_at IS NOT NULL AND kind = 'generate'"
            " ORDER BY finished_at DESC, number DESC LIMIT ? OFFSET ?",
            (max(limit, 0), max(offset, 0)),
        )
        return tuple(snapshot_of(row) for row in rows)

    def history_length(self) -> int:
        """How many jobs :meth:`history` has in all."""
        rows = self._rows(
            "SELECT count(*) AS jobs FROM jobs WHERE finished_at IS NOT NULL AND kind = 'generate'"
        )
        return int(rows[0]["jobs"])

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

    def _change(self, statement: str, values: tuple[Any, ...] = ()) -> int:
        """The number of rows changed."""
        with self._lock:
            return self._open_connection().execute(statement, values).rowcount

    def _open_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            raise K1Error("the studio is closing; start it again")
        return self._connection

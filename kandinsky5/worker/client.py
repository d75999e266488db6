"""The page's and other programs' way to jobs: submit, stop, look. Imports neither torch nor numpy.

client = WorkerClient(state_dir=Path("state"), out_dir=Path("outputs"))
client.start()
job_id = client.submit(GenerationRequest(prompt="a red circle moves right"))
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kandinsky5.errors import UserError
from kandinsky5.request import GenerationRequest, settle
from kandinsky5.worker.folders import Folders
from kandinsky5.worker.job_snapshot import FINAL_STATES, JobSnapshot
from kandinsky5.worker.jobs import JobStore
from kandinsky5.worker.protocol import (
    DEFAULT_PIPELINE,
    STOP_MODES,
    FileNames,
    WorkerSettings,
)
from kandinsky5.worker.pump import JobPump
from kandinsky5.worker.result_files import check_writable, delete_results, output_path
from kandinsky5.worker.run_files import PreviewFolder, RunFiles

__all__ = [
    "FileNames",
    "Folders",
    "JobSnapshot",
    "WorkerClient",
    "asked_for",
    "check_writable",
    "output_path",
]

DRAWN_SEEDS = 2**31


class WorkerClient:
    """Jobs of one state folder and the worker that runs them.

    Args:
        state_dir: holds the jobs and the worker's log; made when absent.
        out_dir: results go there.
        models_dirs: folders in which models are looked for.
        device: what requests with device "auto" get.
        pipeline: ``module:name`` of the pipeline the worker builds.
        stop_grace_s: how long a worker may take to obey a stop before it is ended.

    Raises:
        UserError: the state folder cannot be used, or another program uses it.
    """

    def __init__(
        self,
        *,
        state_dir: Path,
        out_dir: Path,
        models_dirs: Sequence[Path] = (),
        device: str | None = None,
        pipeline: str = DEFAULT_PIPELINE,
        stop_grace_s: float = 30.0,
    ) -> None:
        state_dir = state_dir.expanduser().absolute()
        self._folders = Folders(out_dir, tuple(models_dirs))
        self._device = device
        self._closing = threading.RLock()
        self._ending = threading.RLock()  # a job is not resumed while it is deleted
        self._started = self._closed = False
        self._files = RunFiles(state_dir)
        self._store = JobStore(state_dir / "jobs.sqlite3")
        settings = WorkerSettings(
            log_file=str(state_dir / "worker.log"),
            parent_pid=os.getpid(),
            models_dirs=self._folders.model_names,
            pipeline=pipeline,
        )
        self._pump = JobPump(
            self._store,
            settings,
            files=self._files,
            choose_output=lambda request: output_path(
                self._folders.out_dir, request, time.localtime()
            ),
            stop_grace_s=stop_grace_s,
        )

    def start(self) -> None:
        """Begin to run queued jobs; the worker warms up in the background. Once is enough."""
        if not self._started:
            self._started = True
            atexit.register(self.close)
            self._pump.start()

    def close(self, timeout_s: float = 8.0) -> None:
        """Interrupt the running job and end the worker within that time; queued jobs stay queued.

        Calling it again does nothing. Later calls of other methods raise K1Error.
        """
        with self._closing:
            if self._closed:
                return
            self._closed = True
            atexit.unregister(self.close)
            self._pump.close(timeout_s)
            self._store.close()

    @property
    def folders(self) -> Folders:
        """Where the next results go and where models are looked for."""
        return self._folders

    def use_folders(self, folders: Folders) -> None:
        """Others, from the next job on; one that runs keeps those that it began with."""
        self._folders = folders
        self._pump.settings = dataclasses.replace(
            self._pump.settings, models_dirs=folders.model_names
        )

    def submit(self, request: GenerationRequest, *, token: str | None = None) -> str:
        """Queue a job.

        Args:
            request: a missing seed is drawn here; ``out`` is not used, the file's name is chosen when the
                job starts.
            token: the same token again gives the same job (a double click).

        Returns:
            The job's id.

        Raises:
            UserError: the request cannot be run, or the output folder cannot be written.
        """
        if token is not None and (known := self._store.id_of_token(token)) is not None:
            return known
        _, notices = settle(request)
        check_writable(self._folders.out_dir)
        completed = self._completed(request)
        job_id = self._store.add(
            completed.to_dict(), token=token, notices=notices, seed_drawn=request.seed is None
        )
        self._pump.wake()
        return job_id

    def replace(self, job_id: str, request: GenerationRequest) -> bool:
        """Let a waiting job make something else, in its place of the queue.

        Returns:
            False when it waits no longer, or goes on from a saved state; nothing was changed then.

        Raises:
            KeyError: there is no such job.
            UserError: the request cannot be run.
        """
        self._store.get(job_id)
        _, notices = settle(request)
        values = self._completed(request).to_dict()
        drawn = request.seed is None
        return self._store.replace(job_id, values, notices=notices, seed_drawn=drawn)

    def duplicate(self, job_id: str, *, token: str | None = None) -> str:
        """Queue what a job was asked for once more, as the last; a seed that was drawn is drawn anew.

        Returns:
            The new job's id.

        Raises:
            KeyError: there is no such job.
            UserError: its request cannot be run any more.
        """
        return self.submit(asked_for(self._store.get(job_id)), token=token)

    def move(self, job_id: str, places: int) -> bool:
        """Move a waiting job so many places back, or forward when negative; False when it does not wait."""
        return self._store.move(job_id, places)

    def set_paused(self, paused: bool) -> None:
        """Let no further job begin, over restarts too, until it is called with False.

        The running job goes on; so does the rewriting of prompts, for which somebody waits.
        """
        self._store.set_paused(paused)
        self._pump.wake()

    def is_paused(self) -> bool:
        """Whether no further job begins."""
        return self._store.is_paused()

    def expand(self, request: GenerationRequest, *, token: str | None = None) -> str:
        """Queue the rewriting of a prompt alone, before the jobs that wait.

        Args:
            request: as for :meth:`submit`.
            token: likewise.

        Returns:
            The job's id; its ``expanded_prompt`` grows while it runs, its ``result`` has the whole text.

        Raises:
            UserError: the request cannot be run.
        """
        _, notices = settle(request)
        completed = self._completed(request)
        job_id = self._store.add(completed.to_dict(), token=token, notices=notices, kind="expand")
        self._pump.wake()
        return job_id

    def describe(self, names: FileNames) -> dict[str, Any] | None:
        """What model files are, as :func:`kandinsky5.pipeline.named_files.describe_files` tells it.

        Returns:
            At once: None while the worker still looks; ask again in a moment.
        """
        return self._pump.describe(
            dataclasses.replace(names, models_dirs=self._folders.model_names)
        )

    def resume(self, job_id: str) -> None:
        """Put a job that ended before its last step back in the queue, to go on from its saved state.

        Raises:
            KeyError: there is no such job.
            UserError: it is not over, or has no saved state on disk.
        """
        with self._ending:
            job = self._store.get(job_id)
            if not job.is_resumable:
                raise UserError(
                    "job", job_id, f"it is {job.state} and has no saved state: start it again"
                )
            if not Path(job.saved_state or "").is_file():
                raise UserError("job", job_id, f"{job.saved_state} is gone: start it again")
            check_writable(self._folders.out_dir)
            if self._store.requeue(job_id):
                self._pump.wake()

    def discard(self, job_id: str) -> None:
        """Drop what was saved of a job that is over; one that is not, or has nothing saved, stays as it is.

        Raises:
            KeyError: there is no such job.
        """
        with self._ending:
            if self._store.get(job_id).is_resumable:
                self._store.forget_saved_state(job_id)
                self._files.forget_states(job_id)

    def delete(self, job_id: str) -> list[str]:
        """Forget a job that is over, and delete its results, latents, saved states and previews.

        Files that are gone already do not matter; none is touched that is a link, lies outside the folders
        for results and runs, or belongs to another job too.

        Returns:
            A line for each file of it that is still there.

        Raises:
            KeyError: there is no such job.
            UserError: it waits or runs, or a file could not be deleted; it is still there then.
        """
        with self._ending:
            job = self._store.get(job_id)
            if job.state not in FINAL_STATES:
                raise UserError("job", job_id, f"it is {job.state}: stop it first")
            kept = delete_results(job, self._folders, self._store.others(job_id))
            kept += self._files.delete(job_id)
            self._store.remove(job_id)
            return kept

    def preview_path(self, job_id: str, step: int) -> Path | None:
        """The picture of a job after that step, if there is one.

        Raises:
            KeyError: there is no such job.
        """
        if step not in self.status(job_id).previews:
            return None
        path = PreviewFolder(self._files.previews_dir(job_id)).path(step)
        return path if path.is_file() else None

    def stop(self, job_id: str, mode: str = "discard") -> None:
        """Take a job out of the queue, or end it at its next step; a job that is over stays as it is.

        Args:
            mode: "discard" drops what is painted, "save" leaves a state to be resumed, "decode" leaves one
                and makes a result of what is there: the job is done, and can go on all the same.

        Raises:
            KeyError: there is no such job.
            UserError: the mode is not one of :data:`kandinsky5.worker.protocol.STOP_MODES`.
        """
        if mode not in STOP_MODES:
            raise UserError("mode", mode, f"one of {', '.join(STOP_MODES)}")
        self._store.get(job_id)
        if not self._store.stop_queued(job_id):
            self._pump.stop(job_id, mode)
        elif mode == "discard":
            self.discard(job_id)

    def status(self, job_id: str) -> JobSnapshot:
        """The job at this moment.

        Raises:
            KeyError: there is no such job.
        """
        (job,) = self._pump.current.with_progress(lambda: (self._store.get(job_id),))
        return job

    def queue(self) -> tuple[JobSnapshot, ...]:
        """The running job, then those that wait, in their order."""
        return self._pump.current.with_progress(self._store.queue)

    def history(self, limit: int = 24, offset: int = 0) -> tuple[JobSnapshot, ...]:
        """Jobs that are over, the newest first."""
        return self._store.history(limit, offset)

    def history_length(self) -> int:
        """How many jobs are over."""
        return self._store.history_length()

    def worker_pid(self) -> int | None:
        """The worker's process id; None when none runs."""
        return self._pump.worker_pid

    def _completed(self, request: GenerationRequest) -> GenerationRequest:
        """With its seed and device, so that the record says what the result came from."""
        seed = secrets.randbelow(DRAWN_SEEDS) if request.seed is None else request.seed
        device = self._device if self._device and request.device == "auto" else request.device
        return dataclasses.replace(request, seed=seed, device=device, out=None)


def asked_for(job: JobSnapshot) -> GenerationRequest:
    """What a job was asked for: without its seed where that was drawn.

    Raises:
        UserError: its request is none of this version.
    """
    request = GenerationRequest.from_dict(job.request)
    return dataclasses.replace(request, seed=None) if job.seed_drawn else request

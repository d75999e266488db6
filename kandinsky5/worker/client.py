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
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kandinsky5.errors import UserError
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, settle
from kandinsky5.worker.jobs import JobSnapshot, JobStore
from kandinsky5.worker.protocol import (
    DEFAULT_PIPELINE,
    STOP_MODES,
    FileNames,
    WorkerSettings,
)
from kandinsky5.worker.pump import JobPump
from kandinsky5.worker.run_files import PreviewFolder, RunFiles

__all__ = ["FileNames", "JobSnapshot", "WorkerClient"]

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
        self._out_dir = out_dir.expanduser().absolute()
        self._device = device
        self._closing = threading.RLock()
        self._started = self._closed = False
        self._files = RunFiles(state_dir)
        self._store = JobStore(state_dir / "jobs.sqlite3")
        settings = WorkerSettings(
            log_file=str(state_dir / "worker.log"),
            parent_pid=os.getpid(),
            models_dirs=tuple(str(folder.expanduser().absolute()) for folder in models_dirs),
            pipeline=pipeline,
        )
        self._pump = JobPump(
            self._store,
            settings,
            files=self._files,
            choose_output=lambda request: output_path(self._out_dir, request, time.localtime()),
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
        check_writable(self._out_dir)
        completed = self._completed(request)
        job_id = self._store.add(completed.to_dict(), token=token, notices=notices)
        self._pump.wake()
        return job_id

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
        return self._pump.describe(names)

    def resume(self, job_id: str) -> None:
        """Put a job that ended before its last step back in the queue, to go on from its saved state.

        Raises:
            KeyError: there is no such job.
            UserError: it is not over, or has no saved state on disk.
        """
        job = self._store.get(job_id)
        if not job.is_resumable:
            raise UserError(
                "job", job_id, f"it is {job.state} and has no saved state: start it again"
            )
        if not Path(job.saved_state or "").is_file():
            raise UserError("job", job_id, f"{job.saved_state} is gone: start it again")
        check_writable(self._out_dir)
        if self._store.requeue(job_id):
            self._pump.wake()

    def discard(self, job_id: str) -> None:
        """Drop what was saved of a job that is over; one that is not, or has nothing saved, stays as it is.

        Raises:
            KeyError: there is no such job.
        """
        if self._store.get(job_id).is_resumable:
            self._store.forget_saved_state(job_id)
            self._files.forget_states(job_id)

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
        (job,) = self._pump.with_progress(lambda: (self._store.get(job_id),))
        return job

    def queue(self) -> tuple[JobSnapshot, ...]:
        """The running job, then those that wait, in their order."""
        return self._pump.with_progress(self._store.queue)

    def history(self, limit: int = 24, offset: int = 0) -> tuple[JobSnapshot, ...]:
        """Jobs that are over, the newest first."""
        return self._store.history(limit, offset)

    def worker_pid(self) -> int | None:
        """The worker's process id; None when none runs."""
        return self._pump.worker_pid

    def _completed(self, request: GenerationRequest) -> GenerationRequest:
        """With its seed and device, so that the record says what the result came from."""
        seed = secrets.randbelow(DRAWN_SEEDS) if request.seed is None else request.seed
        device = self._device if self._device and request.device == "auto" else request.device
        return dataclasses.replace(request, seed=seed, device=device, out=None)


def output_path(folder: Path, request: GenerationRequest, moment: time.struct_time) -> Path:
    """``YYYYMMDD-HHMMSS_<preset>_<seed>.mp4`` (.png for pictures) in the folder, a name not yet taken."""
    suffix = ".mp4" if PRESETS[request.preset].is_video else ".png"
    stem = f"{time.strftime('%Y%m%d-%H%M%S', moment)}_{request.preset}_{request.seed}"
    path, number = folder / f"{stem}{suffix}", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}_{number}{suffix}"
    return path


def check_writable(folder: Path) -> None:
    """Make the folder if need be.

    Raises:
        UserError: no file can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        allowed = f"a folder that can be written ({error.strerror}); give another --outdir"
        raise UserError("output folder", str(folder), allowed) from error

"""The thread that takes queued jobs, one at a time, through a worker process and notes what comes of them.

The worker may die at any moment; then its job is marked and the next job gets a new worker.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kandinsky5.errors import K1Error
from kandinsky5.events import Notice
from kandinsky5.request import GenerationRequest
from kandinsky5.worker.current_job import CurrentJob
from kandinsky5.worker.descriptions import Descriptions
from kandinsky5.worker.handle import WorkerHandle, describe_death
from kandinsky5.worker.jobs import JobStore
from kandinsky5.worker.live_job import START_AGAIN, LiveJob
from kandinsky5.worker.protocol import (
    DescribeFiles,
    FileNames,
    FilesDescribed,
    JobEvent,
    JobFailed,
    JobFinished,
    JobStarted,
    JobStopped,
    MemoryInPieces,
    Ping,
    Pong,
    PreviewKept,
    Shutdown,
    StopJob,
    WorkerReady,
    WorkerSettings,
)
from kandinsky5.worker.run_files import RunFiles
from kandinsky5.worker.sleep_check import NO_ANSWER, SleepCheck

DEATH_GRACE_S = 2.0
PAUSE_AFTER_STUMBLE_S = 1.0
STOP_SHARE, LEAVE_SHARE = 0.4, 0.2
"""Parts of the time for closing: for the running job to stop, and for the worker to leave by itself."""
CLOSED_DURING_JOB = f"the studio was closed during this job{START_AGAIN}"
HAD_TO_BE_ENDED = "the worker did not answer to the stop and was ended"
IN_PIECES = "what is left of it lies in pieces; a new worker goes on from the last step"

log = logging.getLogger(__name__)


class JobPump:
    """Runs the jobs of a store.

    Args:
        store: where jobs come from and their ends are noted.
        settings: what a worker is started with; others may be set, their folders count from the next job on.
        files: where previews and saved states lie.
        choose_output: gives the path of a job's result when it starts.
        stop_grace_s: how long a worker may take to obey a stop before it is ended.

    Attributes:
        current: the job that runs.
    """

    def __init__(
        self,
        store: JobStore,
        settings: WorkerSettings,
        *,
        files: RunFiles,
        choose_output: Callable[[GenerationRequest], Path],
        stop_grace_s: float,
    ) -> None:
        self.current = CurrentJob(store, files)
        self._store = store
        self.settings = settings
        self._files = files
        self._choose_output = choose_output
        self._stop_grace_s = stop_grace_s
        self._waking = threading.Lock()
        self._descriptions = Descriptions()
        self._sleep = SleepCheck()
        self._worker: WorkerHandle | None = None
        self._closing = threading.Event()
        self._close_timeout_s = 0.0
        self._wake_reader, self._wake_writer = multiprocessing.Pipe(duplex=False)
        self._woken = False
        self._thread = threading.Thread(target=self._run, name="k1-pump", daemon=True)

    def start(self) -> None:
        """Begin; the worker warms up in the background."""
        self._thread.start()

    @property
    def worker_pid(self) -> int | None:
        worker = self._worker
        return None if worker is None else worker.pid

    def wake(self) -> None:
        """Look at the store again."""
        with self._waking:
            if not self._woken:
                self._woken = True
                self._wake_writer.send_bytes(b"\0")

    def describe(self, names: FileNames) -> dict[str, Any] | None:
        """What the worker says of files; None while it still looks."""
        told, is_new = self._descriptions.ask(names)
        if is_new:
            self.wake()
        return told

    def stop(self, job_id: str, mode: str) -> None:
        """Ask the running job to end; nothing happens when it is another one."""
        if self.current.asks_to_stop(job_id, mode):
            self.wake()

    def close(self, timeout_s: float) -> None:
        """Interrupt the running job, end the worker and the thread within about that time."""
        self._close_timeout_s = timeout_s
        self._closing.set()
        self.wake()
        if self._thread.ident is None:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive() and (worker := self._worker) is not None:
            worker.kill()
            self._thread.join(DEATH_GRACE_S)

    def _run(self) -> None:
        if sys.platform != "win32":
            # A worker inherits this: Ctrl-C at the terminal must not hit it while it starts.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._worker = WorkerHandle(self.settings)
        except OSError:
            log.exception("no worker could be started; the next job tries again")
        while not self._closing.is_set():
            try:
                self._turn()
            except Exception as error:  # if this thread died, every page would wait for ever
                log.exception("the queue stumbled")
                self._give_up(error)
        self._wind_up()

    def _turn(self) -> None:
        """Start what can be started, wait until something happens, and see to it."""
        self._take_next()
        self._pass_on_stop()
        self._check_worker()
        self._pass_on_questions()
        ends = [self._wake_reader]
        if self._worker is not None:
            ends.append(self._worker.connection)
        ready = multiprocessing.connection.wait(ends, self._patience_s())
        if self._wake_reader in ready:
            with self._waking:
                self._wake_reader.recv_bytes()
                self._woken = False
        if self._worker is not None and self._worker.connection in ready:
            self._receive(self._worker)

    def _take_next(self) -> None:
        if self.current.live is not None or self._closing.is_set():
            return
        job = self.current.claim()
        if job is None:
            return
        live = self.current.live
        assert live is not None
        self._sleep.begin()
        try:
            if job.resume_from is None:
                self._files.begin(job.id)
            out = self._choose_output(GenerationRequest.from_dict(job.request))
            if self._worker is None:
                self._worker = WorkerHandle(self.settings)
        except K1Error as error:
            self.current.finish("failed", message=str(error))
        except OSError as error:
            self.current.finish(
                "failed", message=f"the worker could not be started ({error}); try again"
            )
        else:
            self._worker.send(live.begins(job, out, self._files, self.settings.models_dirs))

    def _pass_on_stop(self) -> None:
        """Tell the worker of a stop once; end it when it has not obeyed in time."""
        live, worker = self.current.live, self._worker
        if live is None or worker is None:
            return
        if (stop := live.stop_to_pass_on(self._stop_grace_s)) is not None:
            worker.send(stop)
        elif live.is_overdue:
            log.warning("worker %s did not answer to a stop", worker.pid)
            self._end_worker(worker, 0.0)
            self.current.finish("stopped", message=HAD_TO_BE_ENDED)
            self.wake()

    def _check_worker(self) -> None:
        """After the machine slept, end a worker that is no longer there."""
        live, worker = self.current.live, self._worker
        if live is None or worker is None:
            return
        if self._sleep.is_overdue(lambda: worker.send(Ping())):
            log.warning("worker %s: %s", worker.pid, NO_ANSWER)
            self._end_worker(worker, 0.0)
            self.current.finish("interrupted", message=f"{NO_ANSWER}{START_AGAIN}")
            self.wake()

    def _change_worker(self, live: LiveJob, worker: WorkerHandle, message: str) -> None:
        """Have a new worker go on with the job from its saved state."""
        self._end_worker(worker, DEATH_GRACE_S)
        saved = self._store.get(live.id).saved_state
        if self._closing.is_set():
            self.current.finish("interrupted", message=CLOSED_DURING_JOB)
        elif live.stop_mode in ("discard", "save"):  # to decode it has yet to go on
            self.current.finish("stopped")
        elif saved is None:
            self.current.finish("failed", message=message)
        else:
            self.current.note(live, Notice(f"{message.partition(';')[0]}: {IN_PIECES}"))
            self._worker = WorkerHandle(self.settings)
            self._worker.send(live.goes_on_from(saved))

    def _end_worker(self, worker: WorkerHandle, grace_s: float) -> int | None:
        """Its exit code."""
        self._worker = None
        self._descriptions.worker_is_gone()
        return worker.end(grace_s)

    def _pass_on_questions(self) -> None:
        if self._descriptions.are_waiting and not self._closing.is_set():
            if self._worker is None:
                self._worker = WorkerHandle(self.settings)
            for names in self._descriptions.to_send():
                self._worker.send(DescribeFiles(names))

    def _patience_s(self) -> float | None:
        live = self.current.live
        if live is None:
            return None
        patience_s = self._sleep.patience_s
        if live.kill_at is None:
            return patience_s
        return min(patience_s, max(0.0, live.kill_at - time.monotonic()))

    def _receive(self, worker: WorkerHandle) -> None:
        live = self.current.live
        try:
            event = worker.receive()
        except (EOFError, OSError):
            exit_code = self._end_worker(worker, DEATH_GRACE_S)
            message = describe_death(exit_code, self.settings.log_file)
            message = message if live is None else live.died(message)
            log.warning("%s", message)
            self.current.finish("interrupted", message=message)
            return
        if isinstance(event, WorkerReady):
            worker.ready = True
        elif isinstance(event, FilesDescribed):
            self._descriptions.note(event.names, event.told)
        elif isinstance(event, Pong):
            if live is not None:
                self.current.note(live, Notice(self._sleep.answered()))
        elif live is None or event.job_id != live.id:
            log.warning("worker spoke of job %s, which is over", event.job_id)
        elif isinstance(event, JobEvent):
            self.current.note(live, event.event)
        elif isinstance(event, PreviewKept):
            self.current.note_preview(live, event.step)
        elif isinstance(event, MemoryInPieces):
            self._change_worker(live, worker, event.message)
        elif isinstance(event, JobFinished):
            self.current.finish("done", result=event.result)
        elif isinstance(event, JobFailed):
            self.current.finish("failed", message=event.message)
        elif isinstance(event, JobStopped):
            asked = live.stop_mode is not None or not self._closing.is_set()
            self.current.finish(
                "stopped" if asked else "interrupted",
                message=None if asked else CLOSED_DURING_JOB,
            )
        else:
            assert isinstance(event, JobStarted)

    def _give_up(self, error: Exception) -> None:
        """After an error nobody foresaw: end job and worker, so that the next job starts afresh."""
        worker, live = self._worker, self.current.live
        if worker is not None and live is not None:
            self._worker = None
            worker.end(0.0)
            self._descriptions.worker_is_gone()
        with contextlib.suppress(sqlite3.Error, K1Error):
            self.current.finish("failed", message=f"unexpected error: {error}; see the page's log")
        self._closing.wait(PAUSE_AFTER_STUMBLE_S)

    def _wind_up(self) -> None:
        """End job and worker; the job first gets a moment to put its files away."""
        until = time.monotonic() + self._close_timeout_s * STOP_SHARE
        while (
            (worker := self._worker) is not None and self.current.live is not None and worker.ready
        ):
            if self.current.live.kill_at is None:
                worker.send(StopJob(self.current.live.id, "save"))
                self.current.live.kill_at = until
            if not worker.connection.poll(max(0.0, until - time.monotonic())):
                break
            self._receive(worker)
        if worker is not None:
            worker.send(Shutdown())
            worker.end(self._close_timeout_s * LEAVE_SHARE if worker.ready else 0.0)
            self._worker = None
        self.current.finish("interrupted", message=CLOSED_DURING_JOB)

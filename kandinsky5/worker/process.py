"""The worker process: one pipeline, kept warm, that runs jobs one after another.

Its main thread runs the jobs; a second thread reads commands, so that a stop is heard during a job.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import logging
import logging.handlers
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, Protocol

from kandinsky5.errors import K1Error, OutOfMemory, Stopped
from kandinsky5.events import EventSink, PipelineEvent, PreviewReady
from kandinsky5.output.autosave import StateKeeper
from kandinsky5.pipeline.expanded_prompt import ExpandedPrompt
from kandinsky5.pipeline.preview_pace import PreviewEvery
from kandinsky5.request import GenerationRequest, GenerationResult
from kandinsky5.worker.protocol import (
    DescribeFiles,
    Event,
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
    RunJob,
    Shutdown,
    StopJob,
    WorkerReady,
    WorkerSettings,
)
from kandinsky5.worker.run_files import PreviewFolder

LOG_BYTES = 2_000_000
LOG_BACKUPS = 3
MAX_MESSAGE_CHARACTERS = 2000
_PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


class JobPipeline(Protocol):
    """What the worker needs of a pipeline.

    Attributes:
        models_dirs: folders in which models are looked for; set between jobs.
    """

    models_dirs: Sequence[Path]

    def run(
        self,
        request: GenerationRequest,
        *,
        out: Path,
        emit: EventSink,
        should_stop: Callable[[], bool],
        should_finish: Callable[[], bool],
        previews: PreviewEvery | None,
        states: StateKeeper | None,
    ) -> GenerationResult: ...

    def resume(
        self,
        path: Path,
        *,
        out: Path,
        emit: EventSink,
        should_stop: Callable[[], bool],
        should_finish: Callable[[], bool],
        previews: PreviewEvery | None,
        states: StateKeeper | None,
        keep_paths: bool,
    ) -> GenerationResult: ...

    def expand(
        self,
        request: GenerationRequest,
        *,
        out: Path,
        emit: EventSink,
        should_stop: Callable[[], bool],
    ) -> ExpandedPrompt: ...


@dataclass
class RunControl:
    """How the thread that reads commands reaches a run.

    Attributes:
        states: where the run saves itself, if it does.
        stop: set when the run is to end at its next step.
        finish: set when it is to end there and to decode what it has.
    """

    states: StateKeeper | None
    stop: threading.Event = field(default_factory=threading.Event)
    finish: threading.Event = field(default_factory=threading.Event)

    def is_ending(self) -> bool:
        """Whether it was asked to end in any way."""
        return self.stop.is_set() or self.finish.is_set()

    def end(self, mode: str) -> None:
        """Ask the run to end in one of :data:`~kandinsky5.worker.protocol.STOP_MODES`."""
        if mode == "decode":
            self.finish.set()
            return
        if mode == "save" and self.states is not None:
            self.states.ask_to_save_on_stop()
        self.stop.set()


def serve(connection: Connection, settings: WorkerSettings) -> None:
    """Run jobs from ``connection`` until told to leave or until the parent is gone."""
    _bind_to_parent(settings.parent_pid)
    _log_to(Path(settings.log_file))
    Worker(connection, settings, when_orphaned=_leave_at_once).run()


class Worker:
    """The jobs of one process.

    Args:
        connection: commands come in and events go out here.
        settings: names the pipeline; it is imported and built in :meth:`run`.
        when_orphaned: called when the other end of the connection is gone.
    """

    def __init__(
        self,
        connection: Connection,
        settings: WorkerSettings,
        *,
        when_orphaned: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._when_orphaned = when_orphaned
        self._settings = settings
        self._pipeline: JobPipeline | None = None
        self._jobs: queue.SimpleQueue[RunJob | None] = queue.SimpleQueue()
        self._questions: queue.SimpleQueue[FileNames] = queue.SimpleQueue()
        self._runs: dict[str, RunControl] = {}
        self._leaving = threading.Event()
        self._warmed = threading.Event()
        self._sending = threading.Lock()

    def run(self) -> None:
        """Warm up, then run jobs as they come; returns after a :class:`Shutdown`."""
        threading.Thread(target=self._read_commands, name="k1-commands", daemon=True).start()
        threading.Thread(target=self._describe, name="k1-files", daemon=True).start()
        try:
            self._warm_pipeline()
        except Exception:  # the first job tries again and then says what is wrong
            log.exception("the pipeline could not be built")
        self._warmed.set()
        self._send(WorkerReady(os.getpid()))
        while not self._leaving.is_set():
            job = self._jobs.get()
            if job is not None:
                self._run_job(job)
        log.info("worker leaves")

    def _run_job(self, job: RunJob) -> None:
        """The job boundary: whatever happens inside becomes one event and a line in the log."""
        control = self._runs[job.job_id]
        self._send(JobStarted(job.job_id))
        log.info("job %s started", job.job_id)
        try:
            if control.stop.is_set():
                raise Stopped("stopped before it began")
            result = self._result_of(job, control)
            self._send(JobFinished(job.job_id, result.to_dict()))
            log.info("job %s is done", job.job_id)
        except Stopped:
            log.info("job %s stopped", job.job_id)
            self._send(JobStopped(job.job_id))
        except K1Error as error:
            log.exception("job %s failed", job.job_id)
            if _can_change_worker(job, control, error):
                self._leaving.set()
                self._send(MemoryInPieces(job.job_id, one_line(str(error))))
                return
            self._send(JobFailed(job.job_id, one_line(str(error)), error.exit_code))
        except Exception as error:
            log.exception("job %s failed unexpectedly", job.job_id)
            cause = one_line(f"{type(error).__name__}: {error}")
            message = f"unexpected error: {cause}; see the log {self._settings.log_file}"
            self._send(JobFailed(job.job_id, message, K1Error.exit_code))
        finally:
            self._runs.pop(job.job_id, None)

    def _result_of(self, job: RunJob, control: RunControl) -> GenerationResult | ExpandedPrompt:
        folder = None if job.previews_dir is None else PreviewFolder(Path(job.previews_dir))

        def emit(event: PipelineEvent) -> None:
            if not isinstance(event, PreviewReady):
                self._send(JobEvent(job.job_id, event))
            elif folder is not None:
                self._keep_preview(job.job_id, folder, event)

        pipeline = self._warm_pipeline()
        if job.models_dirs is not None:
            pipeline.models_dirs = tuple(map(Path, job.models_dirs))
        previews = None if folder is None else PreviewEvery()
        out, should_stop, states = Path(job.out), control.stop.is_set, control.states
        if job.kind == "expand":
            request = GenerationRequest.from_dict(job.request)
            return pipeline.expand(request, out=out, emit=emit, should_stop=control.is_ending)
        if job.resume_from is not None:
            return pipeline.resume(
                Path(job.resume_from),
                out=out,
                emit=emit,
                should_stop=should_stop,
                should_finish=control.finish.is_set,
                previews=previews,
                states=states,
                keep_paths=True,  # the page's own state, of a request that it let pass
            )
        return pipeline.run(
            GenerationRequest.from_dict(job.request),
            out=out,
            emit=emit,
            should_stop=should_stop,
            should_finish=control.finish.is_set,
            previews=previews,
            states=states,
        )

    def _describe(self) -> None:
        """Answer what is asked about files, one question after another, whether a job runs or not."""
        self._warmed.wait()  # two threads that import torch at once get in each other's way
        while True:
            names = self._questions.get()
            try:
                told = described(names)
            except Exception as error:  # whatever lies in a file, the next one is still answered
                log.exception("%s could not be described", names)
                told = {"problem": one_line(f"{type(error).__name__}: {error}")}
            self._send(FilesDescribed(names, told))

    def _keep_preview(self, job_id: str, folder: PreviewFolder, event: PreviewReady) -> None:
        try:
            folder.write(event.step, event.webp)
        except OSError as error:  # a full disk must not end a job for the sake of its preview
            log.warning("the preview of step %d could not be kept: %s", event.step, error)
        else:
            self._send(PreviewKept(job_id, event.step, event.total))

    def _warm_pipeline(self) -> JobPipeline:
        if self._pipeline is None:
            module, _, name = self._settings.pipeline.partition(":")
            build = getattr(importlib.import_module(module), name)
            self._pipeline = build(models_dirs=tuple(map(Path, self._settings.models_dirs)))
        return self._pipeline

    def _send(self, event: Event) -> None:
        try:
            with self._sending:
                self._connection.send(event)
        except OSError:
            log.warning("nobody hears %s", type(event).__name__)

    def _read_commands(self) -> None:
        while True:
            try:
                command = self._connection.recv()
            except (EOFError, OSError):
                self._when_orphaned()
                return
            if isinstance(command, RunJob):
                folder = command.states_dir
                states = None if folder is None else StateKeeper(Path(folder))
                self._runs[command.job_id] = RunControl(states)
                self._jobs.put(command)
            elif isinstance(command, Ping):
                self._send(Pong())
            elif isinstance(command, DescribeFiles):
                self._questions.put(command.names)
            elif isinstance(command, StopJob):
                if control := self._runs.get(command.job_id):
                    control.end(command.mode)
            elif isinstance(command, Shutdown):
                self._leaving.set()
                for control in list(self._runs.values()):
                    control.end("save")
                self._jobs.put(None)


def described(names: FileNames) -> dict[str, Any]:
    """What the files are, by what stands in their headers."""
    from kandinsky5.pipeline.named_files import NamedFiles, describe_files  # imports torch

    named = NamedFiles(names.preset, names.dit, names.model_dir, names.loras)
    return describe_files(named, tuple(map(Path, names.models_dirs)))


def _can_change_worker(job: RunJob, control: RunControl, error: K1Error) -> bool:
    """Whether another process would have the memory that this one lacks, and a state to go on from."""
    in_pieces = isinstance(error, OutOfMemory) and error.in_pieces
    saved = control.states is not None and control.states.newest() is not None
    return in_pieces and saved and job.may_change_worker


def one_line(text: str) -> str:
    """The text without line breaks, cut to :data:`MAX_MESSAGE_CHARACTERS`."""
    joined = " ".join(text.split())
    return (
        joined if len(joined) <= MAX_MESSAGE_CHARACTERS else joined[:MAX_MESSAGE_CHARACTERS] + "…"
    )


def _bind_to_parent(parent_pid: int) -> None:
    """Leave Ctrl-C to the parent, lead an own process group, and die when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "win32":
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        os.setsid()
    except PermissionError:
        log.debug("already leads a process group")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        _leave_at_once()


def _leave_at_once() -> NoReturn:
    """The parent is gone: nobody waits for the result, so this process and its children end here."""
    log.warning("the page is gone; the worker leaves")
    if sys.platform != "win32" and os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _log_to(file: Path) -> None:
    """Everything this process says goes to a rotating file, with the stack of a crash in native code."""
    handler = logging.handlers.RotatingFileHandler(
        file, maxBytes=LOG_BYTES, backupCount=LOG_BACKUPS, encoding="utf-8"
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    with file.open("a", encoding="utf-8") as sink:
        for stream in (1, 2):
            os.dup2(sink.fileno(), stream)
    faulthandler.enable(file=2)
    log.info("worker %d", os.getpid())

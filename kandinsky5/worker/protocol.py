"""What page and worker say to each other: commands go to the worker, events come back.

Plain frozen dataclasses, pickled through a pipe. Only the standard library is needed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kandinsky5.events import PipelineEvent

DEFAULT_PIPELINE = "kandinsky5.pipeline.pipeline:caching_pipeline"
STOP_MODES = ("discard", "save")
"""What becomes of a stopped job: what it has painted is dropped, or saved to be resumed."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is started with.

    Attributes:
        log_file: where it logs; the folder exists.
        parent_pid: the process without which it has no reason to live.
        models_dirs: folders in which models are looked for.
        pipeline: ``module:name`` of what is called with ``models_dirs=`` and gives an object with ``run``.
    """

    log_file: str
    parent_pid: int
    models_dirs: tuple[str, ...] = ()
    pipeline: str = DEFAULT_PIPELINE


@dataclass(frozen=True)
class RunJob:
    """Run this job after those sent before it.

    Attributes:
        request: as :meth:`kandinsky5.request.GenerationRequest.to_dict` gives it.
        out: final path of the result.
        resume_from: the saved state to go on from, instead of beginning anew.
        previews_dir: previews go there; None makes none.
        states_dir: states of the unfinished run go there; None saves none.
    """

    job_id: str
    request: dict[str, Any]
    out: str
    resume_from: str | None = None
    previews_dir: str | None = None
    states_dir: str | None = None


@dataclass(frozen=True)
class StopJob:
    """End this job at its next step; ``mode`` is one of :data:`STOP_MODES`."""

    job_id: str
    mode: str = "discard"


@dataclass(frozen=True)
class Shutdown:
    """Stop the running job, forget those waiting, and leave."""


@dataclass(frozen=True)
class WorkerReady:
    """The worker has imported what it needs; the next job starts without delay."""

    pid: int


@dataclass(frozen=True)
class JobStarted:
    """The worker turned to this job."""

    job_id: str


@dataclass(frozen=True)
class JobEvent:
    """The pipeline said something about this job."""

    job_id: str
    event: PipelineEvent


@dataclass(frozen=True)
class PreviewKept:
    """The picture of the job after ``step`` of ``total`` steps is in its folder."""

    job_id: str
    step: int
    total: int


@dataclass(frozen=True)
class JobFinished:
    """The result is on disk.

    Attributes:
        result: as :meth:`kandinsky5.request.GenerationResult.to_dict` gives it.
    """

    job_id: str
    result: dict[str, Any]


@dataclass(frozen=True)
class JobFailed:
    """The job ended without a result.

    Attributes:
        message: one line for the user.
        exit_code: what the command line would exit with.
    """

    job_id: str
    message: str
    exit_code: int


@dataclass(frozen=True)
class JobStopped:
    """The job ended because it was told to."""

    job_id: str


Command = RunJob | StopJob | Shutdown
Event = WorkerReady | JobStarted | JobEvent | PreviewKept | JobFinished | JobFailed | JobStopped

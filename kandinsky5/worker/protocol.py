"""What page and worker say to each other: commands go to the worker, events come back.

Plain frozen dataclasses, pickled through a pipe. Only the standard library is needed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kandinsky5.events import PipelineEvent

DEFAULT_PIPELINE = "kandinsky5.pipeline.pipeline:caching_pipeline"
JOB_KINDS = ("generate", "expand")
"""What a job makes: a file, or only its prompt rewritten."""
STOP_MODES = ("discard", "save", "decode")
"""What becomes of a stopped job: what it has painted is dropped, saved to be resumed, or saved and decoded as
far as it has come."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is started with.

    Attributes:
        log_file: where it logs; the folder exists.
        parent_pid: the process without which it has no reason to live.
        models_dirs: folders in which models are looked for, unless a job names others.
        pipeline: ``module:name`` of what is called with ``models_dirs=`` and gives an object with ``run``.
    """

    log_file: str
    parent_pid: int
    models_dirs: tuple[str, ...] = ()
    pipeline: str = DEFAULT_PIPELINE


@dataclass(frozen=True)
class FileNames:
    """Model files as a form names them, with what tells whether they are still the same.

    Attributes:
        preset: for which they shall serve.
        dit, model_dir: as in a request; None where not named.
        loras: paths, or names in a folder for models.
        stamps: one (mtime in ns, bytes) for each of them that is there.
        models_dirs: folders in which models are looked for.
    """

    preset: str
    dit: str | None = None
    model_dir: str | None = None
    loras: tuple[str, ...] = ()
    stamps: tuple[tuple[int, int], ...] = ()
    models_dirs: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunJob:
    """Run this job after those sent before it.

    Attributes:
        kind: one of :data:`JOB_KINDS`.
        request: as :meth:`kandinsky5.request.GenerationRequest.to_dict` gives it.
        out: final path of the result.
        resume_from: the saved state to go on from, instead of beginning anew.
        previews_dir: previews go there; None makes none.
        states_dir: states of the unfinished run go there; None saves none.
        may_change_worker: whether it can go on in another worker when memory lies in pieces.
        models_dirs: folders in which models are looked for; None: those that the worker started with.
    """

    job_id: str
    request: dict[str, Any]
    out: str
    resume_from: str | None = None
    previews_dir: str | None = None
    states_dir: str | None = None
    kind: str = "generate"
    may_change_worker: bool = True
    models_dirs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class DescribeFiles:
    """Say what these files are, at once and beside whatever runs."""

    names: FileNames


@dataclass(frozen=True)
class StopJob:
    """End this job at its next step; ``mode`` is one of :data:`STOP_MODES`."""

    job_id: str
    mode: str = "discard"


@dataclass(frozen=True)
class Ping:
    """Answer with :class:`Pong`, at once and beside whatever runs."""


@dataclass(frozen=True)
class Shutdown:
    """Stop the running job, forget those waiting, and leave."""


@dataclass(frozen=True)
class WorkerReady:
    """The worker has imported what it needs; the next job starts without delay."""

    pid: int


@dataclass(frozen=True)
class Pong:
    """The worker is there."""


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
class FilesDescribed:
    """What the files are, as :func:`kandinsky5.pipeline.named_files.describe_files` tells it."""

    names: FileNames
    told: dict[str, Any]


@dataclass(frozen=True)
class JobFinished:
    """The job is done; what it made is on disk.

    Attributes:
        result: as the ``to_dict`` of :class:`kandinsky5.request.GenerationResult`, or of
            :class:`kandinsky5.pipeline.expanded_prompt.ExpandedPrompt`, gives it.
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
class MemoryInPieces:
    """The job ran out of memory that a new process could use; its state is saved and this worker leaves.

    Attributes:
        message: where it ran out, one line.
    """

    job_id: str
    message: str


@dataclass(frozen=True)
class JobStopped:
    """The job ended because it was told to."""

    job_id: str


Command = RunJob | DescribeFiles | StopJob | Ping | Shutdown
JobNews = (
    JobStarted | JobEvent | PreviewKept | MemoryInPieces | JobFinished | JobFailed | JobStopped
)
Event = WorkerReady | Pong | FilesDescribed | JobNews

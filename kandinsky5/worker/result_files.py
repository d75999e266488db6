"""Where results go, and which files on disk are a job's own to be deleted. Only the standard library."""

from __future__ import annotations

import stat
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from kandinsky5.errors import UserError
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest
from kandinsky5.worker.folders import Folders
from kandinsky5.worker.job_snapshot import JobSnapshot

NAMING_FIELDS = ("image", "init_latents", "save_latents", "out")
"""Fields of a request that name a file which may lie among the results."""
RESULT_SUFFIXES = (".mp4", ".png")
CLOCK_SLACK_S = 2.0
"""A file system may round the time of a change down by so much."""


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


def delete_results(job: JobSnapshot, folders: Folders, others: Iterable[JobSnapshot]) -> list[str]:
    """Delete the results and the latents that a job wrote where results go, and nothing else.

    Kept are links, whatever lies outside these folders, what another job made or names, and what was there
    before the job. A file that is gone already is none to speak of.

    Args:
        job: one that is over.
        folders: of the results, now and before.
        others: every other job.

    Returns:
        A line for each file of the job that is still there on purpose.

    Raises:
        UserError: a file could not be deleted; the rest is left as it is.
    """
    shared = {_place(path) for other in others for path in _named(other)}
    kept = []
    for path in _own(job):
        reason = _why_kept(path, job, folders, shared)
        if reason is not None:
            kept.append(f"{path} stays: {reason}")
            continue
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            advice = f"a file that can be deleted ({error.strerror}); the job stays in the list"
            raise UserError("file", str(path), advice) from error
    return kept


def _own(job: JobSnapshot) -> list[Path]:
    """Files that the job may have written, the latest last."""
    names = [*job.outputs, job.output]
    if job.total and job.step >= job.total:  # latents are written behind the last step
        names.append(job.request.get("save_latents"))
    return [Path(name).expanduser().absolute() for name in dict.fromkeys(names) if name]


def _named(job: JobSnapshot) -> list[Path]:
    """Files that a job made, or that its request names."""
    names = [*job.outputs, job.output, *(job.request.get(field) for field in NAMING_FIELDS)]
    return [Path(name) for name in names if isinstance(name, str) and name]


def _place(path: Path) -> Path:
    return path.expanduser().resolve()


def _why_kept(path: Path, job: JobSnapshot, folders: Folders, shared: set[Path]) -> str | None:
    """Why a file is not deleted; None where it is, or is gone."""
    try:
        found = path.lstat()
    except OSError:
        return None
    place = _place(path)
    if not stat.S_ISREG(found.st_mode):
        return "it is no plain file"
    if not folders.holds_result(path):
        return "it lies outside the outputs folder"
    if place in shared:
        return "another job uses it"
    is_result = path.suffix in RESULT_SUFFIXES
    if not is_result and found.st_mtime < (job.started_at or 0.0) - CLOCK_SLACK_S:
        return "it is older than the job"
    return None

"""Where the files of runs lie in the state folder: previews and saved states. Only the standard library.

Names are made of job ids and step numbers alone; nothing a visitor sends becomes part of a path unchecked.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

log = logging.getLogger(__name__)

KEPT_PREVIEW_FOLDERS = 12
"""Of the jobs that ran last."""
MAX_PREVIEWS = 64
"""Of one job; a pipeline makes no more than 60."""
_JOB_ID = re.compile(r"[0-9a-zA-Z_-]{1,64}")


class PreviewFolder:
    """Previews of one job, one file for each step: ``NNNNN.webp``.

    Args:
        folder: made with the first preview.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, step: int) -> Path:
        return self._folder / f"{step:05d}.webp"

    def write(self, step: int, webp: bytes) -> None:
        """Keep a preview, whole or not at all, and drop the oldest beyond :data:`MAX_PREVIEWS`.

        Raises:
            OSError: it could not be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._folder / f"{step:05d}.part"
        try:
            # Not synced: after a power cut nobody misses a preview.
            unfinished.write_bytes(webp)
            os.replace(unfinished, self.path(step))
        finally:
            unfinished.unlink(missing_ok=True)
        for old in sorted(self._folder.glob("*.webp"))[:-MAX_PREVIEWS]:
            old.unlink(missing_ok=True)


class RunFiles:
    """The files of all runs of one state folder."""

    def __init__(self, state_dir: Path) -> None:
        self._previews = state_dir / "previews"
        self._states = state_dir / "states"

    def previews_dir(self, job_id: str) -> Path:
        """Raises ValueError for what is no job's id."""
        return self._previews / _checked(job_id)

    def states_dir(self, job_id: str) -> Path:
        """Raises ValueError for what is no job's id."""
        return self._states / _checked(job_id)

    def begin(self, job_id: str) -> None:
        """Make room for a run that begins anew: nothing of its own is left, old previews of others go."""
        self.forget_states(job_id)
        _remove(self.previews_dir(job_id))
        try:
            folders = [path for path in self._previews.iterdir() if path.is_dir()]
            folders.sort(key=lambda path: path.stat().st_mtime)
        except OSError:
            return
        for old in folders[: max(0, len(folders) - KEPT_PREVIEW_FOLDERS + 1)]:
            _remove(old)

    def forget_states(self, job_id: str) -> None:
        """Remove the saved states of a job."""
        _remove(self.states_dir(job_id))

    def delete(self, job_id: str) -> list[str]:
        """Remove the saved states and previews of a job; gives a line for each folder that stays.

        A folder that is a link is not followed.
        """
        folders = (self.states_dir(job_id), self.previews_dir(job_id))
        for folder in folders:
            _remove(folder)
        return [f"{folder} could not be removed" for folder in folders if os.path.lexists(folder)]


def _checked(job_id: str) -> str:
    if not _JOB_ID.fullmatch(job_id):
        raise ValueError(f"{job_id!r} is no job's id")
    return job_id


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s could not be removed: %s", folder, error)

"""Files that are being written, and the removal of those that a killed program left behind.

Every unfinished file is named ``.k1-<random>.part``. Whoever writes one holds a shared lock on its folder,
which the system lets go when the program ends, however it ends. A folder that can be locked exclusively
therefore holds no file that anybody still writes.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
from pathlib import Path
from types import TracebackType

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

PREFIX, SUFFIX = ".k1-", ".part"
LOCK_PATIENCE_S = 5.0
"""A sweep holds the exclusive lock for a moment; a stranger that keeps it must not hang the program."""


class UnfinishedFiles:
    """Names for files to be written in one folder; what is still there under them goes at the end.

    Making one first removes what killed programs left in the folder. Where folders cannot be locked (Windows,
    some network file systems) nothing can be told dead, and nothing but the own names is removed.

    Args:
        folder: where the final names are; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: list[Path] = []
        self._lock: int | None = None
        if sys.platform != "win32":
            self._lock = _locked(folder)

    def new(self) -> Path:
        """A hidden name in the folder that nothing else uses; no file is made."""
        path = self._folder / f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}"
        self._paths.append(path)
        return path

    def close(self) -> None:
        """Remove what is left under the names given; calling it again does nothing.

        Raises:
            OSError: a file could not be removed; the folder is let go all the same.
        """
        try:
            while self._paths:
                self._paths.pop().unlink(missing_ok=True)
        finally:
            lock, self._lock = self._lock, None
            if lock is not None:
                os.close(lock)

    def __enter__(self) -> UnfinishedFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _locked(folder: Path) -> int | None:
    """A descriptor of the folder that holds the shared lock, the folder swept if nobody else writes there."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        log.debug("%s cannot be opened: %s", folder, error)
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _sweep(folder)
    except OSError as error:  # somebody writes here, or the file system knows no such lock
        log.debug("%s is not swept: %s", folder, error)
    if _share(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _share(descriptor: int) -> bool:
    """Take the shared lock, or turn the exclusive one into it; False where that cannot be."""
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                log.warning("another program keeps the output folder locked")
                return False
            time.sleep(0.01)
        except OSError:
            return False


def _sweep(folder: Path) -> None:
    """Remove the unfinished files of a folder in which nobody writes."""
    for path in folder.glob(f"{PREFIX}*{SUFFIX}"):
        if not path.is_file() or path.is_symlink():
            continue
        try:
            path.unlink(missing_ok=True)
            log.info("removed %s, left by a program that was killed", path.name)
        except OSError as error:
            log.warning("%s could not be removed: %s", path, error)

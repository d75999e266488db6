"""Whole files under final names: written beside under a hidden name, synced, then renamed."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kandinsky5.errors import K1Error, UserError
from kandinsky5.output.unfinished import UnfinishedFiles

log = logging.getLogger(__name__)

MEGABYTE = 10**6
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(K1Error):
    """The disk has too little room, before the start or while writing.

    Args:
        path: the file that was to be written.
        needed_bytes: what it takes, an estimate.
        free_bytes: what is free in its folder.
    """

    def __init__(self, path: str | Path, needed_bytes: int, free_bytes: int) -> None:
        needs, free = needed_bytes / MEGABYTE, free_bytes / MEGABYTE
        super().__init__(
            f"{path}: too little room on the disk: needs {needs:.1f} MB, {free:.1f} MB free; "
            "free some space or choose another folder"
        )
        self.path, self.needed_bytes, self.free_bytes = str(path), needed_bytes, free_bytes

    def __reduce__(self) -> tuple[type[DiskFull], tuple[str, int, int]]:
        return type(self), (self.path, self.needed_bytes, self.free_bytes)


def prepare_output(path: str | Path, *, needed_bytes: int = 0) -> Path:
    """Make sure that a file can be written at ``path``, before any work is put into it.

    Missing folders are created, and a file is written in the folder and removed: permission bits do not tell
    about read-only mounts and quotas. Unfinished files of programs that were killed are removed.

    Args:
        path: the final name; ``~`` is expanded.
        needed_bytes: room that the file will take, as far as is known.

    Returns:
        The absolute path.

    Raises:
        UserError: field ``out``: the folder cannot be made or written, or a folder or device has the name.
        DiskFull: less than ``needed_bytes`` is free.
    """
    try:
        final = Path(path).expanduser().absolute()
        final.parent.mkdir(parents=True, exist_ok=True)
        _refuse_what_is_no_file(final)
        with UnfinishedFiles(final.parent) as unfinished:
            unfinished.new().write_bytes(b"k1")
    # RuntimeError: "~" where there is no home; ValueError: a NUL character.
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise DiskFull(path, max(needed_bytes, MEGABYTE), 0) from error
        reason = (isinstance(error, OSError) and error.strerror) or error
        allowed = f"cannot be written ({reason}); choose a file in a folder you can write"
        raise UserError("out", str(path), allowed) from error
    require_space(final, needed_bytes)
    return final


def _refuse_what_is_no_file(final: Path) -> None:
    try:
        mode = final.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "device"
        raise UserError("out", str(final), f"this is a {kind}; give the name of a file")


def require_space(path: Path, needed_bytes: int) -> None:
    """Raise :class:`DiskFull` when the folder of ``path`` has less than ``needed_bytes`` free."""
    free = free_bytes(path.parent)
    if free < needed_bytes:
        raise DiskFull(path, needed_bytes, free)


def free_bytes(folder: Path) -> int:
    """What an ordinary user may still write in ``folder``."""
    return shutil.disk_usage(folder).free


def put_in_place(temporary: Path, final: Path) -> None:
    """Sync ``temporary``, give it its final name in the same folder, sync the folder.

    Raises:
        OSError: the data did not reach the disk, or the rename failed; ``final`` is then as it was.
    """
    with temporary.open("r+b") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    if os.name != "posix":
        return  # elsewhere folders cannot be opened, and the rename is journalled
    try:
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:  # some network file systems cannot; the file itself is safe and named
        log.warning("%s could not be synced: %s", final.parent, error)


@contextmanager
def replacing(path: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary path to write to; it takes the place of ``path`` when the block ends well, else it goes.

    Args:
        path: the final name, from :func:`prepare_output`.
        needed_bytes: size of the file, for the message when the disk is full.

    Raises:
        DiskFull: the disk filled up.
        K1Error: the file could not be written for another reason of the system's.
    """
    unfinished = UnfinishedFiles(path.parent)
    try:
        temporary = unfinished.new()
        yield temporary
        put_in_place(temporary, path)
    except OSError as error:
        unfinished.close()
        raise write_error(path, error, needed_bytes) from error
    finally:
        unfinished.close()


def write_error(path: Path, error: OSError, needed_bytes: int) -> K1Error:
    """The error to show for one of the system's; call it when the temporary file is gone."""
    if error.errno in _FULL:
        return DiskFull(path, needed_bytes, free_bytes(path.parent))
    return K1Error(f"{path}: cannot be written ({error.strerror or error}); check disk and folder")

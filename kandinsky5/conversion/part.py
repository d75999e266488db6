"""A converted file under way: ``NAME.k1-part`` beside the target, which a later run can go on with.

While it is unfinished, a record stands where the header will be: which conversion this is and how many
tensors are safely on the disk. The header comes last, its own first bytes last of all, so that at every
moment the file is either unfinished with a true record, or whole.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import time
from pathlib import Path

from kandinsky5.conversion.plan import ConversionPlan
from kandinsky5.errors import CheckpointError, UserError
from kandinsky5.model.checkpoint import Checkpoint
from kandinsky5.output.atomic import put_in_place

if sys.platform != "win32":
    import fcntl

SUFFIX = ".k1-part"
SYNC_BYTES = 256 << 20
RECORD_S = 1.0
"""A record is kept after so many bytes and after so long, whichever is first: what a kill costs at worst."""

_MAGIC = b"K1 part1"
_RECORD = struct.Struct("<8s32s32sQ")
_CHECK_BYTES = 16
RECORD_BYTES = _RECORD.size + _CHECK_BYTES


class PartFile:
    """The unfinished file of one conversion, open for writing. Close it, or use ``with``.

    Args:
        final: name of the finished file.
        plan: the conversion.
        source: what is converted.

    Attributes:
        path: the unfinished file.
        done: how many recipes were done by earlier runs.

    Raises:
        CheckpointError: it was begun from a source that has changed since.
        UserError: field ``out``: another program is writing it, or has just finished it.
        OSError: it cannot be opened or written.
    """

    def __init__(self, final: Path, plan: ConversionPlan, source: Checkpoint) -> None:
        self.path = part_of(final)
        self._final, self._plan = final, plan
        self._identity = (hashlib.sha256(plan.header).digest(), source_digest(source))
        self._unsynced_bytes, self._recorded_at = 0, time.monotonic()
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(self.path, flags, 0o666)
        try:
            self._lock()
            self._check_name()
            self.done = self._begun(source)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, data: memoryview) -> None:
        """Write one tensor to its place. Raises OSError."""
        self._write_all(data, self._plan.places[name])
        self._unsynced_bytes += len(data)

    def record(self, done: int) -> None:
        """So many recipes are done; every so often this is made sure of on the disk. Raises OSError."""
        is_late = time.monotonic() - self._recorded_at >= RECORD_S
        if self._unsynced_bytes >= SYNC_BYTES or is_late:
            self._keep_record(done)

    def finish(self) -> None:
        """Everything is written: turn it into a checkpoint and give it its name. Raises OSError."""
        self._keep_record(len(self._plan.recipes))
        header = memoryview(self._plan.header)
        self._write_all(header[RECORD_BYTES:], RECORD_BYTES)
        os.fsync(self._descriptor)
        self._write_all(header[:RECORD_BYTES], 0)
        put_in_place(self.path, self._final)

    def close(self) -> None:
        """Let go of the file, finished or not."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            allowed = "another conversion is writing this file; wait for it, or choose another name"
            raise UserError("out", str(self._final), allowed) from error
        except OSError:
            return  # some network file systems have no locks; then nobody else is told

    def _check_name(self) -> None:
        """Make sure that the locked file still has the name: whoever had the lock may have finished it.

        What is finished is nobody's to write: its first bytes would become a record again.
        """
        opened = os.fstat(self._descriptor)
        try:
            named = os.stat(self.path)
        except FileNotFoundError:
            named = None
        if named is None or (named.st_dev, named.st_ino) != (opened.st_dev, opened.st_ino):
            allowed = "another conversion has just finished this file; look at it, or start again"
            raise UserError("out", str(self._final), allowed)

    def _begun(self, source: Checkpoint) -> int:
        """How many recipes an earlier run has done; a file of anything else is begun anew."""
        count = len(self._plan.recipes)
        first = os.pread(self._descriptor, len(self._plan.header), 0)
        if first == self._plan.header and self._is_younger_than(source):
            return count  # it was whole, and only its name was missing
        found = _parsed(first[:RECORD_BYTES])
        if found is not None:
            (of_plan, of_source), done = found
            if (of_plan, of_source) == self._identity and done <= count:
                return done
            if of_source != self._identity[1]:
                raise CheckpointError(
                    source.path,
                    f"is not, or no longer, the file that {self.path} was begun from:"
                    " delete that one to start again",
                )
        os.ftruncate(self._descriptor, 0)
        os.ftruncate(self._descriptor, self._plan.size_bytes)
        self._keep_record(0)
        return 0

    def _is_younger_than(self, source: Checkpoint) -> bool:
        """Whether no file of the source was written to since; a header tells of the ends of tensors only."""
        written_ns = os.fstat(self._descriptor).st_mtime_ns
        return all(file.modified_ns <= written_ns for file in source.files)

    def _keep_record(self, done: int) -> None:
        os.fsync(self._descriptor)  # what the record says is there must be there before it
        record = _RECORD.pack(_MAGIC, *self._identity, done)
        self._write_all(memoryview(record + hashlib.sha256(record).digest()[:_CHECK_BYTES]), 0)
        self._unsynced_bytes, self._recorded_at = 0, time.monotonic()

    def _write_all(self, data: memoryview, place: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], place + done)


def part_of(final: Path) -> Path:
    """The unfinished file's name."""
    return final.with_name(final.name + SUFFIX)


def written_bytes(final: Path) -> int:
    """How much room on the disk an earlier run has taken already."""
    try:
        status = os.stat(part_of(final))
    except OSError:
        return 0
    blocks = getattr(status, "st_blocks", None)  # the file has its full length from the beginning
    return status.st_size if blocks is None else blocks * 512


def source_digest(checkpoint: Checkpoint) -> bytes:
    """What a source is, 32 bytes: its header, and size and time of its files."""
    files = [(file.size_bytes, file.modified_ns) for file in checkpoint.files]
    return hashlib.sha256(repr((checkpoint.header_sha256, files)).encode("ascii")).digest()


def _parsed(record: bytes) -> tuple[tuple[bytes, bytes], int] | None:
    """((plan, source), recipes done), or None for what is no whole record."""
    if len(record) != RECORD_BYTES or not record.startswith(_MAGIC):
        return None
    body, check = record[: _RECORD.size], record[_RECORD.size :]
    if hashlib.sha256(body).digest()[:_CHECK_BYTES] != check:
        return None
    _, plan, source, done = _RECORD.unpack(body)
    return (plan, source), done

"""Where a block's bytes come from: main memory that holds them all, or a file read just ahead of use.

A source is filled by a function ``fill(index, slab)`` that writes block ``index`` into ``slab`` (uint8, as
long as the block's layout says). One thread of the source does this while a streamer uses it; what goes
wrong there is raised where the block is needed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from kandinsky5.errors import OutOfMemory
from kandinsky5.memory.course import Course
from kandinsky5.memory.host import HostSlab, PageLock
from kandinsky5.memory.layout import BlockLayout
from kandinsky5.memory.transfer import Fence

log = logging.getLogger(__name__)

Fill = Callable[[int, torch.Tensor], None]

PAGEABLE_NOTICE = (
    "the system refused to page-lock memory for the weights: they are copied from ordinary memory, which"
    " takes two to three times as long; free some main memory, or let fewer blocks be streamed"
)


class WeightSource(Protocol):
    """Gives blocks as bytes in main memory, to one streamer at a time.

    Attributes:
        layouts: of every block.
    """

    layouts: tuple[BlockLayout, ...]

    def start(self, course: Course, ready: Callable[[], None]) -> None:
        """Begin: the blocks of this course will be wanted in its order, as far as it goes.

        ``ready`` is called, by any thread, when a block has become available. The course changes between
        calls of this source's methods alone.
        """
        ...

    def peek(self, index: int) -> torch.Tensor | None:
        """A block's bytes, None while they are not there. Out of the order it may take a detour."""
        ...

    def wait(self, index: int) -> None:
        """Wait until asking for the block again is worthwhile.

        Raises:
            Exception: what went wrong when it was read.
        """
        ...

    def done(self, index: int, copied: Fence) -> None:
        """The bytes are no longer needed once ``copied`` is passed."""
        ...

    def read(self, index: int, slab: torch.Tensor) -> None:
        """Write a block into a slab given by the caller (uint8), whether started or not."""
        ...

    def stop(self) -> None:
        """End what :meth:`start` began: no thread and no read is left. It may be started again."""
        ...

    def close(self) -> None:
        """Stop and give all memory back; the streamer has been closed before."""
        ...


class _Reader:
    """The one thread that fills slabs, in the order of asking."""

    def __init__(self, ready: Callable[[], None]) -> None:
        self._ready = ready
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="k1-weights")

    def submit(self, read: Callable[[], torch.Tensor]) -> Future[torch.Tensor]:
        future = self._thread.submit(read)
        self._thread.submit(self._ready)  # a task of its own, so that it finds the future done
        return future

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


def _check_unused(reader: _Reader | None) -> None:
    if reader is not None:
        raise RuntimeError("this source feeds another streamer: close that one first")


def _result(future: Future[torch.Tensor] | None) -> torch.Tensor | None:
    """What was read, None while it is not there or when it failed."""
    if future is None or not future.done() or future.cancelled() or future.exception():
        return None
    return future.result()


class PinnedSource:
    """All blocks in main memory, each in a page-locked slab of exactly its size.

    They are read once, in the order of the first pass through the blocks, while that pass is under way:
    the first step need not wait for the last block. Afterwards they stay until :meth:`close`.

    Args:
        layouts: of every block.
        fill: writes a block's bytes; called from another thread.
        page_lock: locks the memory; None leaves it pageable, as is right for a CPU.

    Attributes:
        notice: what to tell the user when locking was refused, else None.
    """

    def __init__(
        self, layouts: Sequence[BlockLayout], fill: Fill, *, page_lock: PageLock | None = None
    ) -> None:
        self.layouts = tuple(layouts)
        self.notice: str | None = None
        self._fill, self._page_lock = fill, page_lock
        self._slabs: dict[int, HostSlab] = {}
        self._reads: dict[int, Future[torch.Tensor]] = {}
        self._reader: _Reader | None = None

    @property
    def host_bytes(self) -> int:
        """Main memory held now."""
        return sum(slab.bytes.numel() for slab in tuple(self._slabs.values()))

    def start(self, course: Course, ready: Callable[[], None]) -> None:
        _check_unused(self._reader)
        self._reader = _Reader(ready)
        for index in course.order:
            self._submit(index)

    def peek(self, index: int) -> torch.Tensor | None:
        return _result(self._reads.get(index))

    def wait(self, index: int) -> None:
        read = self._reads.get(index)
        if read is None:
            return
        try:
            read.result()
        except CancelledError:
            pass  # stopped meanwhile; who asks again is told
        except Exception:
            self._submit(index)  # whatever it was may be gone when somebody asks again
            raise

    def done(self, index: int, copied: Fence) -> None:
        """They stay."""

    def read(self, index: int, slab: torch.Tensor) -> None:
        held = self.peek(index)
        if held is None:
            self._fill(index, slab)
        else:
            slab.copy_(held)

    def stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._reads = {i: read for i, read in self._reads.items() if _result(read) is not None}

    def close(self) -> None:
        self.stop()
        self._reads.clear()
        for slab in self._slabs.values():
            slab.free()
        self._slabs.clear()

    def _submit(self, index: int) -> None:
        if self._reader is not None and self.peek(index) is None:
            self._reads[index] = self._reader.submit(lambda: self._loaded(index))

    def _loaded(self, index: int) -> torch.Tensor:
        if index not in self._slabs:
            slab = HostSlab(max(1, self.layouts[index].nbytes), self._page_lock)
            self._slabs[index] = slab
            if self._page_lock is not None and not slab.locked and self.notice is None:
                self.notice = PAGEABLE_NOTICE
                log.warning("block %d: %s", index, self.notice)
        slab = self._slabs[index]
        self._fill(index, slab.bytes)
        return slab.bytes


@dataclass(eq=False)
class _RingSlab:
    slab: HostSlab
    free: Fence | None = None


class DiskSource:
    """Blocks read from a file just before they are needed, into a few page-locked slabs used in turn.

    Main memory holds ``ring`` blocks. In a pass through the blocks in their order every byte is read once,
    and none beyond the end of the course; a jump elsewhere throws away what was read ahead.

    Args:
        layouts: of every block.
        fill: reads a block's bytes; called from another thread.
        ring: how many slabs; two let the disk work while a copy is under way.
        page_lock: locks the slabs; None leaves them pageable.

    Attributes:
        notice: what to tell the user when locking was refused, else None.
        reads: how many blocks have been read.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        fill: Fill,
        *,
        ring: int = 2,
        page_lock: PageLock | None = None,
    ) -> None:
        if ring < 1:
            raise ValueError(f"a ring of {ring} slabs: at least one is needed")
        self.layouts = tuple(layouts)
        self.notice: str | None = None
        self.reads = 0
        self._fill, self._page_lock, self._ring = fill, page_lock, ring
        self._slabs: list[_RingSlab] = []
        self._course = Course(())
        self._next = 0
        self._reads: dict[int, tuple[_RingSlab, Future[torch.Tensor]]] = {}
        self._reader: _Reader | None = None
        self._lock = threading.Lock()

    @property
    def host_bytes(self) -> int:
        """Main memory held now."""
        return sum(item.slab.bytes.numel() for item in self._slabs)

    def start(self, course: Course, ready: Callable[[], None]) -> None:
        _check_unused(self._reader)
        self._course = course
        largest = max((self.layouts[index].nbytes for index in course.order), default=0)
        try:
            for _ in range(min(self._ring, len(course.order))):
                self._slabs.append(_RingSlab(HostSlab(max(1, largest), self._page_lock)))
        except OutOfMemory:
            self.stop()
            raise
        if self._page_lock is not None and not all(item.slab.locked for item in self._slabs):
            self.notice = PAGEABLE_NOTICE
            log.warning("%s", self.notice)
        self._reader = _Reader(ready)
        with self._lock:
            self._read_from(course.position)

    def peek(self, index: int) -> torch.Tensor | None:
        with self._lock:
            if index not in self._reads and self._reader is not None:
                self._read_from(self._course.position_of(index))
            return _result(self._reads[index][1]) if index in self._reads else None

    def wait(self, index: int) -> None:
        with self._lock:
            read = self._reads.get(index)
        if read is None:
            return
        try:
            read[1].result()
        except CancelledError:
            pass  # a jump or the end came between; who asks again is told
        except Exception:
            with self._lock:
                self._forget_reads()  # asking again reads again: the disk may be back
            raise

    def done(self, index: int, copied: Fence) -> None:
        with self._lock:
            slab, _ = self._reads.pop(index)
            slab.free = copied
            self._read_next(slab)

    def read(self, index: int, slab: torch.Tensor) -> None:
        self._fill(index, slab)

    def stop(self) -> None:
        with self._lock:
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
        self._reads.clear()
        for item in self._slabs:
            if item.free is not None:
                item.free.wait()
            item.slab.free()
        self._slabs.clear()

    def close(self) -> None:
        self.stop()

    def _read_from(self, position: int) -> None:
        """Forget what was read ahead and go on from this position of the course."""
        self._forget_reads()
        self._next = position
        for slab in self._slabs:
            self._read_next(slab)

    def _forget_reads(self) -> None:
        for _, future in self._reads.values():
            future.cancel()
        self._reads.clear()

    def _read_next(self, slab: _RingSlab) -> None:
        index = self._course.at(self._next)
        if self._reader is not None and index is not None:
            self._next += 1
            self._reads[index] = (slab, self._reader.submit(lambda: self._filled(index, slab)))

    def _filled(self, index: int, slab: _RingSlab) -> torch.Tensor:
        if slab.free is not None:
            slab.free.wait()
        target = slab.slab.bytes[: self.layouts[index].nbytes]
        self._fill(index, target)
        self.reads += 1
        return target

"""Main memory that a GPU can copy from by itself: slabs of bytes, page-locked where that is granted."""

from __future__ import annotations

import mmap
from typing import Protocol

import torch

from kandinsky5.errors import OutOfMemory

_PORTABLE = 1
"""cudaHostRegisterPortable: the memory counts as page-locked for every CUDA context."""
_SUCCESS = 0


class PageLock(Protocol):
    """Asks the system to keep pages in main memory where a copy engine can reach them."""

    def lock(self, address: int, nbytes: int) -> bool:
        """Whether it was granted."""
        ...

    def unlock(self, address: int) -> None: ...


class CudaPageLock:
    """Page-locking through the CUDA runtime.

    Memory is mapped first and registered then, rather than taken from torch's allocator of page-locked
    memory: that one rounds every request up to a power of two (612 MB cost 1,024) and keeps what it has.
    """

    def lock(self, address: int, nbytes: int) -> bool:
        if int(torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE)) == _SUCCESS:
            return True
        _forget_last_error()
        return False

    def unlock(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)


def page_lock_for(device: torch.device) -> PageLock | None:
    """How memory is locked for copies to ``device``; None where locking makes no difference."""
    return CudaPageLock() if device.type == "cuda" else None


class HostSlab:
    """A mapping of its own in main memory, of exactly the size asked for; freed at once, not kept.

    Args:
        nbytes: at least 1.
        page_lock: locks it; None leaves it pageable.

    Attributes:
        bytes: uint8 [nbytes].
        locked: whether it is page-locked.

    Raises:
        OutOfMemory: there is not that much main memory.
    """

    def __init__(self, nbytes: int, page_lock: PageLock | None = None) -> None:
        try:
            # Private, as shared memory is given huge pages on few machines.
            mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, MemoryError) as error:
            raise OutOfMemory(f"no main memory for {nbytes / 1e6:,.0f} MB of weights") from error
        # A forked child must neither copy locked pages nor make the copy engine read old ones.
        mapping.madvise(mmap.MADV_DONTFORK)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                mapping.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to lock
            except OSError:
                pass  # a kernel without huge pages
        with torch.inference_mode(
            False
        ):  # other threads write into it, and that mode is one thread's
            self.bytes = torch.frombuffer(mapping, dtype=torch.uint8)
        self._page_lock = page_lock
        self.locked = page_lock is not None and page_lock.lock(self.bytes.data_ptr(), nbytes)

    def free(self) -> None:
        """Unlock it and let it go; no copy from it may be under way."""
        if self.locked and self._page_lock is not None:
            self._page_lock.unlock(self.bytes.data_ptr())
        self.locked = False
        self.bytes = torch.empty(0, dtype=torch.uint8)


def _forget_last_error() -> None:
    """A refused call leaves its error behind and the next kernel is blamed for it: this is that one."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        pass

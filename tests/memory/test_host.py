"""Main memory for weights: locked where granted, usable where not, given back at once."""

from __future__ import annotations

import pytest
import torch

from kandinsky5.errors import OutOfMemory
from kandinsky5.memory.host import HostSlab, page_lock_for
from tests.memory.streaming_models import FakePageLock


def test_a_slab_has_the_size_asked_for_and_is_writable() -> None:
    slab = HostSlab(1000)
    slab.bytes.fill_(7)
    assert slab.bytes.numel() == 1000 and int(slab.bytes.sum()) == 7000 and not slab.locked


def test_exactly_the_bytes_asked_for_are_locked_and_unlocked_again() -> None:
    lock = FakePageLock()
    slab = HostSlab(612_001, lock)
    assert slab.locked and lock.held == {slab.bytes.data_ptr(): 612_001}
    slab.free()
    assert lock.held == {} and slab.bytes.numel() == 0


def test_a_refused_lock_leaves_ordinary_memory() -> None:
    slab = HostSlab(1000, FakePageLock(limit_bytes=999))
    slab.bytes.fill_(1)
    assert not slab.locked
    slab.free()


def test_more_memory_than_there_is_says_so() -> None:
    with pytest.raises(OutOfMemory, match="MB"):
        HostSlab(1 << 60)


def test_nothing_is_locked_for_a_cpu() -> None:
    assert page_lock_for(torch.device("cpu")) is None

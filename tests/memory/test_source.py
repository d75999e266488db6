"""Sources give the right bytes in their order, hold no more memory than said, and stop cleanly."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from kandinsky5.errors import CheckpointError, OutOfMemory
from kandinsky5.memory import source as source_module
from kandinsky5.memory.course import Course
from kandinsky5.memory.host import HostSlab
from kandinsky5.memory.source import DiskSource, PinnedSource
from kandinsky5.memory.transfer import SynchronousTransfer
from tests.memory.streaming_models import FakePageLock, fill_from, layouts_of, readers, stack

PATIENCE_S = 60.0
BLOCKS = stack()
LAYOUTS = layouts_of(BLOCKS)
ORDER = tuple(range(len(BLOCKS)))


def fetched(source, index: int) -> torch.Tensor:
    """A block's bytes as a streamer gets them."""
    while (host := source.peek(index)) is None:
        source.wait(index)
    copied = host[: LAYOUTS[index].nbytes].clone()
    source.done(index, SynchronousTransfer().mark())
    return copied


def expected(index: int) -> torch.Tensor:
    slab = torch.zeros(LAYOUTS[index].nbytes, dtype=torch.uint8)
    fill_from(BLOCKS, LAYOUTS)(index, slab)
    return slab


def same_weights(index: int, slab: torch.Tensor) -> bool:
    """Equal in every tensor; what lies between them does not matter."""
    given, wanted = LAYOUTS[index].views(slab), LAYOUTS[index].views(expected(index))
    return all(torch.equal(given[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", [PinnedSource, DiskSource])
def test_every_block_comes_whole_round_after_round(kind) -> None:
    source = kind(LAYOUTS, fill_from(BLOCKS, LAYOUTS))
    source.start(Course(ORDER), lambda: None)
    assert all(same_weights(index, fetched(source, index)) for index in ORDER * 3)
    source.close()
    assert readers() == [] and source.host_bytes == 0


def test_main_memory_is_filled_once_and_stays_through_a_stop() -> None:
    fill = fill_from(BLOCKS, LAYOUTS)
    source = PinnedSource(LAYOUTS, fill)
    for _ in range(2):
        source.start(Course(ORDER), lambda: None)
        for index in ORDER:
            fetched(source, index)
        source.stop()
        assert readers() == []
    assert fill.reads == list(ORDER)
    assert source.host_bytes == sum(layout.nbytes for layout in LAYOUTS)
    source.close()


def test_slabs_in_main_memory_are_locked_at_exactly_their_sizes() -> None:
    lock = FakePageLock()
    source = PinnedSource(LAYOUTS, fill_from(BLOCKS, LAYOUTS), page_lock=lock)
    source.start(Course(ORDER), lambda: None)
    for index in ORDER:
        fetched(source, index)
    assert sorted(lock.held.values()) == sorted(layout.nbytes for layout in LAYOUTS)
    assert source.notice is None
    source.close()
    assert lock.held == {}


@pytest.mark.parametrize("kind", [PinnedSource, DiskSource])
def test_where_locking_is_refused_it_goes_on_unlocked_and_says_what_that_costs(
    kind, caplog
) -> None:
    source = kind(LAYOUTS, fill_from(BLOCKS, LAYOUTS), page_lock=FakePageLock(limit_bytes=1000))
    with caplog.at_level(logging.WARNING):
        source.start(Course(ORDER), lambda: None)
        assert all(same_weights(index, fetched(source, index)) for index in ORDER)
        source.close()
    assert "two to three times" in source.notice
    assert caplog.text.count("refused") == 1, "said once"


@pytest.mark.parametrize("ring", [1, 2, 3])
def test_the_disk_is_read_once_a_round_and_no_further_ahead_than_the_ring(ring: int) -> None:
    fill = fill_from(BLOCKS, LAYOUTS)
    source = DiskSource(LAYOUTS, fill, ring=ring)
    source.start(Course(ORDER), lambda: None)
    largest = max(layout.nbytes for layout in LAYOUTS)
    for index in ORDER * 2:
        fetched(source, index)
        assert source.host_bytes == ring * largest
    source.stop()
    rounds = ORDER * 3
    assert fill.reads == list(rounds[: len(fill.reads)])
    assert 2 * len(ORDER) <= len(fill.reads) <= 2 * len(ORDER) + ring


def test_a_ring_slab_is_not_refilled_before_the_copy_from_it_is_done() -> None:
    copied, refilled = threading.Event(), []

    class Copy:
        def wait(self) -> None:
            assert copied.wait(PATIENCE_S)

    def fill(index: int, slab: torch.Tensor) -> None:
        refilled.append((index, copied.is_set()))

    source = DiskSource(LAYOUTS, fill, ring=1)
    source.start(Course(ORDER), lambda: None)
    source.wait(0)
    source.done(0, Copy())
    copied.set()
    source.wait(1)
    source.stop()
    assert refilled[:2] == [(0, False), (1, True)]


def test_a_jump_elsewhere_in_the_order_gives_the_right_blocks() -> None:
    source = DiskSource(LAYOUTS, fill_from(BLOCKS, LAYOUTS), ring=2)
    source.start(Course(ORDER), lambda: None)
    for index in (0, 1, 4, 5, 0, 3, 4, 1):
        assert same_weights(index, fetched(source, index))
    source.close()


def test_only_the_blocks_asked_for_are_read() -> None:
    fill = fill_from(BLOCKS, LAYOUTS)
    source = DiskSource(LAYOUTS, fill, ring=2)
    source.start(Course((1, 3, 4)), lambda: None)
    for index in (1, 3, 4, 1):
        assert same_weights(index, fetched(source, index))
    source.close()
    assert set(fill.reads) == {1, 3, 4}


@pytest.mark.parametrize("kind", [PinnedSource, DiskSource])
def test_a_failed_read_is_raised_where_the_block_is_needed_and_can_be_tried_again(kind) -> None:
    whole = fill_from(BLOCKS, LAYOUTS)
    broken = {2}

    def fill(index: int, slab: torch.Tensor) -> None:
        if index in broken:
            raise CheckpointError("model.safetensors", "the file was truncated while it was read")
        whole(index, slab)

    source = kind(LAYOUTS, fill)
    source.start(Course(ORDER), lambda: None)
    assert same_weights(0, fetched(source, 0)) and same_weights(1, fetched(source, 1))
    with pytest.raises(CheckpointError, match="truncated"):
        fetched(source, 2)
    broken.clear()
    assert same_weights(2, fetched(source, 2)) and same_weights(3, fetched(source, 3))
    source.close()
    assert readers() == []


def test_want_of_main_memory_is_raised_where_the_block_is_needed(monkeypatch) -> None:
    def refuse(nbytes: int, page_lock: object) -> None:
        raise OutOfMemory("no main memory")

    monkeypatch.setattr(source_module, "HostSlab", refuse)
    source = PinnedSource(LAYOUTS, fill_from(BLOCKS, LAYOUTS))
    source.start(Course(ORDER), lambda: None)
    with pytest.raises(OutOfMemory):
        fetched(source, 0)
    source.close()
    assert readers() == []


def test_want_of_main_memory_for_the_ring_leaves_nothing_behind(monkeypatch) -> None:
    granted = [HostSlab]

    def one_only(nbytes: int, page_lock: object) -> HostSlab:
        if not granted:
            raise OutOfMemory("no main memory")
        return granted.pop()(nbytes)

    monkeypatch.setattr(source_module, "HostSlab", one_only)
    source = DiskSource(LAYOUTS, fill_from(BLOCKS, LAYOUTS), ring=2)
    with pytest.raises(OutOfMemory):
        source.start(Course(ORDER), lambda: None)
    assert source.host_bytes == 0 and readers() == []


def test_stopping_while_a_block_is_read_leaves_no_thread() -> None:
    reading, go_on = threading.Event(), threading.Event()

    def fill(index: int, slab: torch.Tensor) -> None:
        reading.set()
        assert go_on.wait(PATIENCE_S)

    source = DiskSource(LAYOUTS, fill)
    source.start(Course(ORDER), lambda: None)
    assert reading.wait(PATIENCE_S)
    threading.Timer(0.05, go_on.set).start()
    source.stop()
    assert readers() == [] and source.reads == 1


def test_it_tells_when_a_block_has_come() -> None:
    come = threading.Event()
    source = DiskSource(LAYOUTS, fill_from(BLOCKS, LAYOUTS))
    seen = []

    def ready() -> None:
        seen.append(source.peek(0) is not None)
        come.set()

    source.start(Course(ORDER), ready)
    assert come.wait(PATIENCE_S) and seen[0]
    source.close()


@pytest.mark.parametrize("kind", [PinnedSource, DiskSource])
def test_a_source_feeds_one_streamer_at_a_time(kind) -> None:
    source = kind(LAYOUTS, fill_from(BLOCKS, LAYOUTS))
    source.start(Course(ORDER), lambda: None)
    with pytest.raises(RuntimeError, match="close"):
        source.start(Course(ORDER), lambda: None)
    source.close()


def test_a_ring_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        DiskSource(LAYOUTS, fill_from(BLOCKS, LAYOUTS), ring=0)

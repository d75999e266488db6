"""Blocks run through slots: the same numbers, each weight copied once a pass, nothing left behind."""

from __future__ import annotations

import os
import random
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kandinsky5.errors import CheckpointError, OutOfMemory
from kandinsky5.memory.layout import spread
from kandinsky5.memory.source import DiskSource, PinnedSource
from kandinsky5.memory.streamer import Streamer
from kandinsky5.memory.transfer import SynchronousTransfer
from tests.memory.queued_transfer import QueuedTransfer
from tests.memory.streaming_models import (
    emptied,
    fill_from,
    layouts_of,
    readers,
    run,
    stack,
)

CPU = torch.device("cpu")
WHOLE = stack()
LAYOUTS = layouts_of(WHOLE)
SOURCES = [PinnedSource, DiskSource]
X = torch.linspace(-2, 2, 24).reshape(4, 6)


def source_of(kind=PinnedSource, blocks=WHOLE, **options):
    layouts = layouts_of(blocks)
    return kind(layouts, fill_from(blocks, layouts), **options)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("slots", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("resident", [(), (0, 3), (5,), range(6)])
def test_streamed_and_whole_give_the_same_numbers_to_the_bit(kind, slots, resident) -> None:
    blocks = emptied(WHOLE)
    source = source_of(kind)
    with Streamer(blocks, source, device=CPU, slots=slots, resident=resident) as streamer:
        for _ in range(3):
            assert torch.equal(run(blocks, X), run(WHOLE, X))
            streamer.end_step()
    source.close()


@pytest.mark.parametrize("kind", SOURCES)
def test_each_block_is_copied_once_a_step_however_often_it_is_called(kind) -> None:
    blocks, source = emptied(WHOLE), source_of(kind)
    steps = []
    with Streamer(blocks, source, device=CPU, slots=2) as streamer:
        for _ in range(4):
            for block in blocks:
                block(X), block(X)
            steps.append(streamer.end_step())
        total = streamer.traffic()
    source.close()
    # In which step a block read ahead is counted depends on the disk; two slots bound how far ahead.
    assert all(abs(step.loads - len(blocks)) <= 2 for step in steps)
    assert 4 * len(blocks) <= total.loads <= 4 * len(blocks) + 2
    once, largest = (f(layout.nbytes for layout in LAYOUTS) for f in (sum, max))
    assert 4 * once <= total.h2d_bytes <= 4 * once + 2 * largest
    assert total.d2h_bytes == 0 and total.stall_s > 0


def test_without_the_end_of_a_step_being_told_the_blocks_come_round_all_the_same() -> None:
    blocks, source = emptied(WHOLE), source_of()
    with Streamer(blocks, source, device=CPU) as streamer:
        for _ in range(3):
            assert torch.equal(run(blocks, X), run(WHOLE, X))
        assert streamer.traffic().loads <= 3 * len(blocks) + 1
    source.close()


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize(("slots", "resident"), [(1, ()), (2, ()), (2, (0, 5)), (3, (2,))])
def test_nothing_is_copied_or_read_beyond_the_last_pass_that_was_told(
    kind, slots, resident
) -> None:
    blocks, fill = emptied(WHOLE), fill_from(WHOLE, LAYOUTS)
    source, passes = kind(LAYOUTS, fill), 3
    streamed = [index for index in range(len(blocks)) if index not in resident]
    options = {"device": CPU, "slots": slots, "resident": resident}
    with Streamer(blocks, source, **options, passes=passes) as streamer:
        fill.reads.clear()
        for _ in range(passes):
            assert torch.equal(run(blocks, X), run(WHOLE, X))
            streamer.end_step()
        streamer.pump(may_block=True)
        once_bytes = sum(LAYOUTS[index].nbytes for index in streamed)
        assert streamer.traffic().loads == passes * len(streamed)
        assert streamer.traffic().h2d_bytes == passes * once_bytes
        streamer.expect(1)
        assert torch.equal(run(blocks, X), run(WHOLE, X)), "the next job's passes come again"
        streamer.end_step()
        assert torch.equal(run(blocks, X), run(WHOLE, X)), "and one that was not told works"
        streamer.end_step()
        assert streamer.traffic().loads == (passes + 2) * len(streamed)
    if kind is DiskSource:
        assert len(fill.reads) <= (passes + 2) * len(streamed)
    source.close()


@pytest.mark.parametrize("kind", SOURCES)
def test_a_pass_that_broke_off_is_no_part_of_those_expected_next(kind) -> None:
    blocks, source = emptied(WHOLE), source_of(kind)
    with Streamer(blocks, source, device=CPU, passes=5) as streamer:
        run(blocks[:4], X)
        before = streamer.traffic().loads
        streamer.expect(2)
        for _ in range(2):
            assert torch.equal(run(blocks, X), run(WHOLE, X))
            streamer.end_step()
        streamer.pump(may_block=True)
        loads = streamer.traffic().loads - before
        assert (
            2 * len(blocks) <= loads <= 2 * len(blocks) + 2
        )  # those on their way when it broke off
    source.close()


def test_a_skipped_step_moves_nothing() -> None:
    blocks, source = emptied(WHOLE), source_of()
    with Streamer(blocks, source, device=CPU) as streamer:
        run(blocks, X)
        streamer.end_step()
        run(blocks, X)
        streamer.end_step()
        before = streamer.traffic()
        streamer.pump(may_block=True)
        ahead = streamer.traffic().loads - before.loads
        assert ahead <= 2, "no more than the prefetch"
        for _ in range(5):
            assert streamer.end_step().loads <= ahead
            ahead = 0
    source.close()


def test_blocks_that_all_fit_into_the_slots_are_copied_once_for_good() -> None:
    blocks, source = emptied(WHOLE), source_of()
    with Streamer(blocks, source, device=CPU, slots=len(WHOLE)) as streamer:
        assert streamer.slot_bytes == 0
        assert streamer.resident_bytes == sum(layout.nbytes for layout in LAYOUTS)
        for _ in range(3):
            assert torch.equal(run(blocks, X), run(WHOLE, X))
        assert streamer.traffic().loads == 0
    assert source.host_bytes == 0, "what stays on the device needs no copy in main memory"
    source.close()


def test_device_memory_is_the_slots_and_the_resident_blocks() -> None:
    blocks, source = emptied(WHOLE), source_of()
    with Streamer(blocks, source, device=CPU, slots=2, resident=(1,)) as streamer:
        others = [layout.nbytes for index, layout in enumerate(LAYOUTS) if index != 1]
        assert streamer.slot_bytes == 2 * max(others)
        assert streamer.resident_bytes == LAYOUTS[1].nbytes
    source.close()


def test_submodules_left_out_of_the_layout_are_not_touched() -> None:
    left_out = ("modulation",)
    blocks = emptied(WHOLE, keep=left_out)
    layouts = layouts_of(WHOLE, left_out)
    source = PinnedSource(layouts, fill_from(WHOLE, layouts))
    kept = [block.modulation.weight for block in blocks]
    with Streamer(blocks, source, device=CPU):
        assert torch.equal(run(blocks, X), run(WHOLE, X))
        assert all(block.modulation.weight is w for block, w in zip(blocks, kept, strict=True))
    source.close()


def test_only_the_block_that_computes_holds_weights() -> None:
    blocks, source = emptied(WHOLE), source_of()
    with Streamer(blocks, source, device=CPU, resident=(4,)) as streamer:
        for index in range(4):
            streamer.enter(index)
            real = [i for i, block in enumerate(blocks) if not block.inner.weight.is_meta]
            assert real == [index, 4]
            assert isinstance(blocks[index].inner.weight, nn.Parameter)
            assert not blocks[index].inner.weight.requires_grad
            assert blocks[index].state_dict().keys() == WHOLE[index].state_dict().keys()
    source.close()


@pytest.mark.parametrize("kind", SOURCES)
def test_after_close_the_blocks_are_empty_again_and_nothing_is_left(kind) -> None:
    handles, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    blocks, source = emptied(WHOLE), source_of(kind)
    streamer = Streamer(blocks, source, device=CPU, resident=(0,))
    run(blocks, X)
    streamer.close()
    streamer.close()
    assert all(tensor.is_meta for block in blocks for tensor in block.state_dict().values())
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in blocks)
    assert readers() == [] and threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= handles
    with pytest.raises(RuntimeError, match="closed"):
        streamer.enter(2)
    source.close()


@pytest.mark.parametrize("kind", SOURCES)
def test_a_second_streamer_on_the_same_blocks_works(kind) -> None:
    blocks, source = emptied(WHOLE), source_of(kind)
    for slots in (2, 3):
        with Streamer(blocks, source, device=CPU, slots=slots):
            assert torch.equal(run(blocks, X), run(WHOLE, X))
    source.close()


def test_weights_that_were_there_before_come_back_with_close() -> None:
    blocks = stack(seed=1)
    before = run(blocks, X)
    source = source_of()
    with Streamer(blocks, source, device=CPU):
        assert torch.equal(run(blocks, X), run(WHOLE, X))
    assert torch.equal(run(blocks, X), before)
    source.close()


@pytest.mark.parametrize("kind", SOURCES)
def test_an_error_in_a_block_leaves_a_streamer_that_goes_on_and_closes(kind) -> None:
    blocks, source = emptied(WHOLE), source_of(kind)
    with Streamer(blocks, source, device=CPU):
        for stop_at in (0, 3, 5):
            run(blocks[:stop_at], X)
            with pytest.raises(RuntimeError, match="shape"):
                blocks[stop_at](torch.zeros(3, 5))
            assert torch.equal(run(blocks, X), run(WHOLE, X)), "from the beginning again"
        run(blocks[:2], X)
    source.close()
    assert readers() == []


@pytest.mark.parametrize("kind", SOURCES)
def test_a_read_that_fails_is_raised_by_the_block_that_needs_it(kind) -> None:
    whole = fill_from(WHOLE, LAYOUTS)

    def fill(index: int, slab: torch.Tensor) -> None:
        if index == 3:
            raise CheckpointError("a.safetensors", "replaced while it was read")
        whole(index, slab)

    blocks, source = emptied(WHOLE), kind(LAYOUTS, fill)
    with Streamer(blocks, source, device=CPU):
        x = run(blocks[:3], X)
        with pytest.raises(CheckpointError, match="replaced"):
            blocks[3](x)
    source.close()
    assert readers() == []


class Refusing(SynchronousTransfer):
    """A device with room for so many allocations."""

    def __init__(self, allowed: int, error: BaseException) -> None:
        super().__init__(CPU)
        self.allowed, self.error, self.closed = allowed, error, False

    def allocate(self, nbytes: int) -> torch.Tensor:
        if self.allowed == 0:
            raise self.error
        self.allowed -= 1
        return super().allocate(nbytes)

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("allowed", [0, 1, 2, 3])
def test_want_of_device_memory_says_so_and_leaves_the_blocks_alone(allowed: int) -> None:
    blocks, source = emptied(WHOLE), source_of(DiskSource)
    engine = Refusing(allowed, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(OutOfMemory, match="2 slots of .* MB and 2 resident blocks"):
        Streamer(blocks, source, device=CPU, resident=(0, 3), engine=engine)
    assert engine.closed and readers() == []
    assert not any(block._forward_pre_hooks for block in blocks)
    assert all(tensor.is_meta for block in blocks for tensor in block.state_dict().values())
    with Streamer(blocks, source, device=CPU):
        assert torch.equal(run(blocks, X), run(WHOLE, X))
    source.close()


@pytest.mark.parametrize("kind", SOURCES)
def test_resident_blocks_that_cannot_be_read_leave_nothing_behind(kind) -> None:
    def fill(index: int, slab: torch.Tensor) -> None:
        raise CheckpointError("a.safetensors", "is gone")

    blocks, source = emptied(WHOLE), kind(LAYOUTS, fill)
    with pytest.raises(CheckpointError, match="is gone"):
        Streamer(blocks, source, device=CPU, resident=(0,))
    assert not any(block._forward_pre_hooks for block in blocks)
    assert all(tensor.is_meta for block in blocks for tensor in block.state_dict().values())
    assert readers() == [] and source.host_bytes == 0


def test_a_source_in_use_is_refused_and_goes_on_serving() -> None:
    blocks, source = emptied(WHOLE), source_of()
    with Streamer(blocks, source, device=CPU):
        with pytest.raises(RuntimeError, match="feeds another"):
            Streamer(emptied(WHOLE), source, device=CPU)
        assert torch.equal(run(blocks, X), run(WHOLE, X))
    source.close()


def test_other_errors_of_the_device_pass_as_they_are() -> None:
    engine = Refusing(1, RuntimeError("an illegal memory access was encountered"))
    source = source_of()
    with pytest.raises(RuntimeError, match="illegal"):
        Streamer(emptied(WHOLE), source, device=CPU, engine=engine)
    assert engine.closed
    source.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": 0}, "at least 1"),
        ({"resident": (6,)}, "no block 6"),
        ({"blocks": stack((5, 7, 5))}, "3 blocks, but the source has 6"),
        ({"blocks": stack((5, 7, 5, 5, 8, 5))}, "block 4 has no "),
    ],
)
def test_what_cannot_be_is_refused(change, message) -> None:
    given = {"blocks": emptied(WHOLE), "source": source_of(), "device": CPU, **change}
    with pytest.raises(ValueError, match=message):
        Streamer(given.pop("blocks"), given.pop("source"), **given)


@pytest.mark.parametrize("kind", SOURCES)
def test_it_works_inside_and_across_inference_mode(kind) -> None:
    blocks, source = emptied(WHOLE), source_of(kind)
    expected = run(WHOLE, X)
    with torch.inference_mode():
        streamer = Streamer(blocks, source, device=CPU)
        assert torch.equal(run(blocks, X), expected)
    assert torch.equal(run(blocks, X), expected)
    streamer.close()
    source.close()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    slots=st.integers(1, 4),
    resident=st.integers(0, 4),
    ring=st.integers(0, 3),
)
def test_no_block_computes_too_early_and_no_slot_or_slab_is_overwritten_too_early(
    seed: int, slots: int, resident: int, ring: int
) -> None:
    """Both invariants, with copies and computing done in any order the fences allow, jumps included."""
    chance, faults = random.Random(seed), []
    engine = QueuedTransfer(seed)
    blocks = emptied(WHOLE)
    source = source_of(DiskSource, ring=ring) if ring else source_of(PinnedSource)

    def look(index: int, held: dict[str, torch.Tensor]) -> None:
        wanted = WHOLE[index].state_dict()
        faults.extend((index, n) for n, t in held.items() if not torch.equal(t, wanted[n]))

    with Streamer(
        blocks,
        source,
        device=CPU,
        slots=slots,
        resident=spread(resident, len(blocks)),
        engine=engine,
    ) as streamer:
        index = 0
        for _ in range(25):
            for _ in range(chance.randint(1, 2)):
                streamer.enter(index)
                held = blocks[index].state_dict()
                for _ in range(2):  # while a kernel runs it reads more than once
                    engine.compute(lambda index=index, held=held: look(index, held))
            for _ in range(chance.randint(0, 12)):
                engine.work()
            index = (index + 1) % len(blocks)
            if index == 0 or chance.random() < 0.1:
                streamer.end_step()
            if chance.random() < 0.1:
                index = chance.randrange(len(blocks))
            if chance.random() < 0.1:
                streamer.expect(chance.choice((None, 0, 1, 2)))
    source.close()
    assert engine.closed and not faults
    assert readers() == []

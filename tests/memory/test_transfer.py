"""Copies into slots: waits are counted; on a GPU they run beside the computing, and none comes back."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from kandinsky5.memory.host import HostSlab, page_lock_for
from kandinsky5.memory.layout import spread
from kandinsky5.memory.source import DiskSource, PinnedSource
from kandinsky5.memory.streamer import Streamer
from kandinsky5.memory.transfer import CudaTransfer, SynchronousTransfer, transfer_for
from tests.memory.streaming_models import emptied, fill_from, layouts_of, readers, run

CPU = torch.device("cpu")


def test_a_cpu_copies_plainly() -> None:
    engine = transfer_for(CPU)
    slot = engine.allocate(8)
    engine.copy(slot, torch.arange(8, dtype=torch.uint8), engine.mark()).wait()
    assert slot.tolist() == list(range(8)) and slot.device == CPU


def test_waiting_is_counted_once() -> None:
    engine = SynchronousTransfer()
    source, slot = torch.zeros(1 << 20, dtype=torch.uint8), engine.allocate(1 << 20)
    since = engine.mark()
    copied = engine.copy(slot, source, since)
    by_copy_s = engine.stall_s()
    assert by_copy_s > 0
    engine.wait(copied, since)
    elapsed_s = engine.mark().time_s - since.time_s
    assert by_copy_s <= engine.stall_s() <= elapsed_s


def test_a_copy_by_another_thread_is_no_stall() -> None:
    engine = SynchronousTransfer()
    slot = engine.allocate(1 << 20)
    copy = threading.Thread(target=engine.copy, args=(slot, torch.zeros_like(slot), engine.mark()))
    copy.start()
    copy.join()
    assert engine.stall_s() == 0


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


class Busy(nn.Module):
    """A block whose computing takes longer than the copy of its 32 MB."""

    SIDE = 2048

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, self.SIDE, self.SIDE), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(40):
            x = torch.tanh(x @ self.weight[0]) + torch.tanh(x @ self.weight[1])
        return x


def busy_stack(count: int) -> nn.ModuleList:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Busy() for _ in range(count))
    for block in blocks:
        block.weight.normal_(std=0.02)
    return blocks


@pytest.fixture
def pinned(cuda) -> Iterator[tuple[nn.ModuleList, PinnedSource]]:
    """Eight blocks in main memory, and their source."""
    whole = busy_stack(8)
    layouts = layouts_of(whole)
    source = PinnedSource(layouts, fill_from(whole, layouts), page_lock=page_lock_for(cuda))
    yield whole, source
    source.close()


def on_device(whole: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    return run(whole.to(x.device), x)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [PinnedSource, DiskSource])
@pytest.mark.parametrize("resident", [0, 3])
@pytest.mark.parametrize("locked", [True, False])
def test_streamed_on_a_gpu_gives_the_same_numbers_to_the_bit(cuda, kind, resident, locked) -> None:
    whole = busy_stack(8)
    layouts = layouts_of(whole)
    lock = page_lock_for(cuda) if locked else None
    source = kind(layouts, fill_from(whole, layouts), page_lock=lock)
    blocks = emptied(whole)
    x = torch.randn(512, Busy.SIDE, device=cuda)
    with Streamer(blocks, source, device=cuda, resident=spread(resident, 8)) as streamer:
        outputs = []
        for _ in range(3):
            outputs.append(run(blocks, x))
            streamer.end_step()
    source.close()
    assert readers() == []
    expected = on_device(whole, x)
    assert all(torch.equal(output, expected) for output in outputs)


@pytest.mark.gpu
def test_copies_run_beside_the_computing_and_nothing_is_copied_back(cuda, pinned) -> None:
    from torch.profiler import ProfilerActivity, profile

    whole, source = pinned
    blocks = emptied(whole)
    x = torch.randn(2048, Busy.SIDE, device=cuda)
    with Streamer(blocks, source, device=cuda) as streamer:
        run(blocks, x)  # every block is in main memory after this
        streamer.end_step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            run(blocks, x)
            torch.cuda.synchronize()
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    copies = [(start, end) for name, start, end in spans if "HtoD" in name]
    kernels = [(start, end) for name, start, end in spans if "Mem" not in name]
    overlapped = [c for c in copies if any(k[0] < c[1] and c[0] < k[1] for k in kernels)]
    assert copies and len(overlapped) >= len(copies) - 1
    assert not [name for name, _, _ in spans if "DtoH" in name]


@pytest.mark.gpu
def test_device_memory_is_two_slots_whatever_the_number_of_blocks(cuda, pinned) -> None:
    whole, source = pinned
    blocks = emptied(whole)
    x = torch.randn(512, Busy.SIDE, device=cuda)
    on_device(nn.ModuleList([Busy().to(cuda)]), x)  # the libraries' own workspaces exist now
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with Streamer(blocks, source, device=cuda) as streamer:
        weights = torch.cuda.memory_allocated() - before
        run(blocks, x)
        streamer.end_step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        assert weights == streamer.slot_bytes == 2 * source.layouts[0].nbytes
        assert peak < weights + 8 * x.nbytes
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_memory_is_locked_at_its_size_and_unlocked(cuda) -> None:
    slab = HostSlab(5_000_000, page_lock_for(cuda))
    assert slab.locked and slab.bytes.is_pinned()
    assert CudaTransfer(cuda).returns_at_once(slab.bytes)
    slab.free()
    assert not slab.locked


@pytest.mark.gpu
def test_a_refused_lock_does_not_blame_the_next_kernel(cuda) -> None:
    lock = page_lock_for(cuda)
    slab = HostSlab(1 << 20, lock)
    assert not lock.lock(slab.bytes.data_ptr(), 1 << 20), "it is locked already"
    assert int(torch.ones(3, device=cuda).sum()) == 3
    slab.free()

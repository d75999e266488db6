"""Runs the blocks of any ``nn.ModuleList`` through a few fixed buffers on the device.

The weights stay where the source has them; a block's parameters become views into a slot while it computes.
Weights are read only, so nothing is ever copied back. Two invariants hold, whatever copies, computing and
disk take:

1. No block computes before its copy is done: entering a block makes what is computed next wait for the copy.
2. No slot is overwritten before the computing of the block in it is done: leaving a block marks the end of
   its computing, and the next copy into its slot waits for that mark.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kandinsky5.errors import OutOfMemory
from kandinsky5.memory import meter
from kandinsky5.memory.course import Course
from kandinsky5.memory.host import HostSlab, page_lock_for
from kandinsky5.memory.places import places_of
from kandinsky5.memory.residency import MEMORY_ERRORS, is_out_of_memory
from kandinsky5.memory.slots import Slot, Slots, block_tensors
from kandinsky5.memory.source import WeightSource
from kandinsky5.memory.transfer import Fence, TransferEngine, transfer_for


@dataclass(frozen=True)
class Traffic:
    """What streaming moved and what it cost.

    Attributes:
        h2d_bytes: copied into slots.
        d2h_bytes: copied back: always 0.
        loads: blocks copied into slots.
        stall_s: how long computing waited for weights.
    """

    h2d_bytes: int = 0
    d2h_bytes: int = 0
    loads: int = 0
    stall_s: float = 0.0

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(
            self.h2d_bytes - earlier.h2d_bytes,
            self.d2h_bytes - earlier.d2h_bytes,
            self.loads - earlier.loads,
            self.stall_s - earlier.stall_s,
        )


class Streamer:
    """Brings each block's weights to the device just before it computes.

    Calling a block is enough: a hook before its ``forward`` enters it. A block may be called several times
    in a row (guidance) and is copied once. After the last block comes the first one again, so copies run
    on from one step into the next; :meth:`expect` says when that ends. Calling out of order works and costs
    the copies made in vain.

    Args:
        blocks: with parameters and saved buffers on the meta device, or elsewhere: what they hold is put
            aside and comes back with :meth:`close`. Buffers that are not saved stay as they are.
        source: gives the weights; its layouts may leave submodules of the blocks out.
        device: where the blocks compute.
        slots: buffers on the device, at least 1; from 2 on copies run beside the computing.
        resident: indices of the blocks that live on the device. Where the slots could hold all others,
            those are made resident too: it costs no more memory and copies nothing.
        passes: as for :meth:`expect`.
        engine: None for the one that fits the device.

    Attributes:
        slot_bytes, resident_bytes: device memory held.

    Raises:
        OutOfMemory: the slots and resident blocks do not fit; nothing is left behind.
        ValueError: the source's layouts are not those of the blocks, or a number is out of range.
        Exception: what the source raises when the resident blocks are read.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        source: WeightSource,
        *,
        device: torch.device,
        slots: int = 2,
        resident: Collection[int] = (),
        passes: int | None = None,
        engine: TransferEngine | None = None,
    ) -> None:
        self._places = places_of(blocks, source.layouts)
        streamed = _streamed(len(blocks), resident, slots)
        self._course = Course(streamed, passes)
        self._source = source
        self._lock = threading.RLock()
        self._closed = False
        self._current: int | None = None
        self._resident = set(range(len(blocks))) - set(streamed)
        self._sent = Traffic()
        self._last_step = Traffic()
        self._engine = transfer_for(device) if engine is None else engine
        with ExitStack() as undo:
            undo.callback(self._put_back)
            undo.callback(self._engine.close)
            with torch.inference_mode(False):  # the reader's thread, which is not in it, writes too
                self._allocate(streamed, slots, device)
            source.start(self._course, self._on_ready)
            undo.callback(self._stop_source)
            for index, block in enumerate(blocks):
                undo.callback(block.register_forward_pre_hook(_Entering(self, index)).remove)
                undo.callback(block.register_forward_hook(_Given(self)).remove)
            self.pump()
            self._closing = undo.pop_all()

    def __enter__(self) -> Streamer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def expect(self, passes: int | None) -> None:
        """So many passes through the blocks come from now on; a pass that has begun is over.

        Nothing is copied or read ahead beyond the last of them. A further one works all the same: its first
        block comes when it is called. None sets no end.
        """
        with self._lock:
            self._end_pass()
            self._course.expect(passes)
        self.pump()

    def enter(self, index: int) -> None:
        """Block ``index`` computes from now on, until another is entered; the hooks call it.

        Raises:
            Exception: what went wrong when the source read this block.
            RuntimeError: the streamer is closed.
        """
        if index == self._current:
            return
        now = self._engine.mark()
        with self._lock:
            self._check_open()
            self._leave(now)
            self._course.go_to(index)
        if index not in self._resident:
            slot = self._brought(index)
            assert slot.copied is not None
            self._engine.wait(slot.copied, since=now)
            self._places[index].hold(slot.tensors[self._source.layouts[index]])
        self._current = index
        self.pump()

    def pump(self, *, may_block: bool = False) -> None:
        """Start the copies for which there are both a free slot and bytes that have been read.

        Args:
            may_block: also those that hold up the calling thread.
        """
        with self._lock:
            if self._closed:
                return
            for index in self._slots.wanted():
                if not self._load(index, may_block=may_block):
                    return

    def end_step(self) -> Traffic:
        """A pass through the blocks is over: its last slot is free, and the next pass's blocks may come.

        Returns:
            The traffic since the call before. A GPU may still be busy; the waits it has not come to yet
            are counted in the next step.
        """
        with self._lock:
            self._end_pass()
        self.pump()
        total = self.traffic()
        self._last_step, step = total, total - self._last_step
        meter.note_moved(stall_s=step.stall_s)
        return step

    def traffic(self) -> Traffic:
        """Everything streamed so far; blocks that live on the device are not counted."""
        sent = self._sent
        return Traffic(sent.h2d_bytes, sent.d2h_bytes, sent.loads, self._engine.stall_s())

    def close(self) -> None:
        """End streaming: no hook, thread, copy or device memory is left, the blocks are as they were.

        The source is stopped, not closed: what it holds in main memory serves the next streamer.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._closing.close()

    def _allocate(self, streamed: list[int], slots: int, device: torch.device) -> None:
        layouts = self._source.layouts
        try:
            self._slots = Slots(self._engine, layouts, self._course, slots if streamed else 0)
            self.slot_bytes = self._slots.total_bytes
            self.resident_bytes = self._load_resident(device)
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold what was allocated so far
            largest = max((layouts[index].nbytes for index in streamed), default=0)
            staying = sum(layouts[index].nbytes for index in self._resident)
            raise OutOfMemory(
                f"out of memory on {device} for the weights: {slots if streamed else 0} slots of"
                f" {largest / 1e6:,.0f} MB and {len(self._resident)} resident blocks, together"
                f" {staying / 1e6:,.0f} MB; let fewer blocks stay or use 8-bit weights"
            ) from error

    def _load_resident(self, device: torch.device) -> int:
        """Put the blocks that stay onto the device, through one slab of main memory."""
        if not self._resident:
            return 0
        layouts = self._source.layouts
        total = 0
        largest = max(layouts[index].nbytes for index in self._resident)
        staging = HostSlab(max(1, largest), page_lock_for(device))
        try:
            for index in sorted(self._resident):
                layout = layouts[index]
                slab = self._engine.allocate(layout.nbytes)
                host = staging.bytes[: layout.nbytes]
                self._source.read(index, host)
                self._engine.copy(slab, host, self._engine.mark()).wait()
                self._places[index].hold(block_tensors(layout, slab))
                total += layout.nbytes
                meter.note_moved(h2d_bytes=layout.nbytes)
        finally:
            staging.free()
        return total

    def _brought(self, index: int) -> Slot:
        """The slot with this block, once its copy has been started."""
        while True:
            with self._lock:
                self._check_open()
                self._load(index, may_block=True)
                slot = self._slots.holding(index)
            if slot is not None:
                return slot
            self._source.wait(index)  # without the lock: the reader's thread takes it to tell

    def _load(self, index: int, *, may_block: bool) -> bool:
        """Start the copy of a wanted block; False when that has to wait."""
        if self._slots.holding(index) is not None:
            return True
        host = self._source.peek(index)
        if host is None or not (may_block or self._engine.returns_at_once(host)):
            return False
        self._source.done(index, self._slots.load(index, host))
        nbytes = self._source.layouts[index].nbytes
        self._sent = Traffic(self._sent.h2d_bytes + nbytes, 0, self._sent.loads + 1)
        meter.note_moved(h2d_bytes=nbytes)
        return True

    def _end_pass(self) -> None:
        if self._current is not None:
            self._course.end_pass()
            self._leave(self._engine.mark())

    def _leave(self, computed: Fence) -> None:
        """Nothing more is computed with the current block: its slot is free once ``computed`` is passed."""
        if self._current is not None and self._current not in self._resident:
            self._slots.leave(self._current, computed)
            self._places[self._current].put_back()
        self._current = None

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the streamer is closed")

    def _on_ready(self) -> None:
        """The source's thread has read a block; waiting is no harm there."""
        self.pump(may_block=True)

    def _stop_source(self) -> None:
        self._closed = True  # its thread may be on its way here
        self._source.stop()

    def _put_back(self) -> None:
        for places in self._places:
            places.put_back()
        self._current = None
        self._slots = Slots(self._engine, (), Course(()), 0)


@dataclass(frozen=True)
class _Entering:
    """Hook before a block's forward."""

    streamer: Streamer
    index: int

    def __call__(self, block: nn.Module, inputs: Any) -> None:
        self.streamer.enter(self.index)


@dataclass(frozen=True)
class _Given:
    """Hook after a block's forward: the device has work now, so copies may hold up this thread."""

    streamer: Streamer

    def __call__(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self.streamer.pump(may_block=True)


def _streamed(blocks: int, resident: Collection[int], slots: int) -> list[int]:
    """Indices of the blocks that go through slots."""
    if slots < 1:
        raise ValueError(f"{slots} slots: at least 1 is needed")
    if strangers := sorted(set(resident) - set(range(blocks))):
        raise ValueError(f"no block {strangers[0]}: there are {blocks}")
    streamed = sorted(set(range(blocks)) - set(resident))
    return streamed if len(streamed) > slots else []

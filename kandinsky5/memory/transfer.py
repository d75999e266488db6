"""How blocks get into their slots: one engine for CUDA, one for a CPU.

Both offer what :class:`TransferEngine` says; :mod:`kandinsky5.memory.simulate` has a third one, for which
time is a number.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch


class Fence(Protocol):
    """A moment in the work of a device; it is passed when all the work given before it is done."""

    def wait(self) -> None:
        """Hold up the calling thread until then."""
        ...


class TransferEngine(Protocol):
    """Copies bytes into slots beside the computing, and orders the two against each other."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] on the device."""
        ...

    def returns_at_once(self, host: torch.Tensor) -> bool:
        """Whether :meth:`copy` from this memory leaves the calling thread free."""
        ...

    def copy(self, slot: torch.Tensor, host: torch.Tensor, after: Fence) -> Fence:
        """Overwrite ``slot`` (uint8) with ``host`` (uint8, as long) once ``after`` is passed.

        Copies are carried out in the order of the calls. The fence given back is passed when this one is.
        """
        ...

    def mark(self) -> Fence:
        """Passed when everything that was given to the device to compute until now is done."""
        ...

    def wait(self, copied: Fence, since: Fence) -> None:
        """Let what is computed from now on wait for ``copied``; ``since`` is when it began to be wanted."""
        ...

    def stall_s(self) -> float:
        """Seconds the computing has waited for copies; waits that are not over are not counted yet."""
        ...

    def close(self) -> None:
        """Wait for the copies under way and let everything go."""
        ...


def transfer_for(device: torch.device) -> TransferEngine:
    """The engine for a device."""
    return CudaTransfer(device) if device.type == "cuda" else SynchronousTransfer(device)


@dataclass(frozen=True)
class _Event:
    event: torch.cuda.Event

    def wait(self) -> None:
        self.event.synchronize()


class CudaTransfer:
    """Copies on a stream of their own.

    From page-locked memory a copy leaves the host free. From pageable memory the driver makes the calling
    thread wait until the slot is free and the bytes are away; the streamer asks for such copies only when
    the block before has been given its work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._stall_s = 0.0
        self._spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._copy_s = 0.0

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def returns_at_once(self, host: torch.Tensor) -> bool:
        return host.is_pinned()

    def copy(self, slot: torch.Tensor, host: torch.Tensor, after: Fence) -> Fence:
        assert isinstance(after, _Event)
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(after.event)
            begun = torch.cuda.Event(enable_timing=True)
            begun.record(self._copies)
            slot.copy_(host, non_blocking=True)
            # The reader's thread waits for this event: it shall sleep, not spin.
            copied = torch.cuda.Event(enable_timing=True, blocking=True)
            copied.record(self._copies)
        self._spans.append((begun, copied))
        return _Event(copied)

    def mark(self) -> Fence:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return _Event(event)

    def wait(self, copied: Fence, since: Fence) -> None:
        assert isinstance(copied, _Event) and isinstance(since, _Event)
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied.event)
        arrived = torch.cuda.Event(enable_timing=True)
        arrived.record(stream)
        self._waits.append((since.event, arrived))

    def stall_s(self) -> float:
        self.copy_s()  # both lists of events are emptied as they come to pass
        self._stall_s += _passed_s(self._waits)
        return self._stall_s

    def copy_s(self) -> float:
        """Seconds that copies took, without their waiting for slots; those under way are not counted yet."""
        self._copy_s += _passed_s(self._spans)
        return self._copy_s

    def close(self) -> None:
        self._copies.synchronize()


def _passed_s(spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
    """Take out the spans whose end is passed and add them up."""
    total_s = 0.0
    while spans and spans[0][1].query():
        begun, ended = spans.popleft()
        total_s += begun.elapsed_time(ended) / 1000.0
    return total_s


@dataclass(frozen=True)
class _Moment:
    """Wall-clock time, and how much of the stall had been counted by then."""

    time_s: float
    stall_s: float

    def wait(self) -> None:
        """Everything is done when it is asked for."""


class SynchronousTransfer:
    """Plain copies by the thread that asks: a streamer for a machine without a GPU.

    A copy by the thread that computes is a stall; one by the reader's thread runs beside the computing.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = torch.device("cpu") if device is None else device
        self._computing = threading.get_ident()
        self._stall_s = 0.0

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def returns_at_once(self, host: torch.Tensor) -> bool:
        return False

    def copy(self, slot: torch.Tensor, host: torch.Tensor, after: Fence) -> Fence:
        begun_s = time.perf_counter()
        slot.copy_(host)
        if threading.get_ident() == self._computing:
            self._stall_s += time.perf_counter() - begun_s
        return self.mark()

    def mark(self) -> Fence:
        return _Moment(time.perf_counter(), self._stall_s)

    def wait(self, copied: Fence, since: Fence) -> None:
        assert isinstance(since, _Moment)
        counted_s = self._stall_s - since.stall_s
        self._stall_s += max(0.0, time.perf_counter() - since.time_s - counted_s)

    def stall_s(self) -> float:
        return self._stall_s

    def close(self) -> None:
        """Nothing is under way."""

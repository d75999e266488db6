"""The streaming schedule on a virtual clock: the streamer itself runs, only time is arithmetic.

A device has two queues, computing and copies, each doing one thing after the other; a disk may be a third.
The host gives out work in no time; it waits where the streamer makes it wait, and after every block where
``host_waits`` is set (a device without queues).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import nn

from kandinsky5.memory.course import Course
from kandinsky5.memory.layout import BlockLayout
from kandinsky5.memory.streamer import Streamer, Traffic
from kandinsky5.memory.transfer import Fence

_META = torch.device("meta")


@dataclass(frozen=True)
class Schedule:
    """What is simulated.

    Attributes:
        compute_s: seconds that block ``index`` computes in step ``step``, all calls together.
        copy_s: seconds that the n-th copy takes, from 0.
        read_s: seconds that the n-th read from the disk takes; None: all blocks are in main memory.
        blocks, steps, slots, ring: how many.
        resident: indices of the blocks that live on the device.
        calls: how often a block is called each time (the branches of a guided step).
        host_waits: the host waits for each block's computing.
    """

    compute_s: Callable[[int, int], float]
    copy_s: Callable[[int], float]
    read_s: Callable[[int], float] | None = None
    blocks: int = 60
    steps: int = 2
    slots: int = 2
    ring: int = 2
    resident: Collection[int] = ()
    calls: int = 1
    host_waits: bool = False


@dataclass(frozen=True)
class Work:
    """Something done on a slot: a block copied into it, or computed from it."""

    slot: int
    block: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """What came of a schedule.

    Attributes:
        copies, computing: in the order in which they were done; computing of streamed blocks only.
        total_s: until the last block has computed.
        compute_s, copy_s: sums.
        stall_s: how long computing waited, the arrival of the first block counted.
        traffic: as the streamer counted it.
        steps: traffic of each step.
    """

    copies: tuple[Work, ...]
    computing: tuple[Work, ...]
    total_s: float
    compute_s: float
    copy_s: float
    stall_s: float
    traffic: Traffic
    steps: tuple[Traffic, ...]

    def violations(self) -> list[str]:
        """Where an invariant of the streamer was broken; looks at times and slots alone."""
        found = []
        into: dict[int, list[Work]] = {}
        for copy in self.copies:
            into.setdefault(copy.slot, []).append(copy)
        for work in self.computing:
            copies = into.get(work.slot, [])
            arrived = [
                number
                for number, copy in enumerate(copies)
                if copy.block == work.block and copy.end_s <= work.start_s
            ]
            if not arrived:
                found.append(
                    f"block {work.block} computed at {work.start_s} before its copy was done"
                )
                continue
            following = copies[arrived[-1] + 1 :][:1]
            if following and following[0].start_s < work.end_s:
                found.append(
                    f"slot {work.slot} overwritten at {following[0].start_s} while block {work.block}"
                    " computed from it"
                )
        return found


def simulate(
    schedule: Schedule,
    blocks: nn.ModuleList | None = None,
    layouts: Sequence[BlockLayout] | None = None,
) -> Timeline:
    """Run the streamer through a schedule.

    Args:
        schedule: its ``blocks`` is the length of the list.
        blocks: on the meta device; None for some of one tensor each.
        layouts: what of each block is streamed; None for all of it.
    """
    if blocks is None:
        with torch.device("meta"):
            blocks = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(schedule.blocks))
    layouts = [BlockLayout.of(block) for block in blocks] if layouts is None else layouts
    clock = _Clock()
    source = _SimulatedSource(schedule, clock, layouts)
    engine = SimulatedTransfer(clock, schedule.copy_s, source.block_of)
    steps = []
    with Streamer(
        blocks,
        source,
        device=_META,
        slots=schedule.slots,
        resident=schedule.resident,
        passes=schedule.steps,
        engine=engine,
    ) as streamer:
        for step in range(schedule.steps):
            for index, block in enumerate(blocks):
                for _ in range(schedule.calls):
                    streamer.enter(index)
                    weight = block.state_dict()[layouts[index].entries[0].name]
                    engine.compute(weight, index, schedule.compute_s(step, index) / schedule.calls)
                if schedule.host_waits:
                    clock.advance_to(engine.computed_s)
            steps.append(streamer.end_step())
        return engine.timeline(streamer.traffic(), steps)


class _Clock:
    """Virtual time, and what happens at certain moments of it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._number = count()
        self._coming: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, time_s: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._coming, (time_s, next(self._number), happens))

    def advance_to(self, time_s: float) -> None:
        while self._coming and self._coming[0][0] <= time_s:
            moment_s, _, happens = heapq.heappop(self._coming)
            self.now_s = max(self.now_s, moment_s)
            happens()
        self.now_s = max(self.now_s, time_s)


@dataclass(frozen=True)
class _Moment:
    clock: _Clock
    time_s: float

    def wait(self) -> None:
        self.clock.advance_to(self.time_s)


class SimulatedTransfer:
    """A transfer engine whose copies take a given time and move nothing."""

    def __init__(
        self,
        clock: _Clock,
        copy_s: Callable[[int], float],
        block_of: Callable[[torch.Tensor], int | None],
    ) -> None:
        self._clock, self._copy_s, self._block_of = clock, copy_s, block_of
        self._slots: dict[int, int] = {}
        self.computed_s = self._copied_s = 0.0
        self._copies: list[Work] = []
        self._computing: list[Work] = []
        self._compute_s = self._stall_s = 0.0

    def allocate(self, nbytes: int) -> torch.Tensor:
        slab = torch.empty(nbytes, dtype=torch.uint8, device=_META)
        self._slots[_storage(slab)] = len(self._slots)
        return slab

    def returns_at_once(self, host: torch.Tensor) -> bool:
        return True

    def copy(self, slot: torch.Tensor, host: torch.Tensor, after: Fence) -> Fence:
        assert isinstance(after, _Moment)
        block = self._block_of(host)
        if block is None:  # one that stays: before time begins
            return _Moment(self._clock, 0.0)
        start_s = max(self._copied_s, after.time_s, self._clock.now_s)
        self._copied_s = start_s + self._copy_s(len(self._copies))
        self._copies.append(Work(self._slots[_storage(slot)], block, start_s, self._copied_s))
        return _Moment(self._clock, self._copied_s)

    def mark(self) -> Fence:
        return _Moment(self._clock, max(self.computed_s, self._clock.now_s))

    def wait(self, copied: Fence, since: Fence) -> None:
        assert isinstance(copied, _Moment) and isinstance(since, _Moment)
        arrived_s = max(self.computed_s, copied.time_s, self._clock.now_s)
        self._stall_s += max(0.0, arrived_s - since.time_s)
        self.computed_s = arrived_s

    def compute(self, weight: torch.Tensor, block: int, seconds: float) -> None:
        """Queue the computing of a block from where its weight lies."""
        start_s = max(self.computed_s, self._clock.now_s)
        self.computed_s = start_s + seconds
        self._compute_s += seconds
        number = self._slots[_storage(weight)]
        self._computing.append(Work(number, block, start_s, self.computed_s))

    def stall_s(self) -> float:
        return self._stall_s

    def close(self) -> None:
        """Nothing is under way."""

    def timeline(self, traffic: Traffic, steps: Sequence[Traffic]) -> Timeline:
        """What happened."""
        streamed = {copy.slot for copy in self._copies}
        return Timeline(
            tuple(self._copies),
            tuple(work for work in self._computing if work.slot in streamed),
            self.computed_s,
            self._compute_s,
            sum(copy.end_s - copy.start_s for copy in self._copies),
            self._stall_s,
            traffic,
            tuple(steps),
        )


class _SimulatedSource:
    """A source whose blocks are there at once, or come off a disk that takes a given time for each."""

    def __init__(self, schedule: Schedule, clock: _Clock, layouts: Sequence[BlockLayout]) -> None:
        self.layouts = tuple(layouts)
        self._read_s, self._ring, self._clock = schedule.read_s, schedule.ring, clock
        self._blocks = [
            torch.empty(layout.nbytes, dtype=torch.uint8, device=_META) for layout in layouts
        ]
        self._numbers = {_storage(block): index for index, block in enumerate(self._blocks)}
        self._arrivals_s: dict[int, float] = {}
        self._reads = 0
        self._disk_free_s = 0.0

    def block_of(self, host: torch.Tensor) -> int | None:
        """Which block these bytes are; None for memory of the streamer's own."""
        return self._numbers.get(_storage(host))

    def start(self, course: Course, ready: Callable[[], None]) -> None:
        self._course, self._next = course, course.position
        self._ready = ready
        for _ in range(min(self._ring, len(course.order)) if self._read_s else 0):
            self._read_next(self._clock.now_s)

    def peek(self, index: int) -> torch.Tensor | None:
        if self._read_s and self._arrivals_s[index] > self._clock.now_s:
            return None
        return self._blocks[index]

    def wait(self, index: int) -> None:
        self._clock.advance_to(self._arrivals_s[index])

    def done(self, index: int, copied: Fence) -> None:
        if self._read_s:
            assert isinstance(copied, _Moment)
            del self._arrivals_s[index]
            self._read_next(copied.time_s)

    def read(self, index: int, slab: torch.Tensor) -> None:
        """Nothing to write."""

    def stop(self) -> None:
        self._ready = _nothing

    def close(self) -> None:
        self.stop()

    def _read_next(self, slab_free_s: float) -> None:
        assert self._read_s is not None
        index = self._course.at(self._next)
        if index is None:
            return
        start_s = max(self._disk_free_s, slab_free_s)
        self._disk_free_s = start_s + self._read_s(self._reads)
        self._reads += 1
        self._next += 1
        self._arrivals_s[index] = self._disk_free_s
        self._clock.at(self._disk_free_s, lambda: self._ready())


def _storage(tensor: torch.Tensor) -> int:
    """Tells memory apart, on the meta device too, where nothing has an address."""
    return tensor.untyped_storage()._cdata


def _nothing() -> None:
    """After the end."""

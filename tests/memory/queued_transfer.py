"""A device whose two queues are worked off in any order that the fences allow, drawn at random.

Bytes are moved when a copy has its turn, not when it is asked for, and the slot holds rubbish while it is
under way: whoever computes too early, overwrites too early or refills memory too early is found out.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable

import torch

RUBBISH = 0xA5


class QueuedFence:
    def __init__(self, engine: QueuedTransfer) -> None:
        self.passed = False
        self._engine = engine

    def wait(self) -> None:
        self._engine.work_until(self)


class QueuedTransfer:
    """A transfer engine; each entry of a queue is (may begin, what it does)."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._computing: deque[tuple[QueuedFence | None, Callable[[], None]]] = deque()
        self._copies: deque[tuple[QueuedFence | None, Callable[[], None]]] = deque()
        self._lock = threading.RLock()
        self.closed = False

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), RUBBISH, dtype=torch.uint8)

    def returns_at_once(self, host: torch.Tensor) -> bool:
        return True

    def copy(self, slot: torch.Tensor, host: torch.Tensor, after: QueuedFence) -> QueuedFence:
        copied = QueuedFence(self)
        with self._lock:
            self._copies.append((after, lambda: slot.fill_(RUBBISH)))
            self._copies.append((None, lambda: slot.copy_(host)))
            self._copies.append((None, lambda: setattr(copied, "passed", True)))
        return copied

    def mark(self) -> QueuedFence:
        fence = QueuedFence(self)
        self.compute(lambda: setattr(fence, "passed", True))
        return fence

    def wait(self, copied: QueuedFence, since: QueuedFence) -> None:
        with self._lock:
            self._computing.append((copied, lambda: None))

    def compute(self, work: Callable[[], None]) -> None:
        """Queue something that is computed."""
        with self._lock:
            self._computing.append((None, work))

    def stall_s(self) -> float:
        return 0.0

    def close(self) -> None:
        while self._computing or self._copies:
            self.work()
        self.closed = True

    def work(self) -> None:
        """Do one thing that may be done now."""
        with self._lock:
            able = [
                queue
                for queue in (self._computing, self._copies)
                if queue and (queue[0][0] is None or queue[0][0].passed)
            ]
            if not able:
                assert not (self._computing or self._copies), "the queues wait for each other"
                return
            _, action = self._chance.choice(able).popleft()
            action()

    def work_until(self, fence: QueuedFence) -> None:
        while not fence.passed:
            self.work()

"""After the machine slept, whether the worker is still there. Only the standard library is needed here."""

from __future__ import annotations

import time
from collections.abc import Callable

LOOK_EVERY_S = 5.0
MIN_SLEEP_S = 10.0
"""A shorter sleep, or a clock that was set by so much, is none."""
ANSWER_WITHIN_S = 60.0
"""A worker's thread for commands answers while a job runs; a card takes a while to come back."""
NO_ANSWER = "the machine slept and the worker did not answer afterwards"


def suspended_s() -> float:
    """A clock that runs only while the machine sleeps, as far as the system tells."""
    if hasattr(time, "CLOCK_BOOTTIME"):  # on Linux monotonic time stands still in sleep
        return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    return time.time() - time.monotonic()


class SleepCheck:
    """Has the worker of a running job answer after each sleep.

    Attributes:
        patience_s: how soon to look again.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A job begins: what the machine did before does not concern it."""
        self._before_s = suspended_s()
        self._slept_s = 0.0
        self._answer_by: float | None = None

    @property
    def patience_s(self) -> float:
        if self._answer_by is None:
            return LOOK_EVERY_S
        return min(LOOK_EVERY_S, max(0.0, self._answer_by - time.monotonic()))

    def is_overdue(self, ask: Callable[[], None]) -> bool:
        """Whether the worker owes an answer too long; it is asked for one if the machine has slept."""
        now_s = suspended_s()
        slept_s, self._before_s = now_s - self._before_s, now_s
        if slept_s >= MIN_SLEEP_S:
            self._slept_s = slept_s
            self._answer_by = time.monotonic() + ANSWER_WITHIN_S
            ask()
        return self._answer_by is not None and time.monotonic() >= self._answer_by

    def answered(self) -> str:
        """The worker is there; gives the line for the user."""
        self._answer_by = None
        return f"the machine slept for {self._slept_s / 60:.0f} min; the job goes on"

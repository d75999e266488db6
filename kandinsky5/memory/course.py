"""Which streamed blocks come, in what order, and where that ends."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Course:
    """The way of the computing through the streamed blocks: the same ones in every pass.

    A position counts the blocks of all passes; it grows while the computing goes on.

    Args:
        order: indices of the streamed blocks, rising.
        passes: see :meth:`expect`.

    Attributes:
        order: as given.
    """

    def __init__(self, order: Sequence[int], passes: int | None = None) -> None:
        self.order = tuple(order)
        self._pass, self._passes = 0, passes
        self._place = 0
        self._latest: int | None = None

    @property
    def position(self) -> int:
        """Of the streamed block that computes, or of the first that comes after the one that does."""
        return self._pass * len(self.order) + self._place

    def go_to(self, index: int) -> None:
        """Block ``index`` computes next, streamed or not; one before the latest begins another pass."""
        if self._latest is not None and index < self._latest:
            self._pass += 1
        self._latest, self._place = index, bisect_left(self.order, index)
        if self._passes is not None:
            self._passes = max(self._passes, self._pass + 1)  # more than was expected

    def end_pass(self) -> None:
        """The pass that has begun, if one has, is over."""
        if self._latest is not None:
            self._pass += 1
            self._latest, self._place = None, 0

    def expect(self, passes: int | None) -> None:
        """So many passes come from now on, and then no block; None sets no end."""
        self.end_pass()
        self._passes = None if passes is None else self._pass + passes

    def at(self, position: int) -> int | None:
        """The block at a position; None behind the end."""
        count = len(self.order)
        if not count or (self._passes is not None and position >= self._passes * count):
            return None
        return self.order[position % count]

    def ahead(self, count: int) -> list[int]:
        """The next streamed blocks, at most ``count``, the one that computes included."""
        blocks = (self.at(self.position + number) for number in range(count))
        return [index for index in blocks if index is not None]

    def position_of(self, index: int) -> int:
        """Where a streamed block comes next."""
        count = len(self.order)
        return self.position + (self.order.index(index) - self._place) % count

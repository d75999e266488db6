"""Fixed buffers on the device, and which block each of them holds.

The rule is one sentence: in the slots belong the block that computes and those that come after it, pass after
pass. A slot with another block may be overwritten once its computing is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kandinsky5.memory.course import Course
from kandinsky5.memory.layout import BlockLayout
from kandinsky5.memory.transfer import Fence, TransferEngine


def block_tensors(layout: BlockLayout, slab: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a block computes with when its bytes lie in ``slab``, in the order of the layout's entries."""
    views = layout.views(slab)
    return tuple(
        nn.Parameter(views[entry.name], requires_grad=False)
        if entry.is_parameter
        else views[entry.name]
        for entry in layout.entries
    )


@dataclass(eq=False)
class Slot:
    """One buffer.

    Attributes:
        slab: uint8, as long as the largest block.
        tensors: what a block of each layout computes with when it is here.
        free: passed when the slot may be overwritten.
        block: the one that is here or on its way, None at first.
        copied: passed when that block is here.
    """

    slab: torch.Tensor
    tensors: dict[BlockLayout, tuple[torch.Tensor, ...]]
    free: Fence
    block: int | None = None
    copied: Fence | None = None


class Slots:
    """The buffers of one streamer. Not safe between threads: the streamer locks.

    Args:
        engine: allocates and copies.
        layouts: of every block; only those in ``streamed`` come into slots.
        course: of the blocks that do; more than there are slots.
        count: of slots, at least 1.
    """

    def __init__(
        self,
        engine: TransferEngine,
        layouts: Sequence[BlockLayout],
        course: Course,
        count: int,
    ) -> None:
        self._engine = engine
        self._layouts = layouts
        self._course = course
        kinds = {layouts[index] for index in course.order}
        self.slot_bytes = max((layout.nbytes for layout in kinds), default=0)
        self._slots: list[Slot] = []
        for _ in range(count):
            slab = engine.allocate(self.slot_bytes)
            tensors = {layout: block_tensors(layout, slab) for layout in kinds}
            # Memory from an allocator may still be in use by what was computed before.
            self._slots.append(Slot(slab, tensors, free=engine.mark()))

    @property
    def total_bytes(self) -> int:
        return self.slot_bytes * len(self._slots)

    def wanted(self) -> list[int]:
        """Which blocks belong in the slots, in the order in which they are needed."""
        return self._course.ahead(len(self._slots))

    def holding(self, index: int) -> Slot | None:
        """The slot in which a block is, or to which it is on its way."""
        return next((slot for slot in self._slots if slot.block == index), None)

    def leave(self, index: int, computed: Fence) -> None:
        """A block's slot may be overwritten once ``computed`` is passed.

        The block counts as gone at once, even if it comes again before its slot is needed: so blocks are
        asked of the source in one order, pass after pass.
        """
        slot = self.holding(index)
        assert slot is not None
        slot.block = slot.copied = None
        slot.free = computed

    def load(self, index: int, host: torch.Tensor) -> Fence:
        """Copy a wanted block into a slot that is due; gives the moment when ``host`` is free again."""
        wanted = set(self.wanted())
        slot = next(slot for slot in self._slots if slot.block not in wanted)
        self._slots.append(
            self._slots.pop(self._slots.index(slot))
        )  # the longest unused comes first
        slot.block = slot.copied = None
        nbytes = self._layouts[index].nbytes
        copied = self._engine.copy(slot.slab[:nbytes], host[:nbytes], slot.free)
        slot.block, slot.copied = index, copied
        return copied

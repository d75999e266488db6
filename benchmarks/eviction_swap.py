"""Block swapping by eviction, as a baseline for streaming: ``k1.py bench stream`` runs it beside ours.

Two blocks may be on the device. Before a block computes, the next one and then itself are brought there; when
there is no room the block of the lowest index goes back. Everything moves on the compute stream, from and to
ordinary memory, weights that were only read included. In a stack of 60 the last block is never the lowest,
so one place is lost for good and the others are fetched twice: 117 loads and 117 write-backs a pass.
"""

from __future__ import annotations

import torch
from torch import nn

ROOM = 2


class EvictionSwap:
    """Swaps whole blocks between main memory and a device.

    Args:
        blocks: with their weights, in main memory.
        device: where they compute.
        room: how many may be there at once.

    Attributes:
        loads, write_backs: blocks moved so far.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device, room: int = ROOM) -> None:
        self._blocks, self._device, self._room = blocks, device, room
        self._there: set[int] = set()
        self.loads = 0
        self.write_backs = 0

    def before(self, index: int) -> None:
        """Called before block ``index`` computes."""
        if index + 1 < len(self._blocks):
            self._bring(index + 1)
        self._bring(index)

    def _bring(self, index: int) -> None:
        if index in self._there:
            return
        while len(self._there) >= self._room:
            lowest = min(self._there)
            self._blocks[lowest].to("cpu")
            self._there.remove(lowest)
            self.write_backs += 1
        self._blocks[index].to(self._device)
        self._there.add(index)
        self.loads += 1

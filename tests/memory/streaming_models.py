"""Small stacks of blocks, their weights, and ways to run them, for the tests of streaming."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence

import torch
from torch import nn

from kandinsky5.memory.layout import BlockLayout

THREAD_NAME = "k1-weights"


class FakePageLock:
    """Grants page-locks up to so many bytes."""

    def __init__(self, limit_bytes: int = 1 << 40) -> None:
        self.limit_bytes, self.held = limit_bytes, {}

    def lock(self, address: int, nbytes: int) -> bool:
        granted = sum(self.held.values()) + nbytes <= self.limit_bytes
        if granted:
            self.held[address] = nbytes
        return granted

    def unlock(self, address: int) -> None:
        del self.held[address]


class Block(nn.Module):
    """Two linear layers, one of another dtype, a norm, a saved buffer and one that is not saved."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, width, bias=False, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(width)
        self.modulation = nn.Linear(width, 1)
        self.register_buffer("scales", torch.ones(hidden))
        self.register_buffer("table", torch.arange(float(width)), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.inner(self.norm(x))) * self.scales
        return x + self.outer(hidden.bfloat16()).float()


def stack(
    hidden: Sequence[int] = (5, 7, 5, 5, 9, 5), width: int = 6, seed: int = 0
) -> nn.ModuleList:
    """Blocks of random weights; those with the same hidden width are alike."""
    torch.manual_seed(seed)
    blocks = nn.ModuleList(Block(width, size) for size in hidden).requires_grad_(False)
    for block in blocks:
        block.scales.uniform_(0.5, 1.5)
    return blocks


def emptied(blocks: nn.ModuleList, keep: Sequence[str] = ()) -> nn.ModuleList:
    """A copy whose saved tensors are on the meta device, as a model is before it is loaded."""
    copied = copy.deepcopy(blocks)
    for block in copied:
        for entry in BlockLayout.of(block, skip=keep).entries:
            path, _, name = entry.name.rpartition(".")
            owner = block.get_submodule(path)
            entries = owner._parameters if entry.is_parameter else owner._buffers
            empty_tensor = entries[name].to("meta")
            entries[name] = (
                nn.Parameter(empty_tensor, requires_grad=False)
                if entry.is_parameter
                else empty_tensor
            )
    return copied


def layouts_of(blocks: nn.ModuleList, skip: Sequence[str] = ()) -> list[BlockLayout]:
    return [BlockLayout.of(block, skip) for block in blocks]


def fill_from(
    blocks: nn.ModuleList, layouts: Sequence[BlockLayout]
) -> Callable[[int, torch.Tensor], None]:
    """A source's ``fill`` that takes the weights from real blocks; it counts what it reads."""

    def fill(index: int, slab: torch.Tensor) -> None:
        fill.reads.append(index)
        state = blocks[index].state_dict()
        for name, view in layouts[index].views(slab).items():
            view.copy_(state[name])

    fill.reads = []
    return fill


def run(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x


def readers() -> list[str]:
    """Names of the sources' threads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]

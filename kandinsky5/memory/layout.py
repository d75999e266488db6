"""How a block's tensors lie in one slab of bytes, and which blocks of a model stay on the device."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn

ALIGNMENT_BYTES = 256
"""Every tensor begins at a multiple of this, as kernels that load whole vectors want it."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a block.

    Attributes:
        name: as in the block's ``state_dict()``.
        shape, dtype: of the tensor.
        offset: bytes from the beginning of the slab.
        is_parameter: False for a buffer.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    is_parameter: bool

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class BlockLayout:
    """Where the tensors of one block lie. Blocks that are alike have equal layouts.

    Attributes:
        entries: in the order of the block's ``state_dict()``.
        nbytes: of the slab, the gaps between the tensors counted.
    """

    entries: tuple[Entry, ...]
    nbytes: int

    @classmethod
    def of(cls, block: nn.Module, skip: Collection[str] = ()) -> BlockLayout:
        """The layout of a block's parameters and of those buffers that are saved with it.

        Args:
            block: on any device, ``meta`` too.
            skip: names of submodules or tensors that are left out.
        """
        entries = []
        end = 0
        for name, tensor, is_parameter in _saved_tensors(block):
            if any(name == left or name.startswith(f"{left}.") for left in skip):
                continue
            offset = _rounded_up(end)
            entry = Entry(name, tuple(tensor.shape), tensor.dtype, offset, is_parameter)
            entries.append(entry)
            end = offset + entry.nbytes
        return cls(tuple(entries), _rounded_up(end))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors alone."""
        return sum(entry.nbytes for entry in self.entries)

    def views(self, slab: torch.Tensor) -> dict[str, torch.Tensor]:
        """The block's tensors inside ``slab`` (uint8, at least ``nbytes`` long), by name."""
        return {
            entry.name: slab[entry.offset : entry.offset + entry.nbytes]
            .view(entry.dtype)
            .view(entry.shape)
            for entry in self.entries
        }


def spread(resident: int, blocks: int) -> tuple[int, ...]:
    """Which blocks stay on the device so that those streamed between them come as evenly as they can.

    Block 0 is the first of them: it computes while the first streamed blocks are still on their way.

    Args:
        resident: how many stay, 0 … ``blocks``.
        blocks: how many there are.

    Returns:
        Their indices, rising.

    Raises:
        ValueError: a number outside its range.
    """
    if not 0 <= resident <= blocks:
        raise ValueError(f"{resident} resident blocks of {blocks}: 0 to {blocks} can stay")
    return tuple(number * blocks // resident for number in range(resident))


def _saved_tensors(block: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Parameters (True) and persistent buffers (False); a tensor with two names comes twice."""
    for prefix, module in block.named_modules():
        start = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield start + name, parameter, True
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield start + name, buffer, False


def _rounded_up(count_bytes: int) -> int:
    return -(-count_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

"""Where the modules of a block look up their tensors, so that others can be put there."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kandinsky5.memory.layout import BlockLayout


class Places:
    """The entries of a block's modules in which its tensors are looked up, and what was in them.

    Args:
        block: whose tensors are replaced.
        layout: which of them.
    """

    def __init__(self, block: nn.Module, layout: BlockLayout) -> None:
        self._entries: list[tuple[dict[str, Any], str]] = []
        for entry in layout.entries:
            path, _, name = entry.name.rpartition(".")
            owner = block.get_submodule(path)
            self._entries.append(
                (owner._parameters if entry.is_parameter else owner._buffers, name)
            )
        self._before = [entries[name] for entries, name in self._entries]

    def hold(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Let the block compute with these, in the order of the layout's entries."""
        for (entries, name), tensor in zip(self._entries, tensors, strict=True):
            entries[name] = tensor

    def put_back(self) -> None:
        """Put everything back as it was."""
        for (entries, name), tensor in zip(self._entries, self._before, strict=True):
            entries[name] = tensor


def places_of(blocks: nn.ModuleList, layouts: tuple[BlockLayout, ...]) -> list[Places]:
    """The places of every block.

    Raises:
        ValueError: the layouts are not those of the blocks.
    """
    if len(blocks) != len(layouts):
        raise ValueError(f"{len(blocks)} blocks, but the source has {len(layouts)}")
    for index, (block, layout) in enumerate(zip(blocks, layouts, strict=True)):
        there = {
            (entry.name, entry.shape, entry.dtype, entry.is_parameter)
            for entry in BlockLayout.of(block).entries
        }
        for entry in layout.entries:
            if (entry.name, entry.shape, entry.dtype, entry.is_parameter) not in there:
                raise ValueError(f"block {index} has no {entry.name} as in the source's layout")
    return [Places(block, layout) for block, layout in zip(blocks, layouts, strict=True)]

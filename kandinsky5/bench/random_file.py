"""Checkpoints of random weights, for what only depends on shapes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from int8 import DEFAULT, Int8Linear
from kandinsky5.bench.blocks import FORMATS
from kandinsky5.conversion.plan import laid_out
from kandinsky5.errors import UserError
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.recipes import TensorSpec, bytes_of
from kandinsky5.model.weights import own_metadata
from kandinsky5.output.atomic import free_bytes

DRAWN_BYTES = 32 << 20
"""So many random bytes serve for all weights, each tensor beginning elsewhere in them."""
STEP_BYTES = 1_048_583
"""By how much the beginning moves from one tensor to the next: a prime, so that no two blocks are alike."""
FREE_BYTES = 2_000_000_000
"""Left free on the disk beside the file."""
WEIGHT_STD = 0.02
"""About that of trained weights, so that numbers stay in range through all blocks."""
INT8_STD = 73.3
"""Of whole numbers drawn evenly from −127 … 127."""


def write_random_transformer(path: Path, config: DiTConfig, weights: str = "int8") -> int:
    """Write a transformer with its dimensions; gives the file's bytes.

    Args:
        weights: ``int8``, in this program's own format, or ``bf16``.

    Raises:
        UserError: field ``folder``: the disk has not so much room; field ``weights``: another format.
    """
    if weights not in FORMATS:
        raise UserError("weights", weights, f"one of {', '.join(FORMATS)}")
    metadata = {"config": json.dumps(dataclasses.asdict(config))}
    if weights == "int8":
        metadata |= own_metadata(DEFAULT)
    return write_random_tensors(path, _empty(config, weights).state_dict(), metadata)


def write_random_tensors(
    path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> int:
    """Write tensors of these names, dtypes and shapes; gives the file's bytes.

    Main memory holds two drawn buffers, whatever the model.

    Raises:
        UserError: field ``folder``: the disk has not so much room.
    """
    entries = [(name, TensorSpec(t.dtype, tuple(t.shape))) for name, t in state.items()]
    entries.sort(key=lambda entry: -entry[1].dtype.itemsize)  # so that no number lies askew
    header, _, size_bytes = laid_out(entries, metadata or {})
    free = free_bytes(path.parent)
    if free < size_bytes + FREE_BYTES:
        needed = f"{(size_bytes + FREE_BYTES) / 1e9:.1f} GB free, there are {free / 1e9:.1f}"
        raise UserError("folder", str(path.parent), needed)
    draws = _Draws()
    with path.open("wb") as file:
        file.write(header)
        for name, spec in entries:
            for part in draws.parts(name, spec):
                file.write(part)
    return size_bytes


def _empty(config: DiTConfig, weights: str) -> nn.Module:
    """The model on the meta device; what is not quantised is bf16."""
    linear = nn.Linear if weights == "bf16" else partial(Int8Linear, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = DiffusionTransformer3D(config, linear=linear)
    return model.to(torch.bfloat16)


class _Draws:
    """Random numbers for any number of tensors."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        count = DRAWN_BYTES // 2
        whole = torch.empty(DRAWN_BYTES, dtype=torch.int8).random_(-127, 128, generator=generator)
        floats = torch.randn(count, generator=generator).mul_(WEIGHT_STD).bfloat16()
        self._drawn = {torch.int8: bytes_of(whole), torch.bfloat16: bytes_of(floats)}
        self._begin = 0

    def parts(self, name: str, spec: TensorSpec) -> list[memoryview]:
        """The bytes of one tensor."""
        if spec.dtype not in self._drawn or name.endswith("norm.weight"):
            value = 1.0 if name.endswith("norm.weight") else WEIGHT_STD / INT8_STD
            return [bytes_of(torch.full((math.prod(spec.shape),), value, dtype=spec.dtype))]
        drawn, left = self._drawn[spec.dtype], spec.size_bytes
        begin = self._begin // 2 * 2
        self._begin = (self._begin + STEP_BYTES) % DRAWN_BYTES
        parts = []
        while left:
            part = drawn[begin : begin + left]
            parts.append(part)
            left, begin = left - len(part), 0
        return parts

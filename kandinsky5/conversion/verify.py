"""How exact a converted checkpoint is: every layer compared with its source, file against file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from kandinsky5.errors import CheckpointError
from kandinsky5.model.checkpoint import Checkpoint
from kandinsky5.model.reader import checked_model
from kandinsky5.model.recipes import float_rows
from kandinsky5.model.safetensors_file import shown
from kandinsky5.model.torch_dtypes import TORCH_DTYPES
from kandinsky5.model.weights import StoredTensor, is_quantised_layer


@dataclass(frozen=True)
class Verification:
    """What comparing showed.

    Attributes:
        sqnr_db: weight of a layer of the table → signal to quantisation noise in dB; None where the two
            agree to the bit.
        equal_tensors: how many of the other tensors are the source's, rounded to the file's dtype.
    """

    sqnr_db: dict[str, float | None]
    equal_tensors: int

    @property
    def lowest(self) -> tuple[str, float] | None:
        """The least exact layer, or None where all agree to the bit."""
        inexact = [(name, db) for name, db in self.sqnr_db.items() if db is not None]
        return min(inexact, key=lambda pair: pair[1], default=None)


def verify(source: Path, converted: Path) -> Verification:
    """Read both files and compare them.

    Args:
        source: the original, as :func:`~kandinsky5.conversion.convert.convert` took it.
        converted: the file it wrote.

    Raises:
        CheckpointError: either cannot be read, or a tensor that was only to be copied differs.
    """
    with Checkpoint(source) as before, Checkpoint(converted) as after:
        original, made = checked_model(before)[1], checked_model(after)[1]
        if original.keys() != made.keys():
            raise CheckpointError(converted, f"its tensors are not those of {source}")
        sqnr_db: dict[str, float | None] = {}
        for name, tensor in original.items():
            if is_quantised_layer(name):
                sqnr_db[name] = _sqnr_db(before, tensor, after, made[name])
            elif not _are_equal(before, tensor, after, made[name]):
                raise CheckpointError(
                    converted, f"{shown(name)} differs from {source}: convert it again"
                )
        return Verification(sqnr_db, len(original) - len(sqnr_db))


def _sqnr_db(
    before: Checkpoint, original: StoredTensor, after: Checkpoint, made: StoredTensor
) -> float | None:
    """10·log10 of Σw² over Σ(w − ŵ)², sums in float64; None where nothing differs or all is zero."""
    signal = noise = 0.0
    pairs = zip(float_rows(before, original), float_rows(after, made), strict=True)
    for (_, true), (_, found) in pairs:
        signal += float(true.square().sum(dtype=torch.float64))
        noise += float((true - found).square().sum(dtype=torch.float64))
    return round(10 * math.log10(signal / noise), 2) if signal and noise else None


def _are_equal(
    before: Checkpoint, original: StoredTensor, after: Checkpoint, made: StoredTensor
) -> bool:
    dtype = TORCH_DTYPES[made.info.dtype]
    pairs = zip(float_rows(before, original), float_rows(after, made), strict=True)
    return all(
        torch.equal(true.to(dtype).nan_to_num(), found.to(dtype).nan_to_num())
        for (_, true), (_, found) in pairs
    )

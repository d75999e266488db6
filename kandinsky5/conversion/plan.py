"""What a converted file will be, to the byte, before anything is read: recipes, header and places.

A conversion is a function of its source alone: no times, names or machines go into the file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from int8 import DEFAULT
from kandinsky5.conversion.fingerprint import source_fingerprint
from kandinsky5.errors import UserError
from kandinsky5.model.checkpoint import Checkpoint
from kandinsky5.model.dit import DiTConfig
from kandinsky5.model.reader import checked_model, keeps_float32
from kandinsky5.model.recipes import Cast, Recipe, TensorSpec, ToInt8, recipe_for
from kandinsky5.model.torch_dtypes import TORCH_DTYPES
from kandinsky5.model.weights import (
    FLOATS,
    FORMAT_KEY,
    SCHEME_KEY,
    SOURCE_FINGERPRINT_KEY,
    SOURCE_KEY,
    VERSION_KEY,
    StoredTensor,
    own_metadata,
    quantization_of,
)

KINDS = ("int8", "bf16")
"""What a checkpoint may be converted to."""

HEADER_MULTIPLE = 4096
"""The tensors begin at a whole page of the disk."""

_FORMAT_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion that has not begun.

    Attributes:
        to: one of ``KINDS``.
        recipes: what to make, in the order of the source's disk.
        header: the first bytes of the file: length and JSON, padded.
        places: name → first byte in the file.
        size_bytes: of the whole file.
        source_fingerprint: of what is converted; stands in the header too.
    """

    to: str
    recipes: tuple[Recipe, ...]
    header: bytes
    places: dict[str, int]
    size_bytes: int
    source_fingerprint: str

    @property
    def converted(self) -> int:
        """How many tensors of the source change their format."""
        return sum(_changes(recipe) for recipe in self.recipes)


def plan_conversion(checkpoint: Checkpoint, to: str) -> ConversionPlan:
    """What converting a checkpoint gives.

    Quantised layers become int8 or bf16. Of the rest, ``int8`` keeps every dtype as it is, float8 becomes
    bf16; ``bf16`` makes all bf16 save what is kept in float32 for quality.

    Args:
        checkpoint: the source.
        to: one of ``KINDS``.

    Raises:
        UserError: field ``to``: the file is that already, or there is nothing to convert.
        CheckpointError: no Kandinsky 5, or scales or a format that cannot be read.
    """
    model, stored = checked_model(checkpoint)
    _refuse_what_is_done(checkpoint, to)
    dtype_of = _own_float if to == "int8" else _bf16
    recipes = tuple(
        recipe_for(checkpoint, tensor, weights=to, scheme=DEFAULT, dtype_of=dtype_of)
        for tensor in stored.values()
    )
    if not any(_changes(recipe) for recipe in recipes):
        nothing = "has no layer that can be quantised" if to == "int8" else "is bf16 already"
        raise UserError("to", to, f"{checkpoint.path.name} {nothing}")
    entries = [entry for recipe in recipes for entry in recipe.outputs.items()]
    if not _are_aligned(entries):  # odd sizes: the widest first, so that no number lies askew
        entries.sort(key=lambda entry: -entry[1].dtype.itemsize)
    metadata = _metadata(checkpoint, model.config, to)
    header, places, size_bytes = laid_out(entries, metadata)
    fingerprint = metadata[SOURCE_FINGERPRINT_KEY]
    return ConversionPlan(to, recipes, header, places, size_bytes, fingerprint)


def _refuse_what_is_done(checkpoint: Checkpoint, to: str) -> None:
    if to not in KINDS:
        raise UserError("to", to, f"one of {', '.join(KINDS)}")
    stored_as = quantization_of(checkpoint.tensors, checkpoint.metadata)
    if to == "int8" and stored_as.startswith("int8"):
        raise UserError("to", to, f"{checkpoint.path.name} is {stored_as} already: use it as it is")


def _own_float(stored: StoredTensor) -> torch.dtype:
    return TORCH_DTYPES[stored.info.dtype] if stored.info.dtype in FLOATS else torch.bfloat16


def _bf16(stored: StoredTensor) -> torch.dtype:
    return torch.float32 if keeps_float32(stored) else torch.bfloat16


def _changes(recipe: Recipe) -> bool:
    if isinstance(recipe, Cast):
        return not recipe.stored.is_plain or recipe.dtype != _own_float(recipe.stored)
    return isinstance(recipe, ToInt8)


def _metadata(checkpoint: Checkpoint, config: DiTConfig, to: str) -> dict[str, str]:
    """The source's entries, the dimensions, and where the file comes from."""
    own = {FORMAT_KEY, VERSION_KEY, SCHEME_KEY}
    kept = {key: text for key, text in checkpoint.metadata.items() if key not in own}
    kept["config"] = json.dumps(dataclasses.asdict(config), sort_keys=True)
    kept[SOURCE_KEY] = checkpoint.header_sha256
    kept[SOURCE_FINGERPRINT_KEY] = source_fingerprint(checkpoint)
    return kept | own_metadata(DEFAULT) if to == "int8" else kept


def _are_aligned(entries: Sequence[tuple[str, TensorSpec]]) -> bool:
    place = 0
    for _, spec in entries:
        if place % spec.dtype.itemsize:
            return False
        place += spec.size_bytes
    return True


def laid_out(
    entries: Sequence[tuple[str, TensorSpec]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Header, name → first byte in the file, size of the file."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    begins: dict[str, int] = {}
    end = 0
    for name, spec in entries:
        begins[name], end = end, end + spec.size_bytes
        header[name] = {
            "dtype": _FORMAT_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % HEADER_MULTIPLE)
    start = 8 + len(text)
    places = {name: start + begin for name, begin in begins.items()}
    return len(text).to_bytes(8, "little") + text, places, start + end

"""A transformer whose weights can be read: checked by its header, on the meta device, filled on demand.

Whoever owns the memory gives tensors to fill: a whole model's, or the views of one streamed block.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from int8 import DEFAULT
from kandinsky5.errors import UserError
from kandinsky5.model.architecture import empty_transformer
from kandinsky5.model.attention import AttentionEngine, sdpa
from kandinsky5.model.checkpoint import Checkpoint
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.recipes import Recipe, recipe_for
from kandinsky5.model.torch_dtypes import TORCH_DTYPES
from kandinsky5.model.weights import (
    StoredTensor,
    quantization_of,
    stored_tensors,
    weight_shapes,
)

WEIGHTS_FORMATS = ("auto", "bf16", "int8", "fp8")
"""What quantisable layers may be read as; ``auto`` is as stored, ``bf16`` any float of 16 bits or more."""

_KEPT_FLOAT32 = re.compile(r"(^|[._])(time_embeddings|modulation|norm)\.")
"""Tensors that are computed with in float32 whatever the rest; rounding them costs quality."""


class TransformerReader:
    """A checked transformer on the meta device, and its weights in the file. Close it, or use ``with``.

    Args:
        path: a .safetensors file, an index of shards, or a folder with either; in any format of
            :mod:`kandinsky5.model.weights`.
        weights: one of ``WEIGHTS_FORMATS``; what is stored otherwise is quantised or dequantised while it
            is read. Files of either int8 kind count as ``int8``, of any fp8 kind as ``fp8``.
        dtype: of what is not quantised; None takes what most of the file's floats have. What the file has
            in float32 of modulation, time embedding and norms stays so.
        attention: the model's engine.

    Attributes:
        path: the file, or the index, that was found.
        model: on the meta device, in evaluation mode; every tensor has the dtype and shape it will have,
            quantised layers are in their places.
        stored_as: how the file has its weights, as :attr:`FileReport.quantization` names it.

    Raises:
        UserError: no such ``weights``.
        CheckpointError: unusable, no Kandinsky 5, or in a format this program does not read.
    """

    def __init__(
        self,
        path: Path,
        *,
        weights: str = "auto",
        dtype: torch.dtype | None = None,
        attention: AttentionEngine = sdpa,
    ) -> None:
        if weights not in WEIGHTS_FORMATS:
            raise UserError("weights", weights, f"one of {', '.join(WEIGHTS_FORMATS)}")
        self._checkpoint = Checkpoint(path)
        try:
            self.path = self._checkpoint.path
            self.model, recipes = _prepared(self._checkpoint, weights, dtype, attention)
        except BaseException:
            self.close()
            raise
        self.stored_as = quantization_of(self._checkpoint.tensors, self._checkpoint.metadata)
        self._recipes = {name: recipe for recipe in recipes for name in recipe.outputs}
        self._order = {recipe: place for place, recipe in enumerate(recipes)}

    @torch.no_grad()
    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill tensors from the file; several threads may do so at once, with targets of their own.

        Bytes go straight into a target where the dtypes agree and it is contiguous in main memory.
        Otherwise they are cast, dequantised or quantised a few rows at a time.

        Args:
            targets: name in ``model.state_dict()`` → tensor of the shape and dtype it has there (another
                floating dtype where it is not quantised is cast to).

        Raises:
            KeyError: no such name.
            CheckpointError: the file cannot be read, has become shorter, or was removed, replaced or
                changed since it was opened.
        """
        wanted = {self._recipes[name] for name in targets}
        for recipe in sorted(wanted, key=self._order.__getitem__):
            recipe.fill(self._checkpoint, targets)
        self._checkpoint.check_unchanged()

    def names_read_together(self) -> Iterator[tuple[str, ...]]:
        """All names of the model in the order of the disk; those made from one stored tensor together."""
        for recipe in self._order:
            yield tuple(recipe.outputs)

    def close(self) -> None:
        """Let go of the file. No thread may be reading then."""
        self._checkpoint.close()

    def __enter__(self) -> TransformerReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def checked_model(
    checkpoint: Checkpoint, attention: AttentionEngine = sdpa
) -> tuple[DiffusionTransformer3D, dict[str, StoredTensor]]:
    """The unquantised transformer on the meta device, and how each of its tensors is stored.

    Raises:
        CheckpointError: no Kandinsky 5, or in a format this program does not read.
    """
    shapes = weight_shapes(checkpoint.tensors)
    config = checkpoint.read_config()
    model = empty_transformer(checkpoint.path, shapes, config, attention=attention)
    return model, stored_tensors(checkpoint)


def keeps_float32(stored: StoredTensor) -> bool:
    """Whether a tensor is in float32 in the file and better stays so."""
    return stored.info.dtype in ("F32", "F64") and bool(_KEPT_FLOAT32.search(stored.name))


def _prepared(
    checkpoint: Checkpoint,
    weights: str,
    dtype: torch.dtype | None,
    attention: AttentionEngine,
) -> tuple[DiffusionTransformer3D, list[Recipe]]:
    model, stored = checked_model(checkpoint, attention)
    compute = dtype or _usual_dtype(stored)

    def dtype_of(tensor: StoredTensor) -> torch.dtype:
        return torch.float32 if keeps_float32(tensor) else compute

    recipes = [
        recipe_for(checkpoint, tensor, weights=weights, scheme=DEFAULT, dtype_of=dtype_of)
        for tensor in stored.values()
    ]
    with torch.device("meta"):
        for recipe in recipes:
            if layer := recipe.layer(f"{recipe.layer_name}.bias" in stored):
                model.set_submodule(recipe.layer_name, layer, strict=True)
        for recipe in recipes:
            for name, spec in recipe.outputs.items():
                put_tensor(model, name, torch.empty(spec.shape, dtype=spec.dtype))
    return model.eval(), recipes


def put_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Make ``tensor`` the model's tensor of that name, parameter or buffer as it was."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


def fill_model(
    model: nn.Module,
    groups: Iterable[tuple[str, ...]],
    read_into: Callable[[Mapping[str, torch.Tensor]], None],
    device: torch.device,
) -> None:
    """Give a model on the meta device its weights, a few tensors at a time, none of them twice.

    Args:
        model: its tensors have the dtypes and shapes they will have.
        groups: names of tensors that are read together.
        read_into: fills tensors in main memory, given by name.
        device: where they go then.
    """
    expected = model.state_dict()
    for names in groups:
        targets = {name: torch.empty_like(expected[name], device="cpu") for name in names}
        read_into(targets)
        for name in names:
            put_tensor(model, name, targets.pop(name).to(device))


def _usual_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype of most floats, those that stay float32 anyway not counted; bf16 where there are none."""
    elements: Counter[torch.dtype] = Counter()
    for name, tensor in stored.items():
        if tensor.is_plain and not _KEPT_FLOAT32.search(name):
            elements[TORCH_DTYPES[tensor.info.dtype]] += tensor.info.elements
    usual = elements.most_common(1)[0][0] if elements else torch.bfloat16
    return torch.float32 if usual == torch.float64 else usual

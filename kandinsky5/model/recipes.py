"""How tensors of the model are made from those of a file: copied, cast, dequantised or quantised.

Loading, streaming from disk and conversion all follow the same recipes, so that a layer quantised while it
is loaded has the very numbers of a converted file.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from int8 import Int8Linear, Int8Scheme, dequantize
from int8.reference import quantize
from kandinsky5.errors import CheckpointError
from kandinsky5.model.checkpoint import Checkpoint
from kandinsky5.model.fp8 import FLOAT8, Fp8Linear, float8_scale, to_float8
from kandinsky5.model.safetensors_file import shown
from kandinsky5.model.torch_dtypes import TORCH_DTYPES
from kandinsky5.model.weights import StoredTensor, is_quantised_layer

CHUNK_VALUES = 4 << 20
"""Values worked on at a time: 16 MB in float32, whatever the size of a weight."""

Targets = Mapping[str, torch.Tensor]
DtypeRule = Callable[[StoredTensor], torch.dtype]
"""What a tensor that is not quantised becomes."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a recipe makes."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Recipe(ABC):
    """One tensor of a file, and what is made of it.

    Args:
        stored: the tensor in the file.
    """

    def __init__(self, stored: StoredTensor) -> None:
        self.stored = stored
        self.layer_name = stored.name.removesuffix(".weight")

    @property
    @abstractmethod
    def outputs(self) -> dict[str, TensorSpec]:
        """Name in the model → what it will be."""

    @abstractmethod
    def fill(self, checkpoint: Checkpoint, targets: Targets) -> None:
        """Fill those of the outputs that are among ``targets``. Threads may do so at the same time.

        Raises:
            CheckpointError: the file cannot be read, or holds numbers that cannot be quantised.
        """

    def layer(self, bias: bool) -> nn.Module | None:
        """A linear layer for these outputs, made where the default device is; None for ``nn.Linear``."""
        return None


class Cast(Recipe):
    """Floats, whatever they were: copied straight where the dtypes agree, else row by row."""

    def __init__(self, stored: StoredTensor, dtype: torch.dtype) -> None:
        super().__init__(stored)
        self.dtype = dtype

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        return {self.stored.name: TensorSpec(self.dtype, self.stored.info.shape)}

    def fill(self, checkpoint: Checkpoint, targets: Targets) -> None:
        target = targets.get(self.stored.name)
        if target is None:
            return
        if self.stored.is_plain:
            copy_into(checkpoint, self.stored.source, target)
            return
        for first, rows in float_rows(checkpoint, self.stored):
            target[first : first + len(rows)].copy_(rows)


class Int8AsStored(Recipe):
    """int8 with its own scales, bytes as they are."""

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        return int8_outputs(self.stored, _scheme_of(self.stored))

    def fill(self, checkpoint: Checkpoint, targets: Targets) -> None:
        assert self.stored.scales
        sources = (self.stored.source, self.stored.scales)
        for name, source in zip(self.outputs, sources, strict=True):
            if name in targets:
                copy_into(checkpoint, source, targets[name])
                if source == self.stored.scales:
                    _check_finite(checkpoint, source, targets[name])

    def layer(self, bias: bool) -> nn.Module:
        return _int8_layer(self.stored, _scheme_of(self.stored), bias)


class ToInt8(Recipe):
    """Floats quantised to int8."""

    def __init__(self, stored: StoredTensor, scheme: Int8Scheme) -> None:
        super().__init__(stored)
        self.scheme = scheme

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        return int8_outputs(self.stored, self.scheme)

    def fill(self, checkpoint: Checkpoint, targets: Targets) -> None:
        weight, scales = (targets.get(name) for name in self.outputs)
        for first, rows in finite_rows(checkpoint, self.stored):
            part = slice(first, first + len(rows))
            for target, made in zip((weight, scales), quantize(rows, self.scheme), strict=True):
                if target is not None:
                    target[part].copy_(made)

    def layer(self, bias: bool) -> nn.Module:
        return _int8_layer(self.stored, self.scheme, bias)


class Float8AsStored(Recipe):
    """float8 with its scale; without one in the file it is 1."""

    def __init__(self, stored: StoredTensor, scale_values: int) -> None:
        super().__init__(stored)
        self.per_output = scale_values > 1

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        info = self.stored.info
        scale_shape = (info.shape[0], 1) if self.per_output else ()
        return {
            self.stored.name: TensorSpec(TORCH_DTYPES[info.dtype], info.shape),
            f"{self.layer_name}.weight_scale": TensorSpec(torch.float32, scale_shape),
        }

    def fill(self, checkpoint: Checkpoint, targets: Targets) -> None:
        weight, scale = (targets.get(name) for name in self.outputs)
        if weight is not None:
            copy_into(checkpoint, self.stored.source, weight)
        if scale is not None:
            scale.copy_(_scales(checkpoint, self.stored).reshape(scale.shape))

    def layer(self, bias: bool) -> nn.Module:
        out_features, in_features = self.stored.info.shape
        dtype = TORCH_DTYPES[self.stored.info.dtype]
        return Fp8Linear(in_features, out_features, bias, per_output=self.per_output, dtype=dtype)


class ToFloat8(Recipe):
    """Floats quantised to float8 with one scale for the whole weight."""

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        return {
            self.stored.name: TensorSpec(FLOAT8, self.stored.info.shape),
            f"{self.layer_name}.weight_scale": TensorSpec(torch.float32, ()),
        }

    def fill(self, checkpoint: Checkpoint, targets: Targets) -> None:
        weight, scale = (targets.get(name) for name in self.outputs)
        parts = finite_rows(checkpoint, self.stored)
        made = float8_scale(torch.stack([rows.abs().amax() for _, rows in parts]).amax())
        if scale is not None:
            scale.copy_(made)
        if weight is not None:
            for first, rows in float_rows(checkpoint, self.stored):
                weight[first : first + len(rows)].copy_(to_float8(rows, made))

    def layer(self, bias: bool) -> nn.Module:
        out_features, in_features = self.stored.info.shape
        return Fp8Linear(in_features, out_features, bias)


def recipe_for(
    checkpoint: Checkpoint,
    stored: StoredTensor,
    *,
    weights: str,
    scheme: Int8Scheme,
    dtype_of: DtypeRule,
) -> Recipe:
    """What to make of a stored tensor.

    Args:
        checkpoint: where it is.
        stored: the tensor.
        weights: format of the layers of the table: ``auto`` (as stored), ``bf16`` (floats of 16 bits or
            more), ``int8``, ``fp8``.
        scheme: of weights that become int8.
        dtype_of: of everything that is not quantised.
    """
    can_be_quantised = is_quantised_layer(stored.name) and len(stored.info.shape) == 2
    if can_be_quantised and weights != "bf16":
        if stored.scheme is not None and weights in ("auto", "int8"):
            return Int8AsStored(stored)
        if stored.is_float8 and weights in ("auto", "fp8"):
            count = checkpoint.tensors[stored.scales].elements if stored.scales else 1
            return Float8AsStored(stored, count)
        if weights == "int8":
            return ToInt8(stored, scheme)
        if weights == "fp8":
            return ToFloat8(stored)
    return Cast(stored, dtype_of(stored))


def float_rows(checkpoint: Checkpoint, stored: StoredTensor) -> Iterator[tuple[int, torch.Tensor]]:
    """A weight in float32, dequantised, a few rows at a time: (first row, [rows, …])."""
    scales = None if stored.scales is None else _scales(checkpoint, stored)
    for first, rows in _raw_rows(checkpoint, stored.source):
        part = slice(first, first + len(rows))
        if stored.scheme is not None:
            assert scales is not None
            yield first, dequantize(rows, scales[part], stored.scheme)
        elif scales is not None:
            by_row = scales if scales.numel() == 1 else scales[part]
            yield first, rows.float().mul_(by_row.reshape(-1, *[1] * (rows.dim() - 1)))
        else:
            yield first, rows.float()


def finite_rows(checkpoint: Checkpoint, stored: StoredTensor) -> Iterator[tuple[int, torch.Tensor]]:
    """As :func:`float_rows`, for quantising.

    Raises:
        CheckpointError: a number that is not finite: one would spoil its whole group.
    """
    for first, rows in float_rows(checkpoint, stored):
        if not torch.isfinite(rows.sum()) and not torch.isfinite(rows).all():
            raise CheckpointError(
                checkpoint.path,
                f"{shown(stored.name)} has NaN or infinite numbers: damaged, download it again",
            )
        yield first, rows


def copy_into(checkpoint: Checkpoint, source: str, target: torch.Tensor) -> None:
    """Read a tensor of the file into ``target``: its very bytes where that is possible, else cast.

    Args:
        checkpoint: where it is.
        source: its name there.
        target: of the same shape.
    """
    dtype = TORCH_DTYPES[checkpoint.tensors[source].dtype]
    assert target.shape == checkpoint.tensors[source].shape, source
    if target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous():
        checkpoint.read_into(source, bytes_of(target))
    elif target.dim() == 0:
        target.copy_(checkpoint.read(source))
    else:
        for first, rows in _raw_rows(checkpoint, source):
            target[first : first + len(rows)].copy_(rows)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in main memory, without a copy."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _raw_rows(checkpoint: Checkpoint, source: str) -> Iterator[tuple[int, torch.Tensor]]:
    info = checkpoint.tensors[source]
    dtype = TORCH_DTYPES[info.dtype]
    row = info.shape[1:]
    row_bytes = math.prod(row) * dtype.itemsize
    step = max(1, CHUNK_VALUES // max(1, math.prod(row)))
    for first in range(0, info.shape[0], step):
        rows = torch.empty(min(step, info.shape[0] - first), *row, dtype=dtype)
        checkpoint.read_into(source, bytes_of(rows), first * row_bytes)
        yield first, rows


def _scales(checkpoint: Checkpoint, stored: StoredTensor) -> torch.Tensor:
    if not stored.scales:
        return torch.ones(())
    scales = checkpoint.read(stored.scales).float()
    _check_finite(checkpoint, stored.scales, scales)
    return scales


def _check_finite(checkpoint: Checkpoint, name: str, scales: torch.Tensor) -> None:
    """Raise CheckpointError for scales that would make NaN of everything a layer computes."""
    if not scales.isfinite().all():
        raise CheckpointError(
            checkpoint.path,
            f"{shown(name)} has scales that are NaN or infinite: damaged, download it again",
        )


def int8_outputs(stored: StoredTensor, scheme: Int8Scheme) -> dict[str, TensorSpec]:
    """Weight and scales of an int8 layer, in this order."""
    out_features, in_features = stored.info.shape
    scales = TensorSpec(torch.float32, (out_features, scheme.groups(in_features)))
    return {stored.name: TensorSpec(torch.int8, stored.info.shape), f"{stored.name}_scales": scales}


def _int8_layer(stored: StoredTensor, scheme: Int8Scheme, bias: bool) -> nn.Module:
    out_features, in_features = stored.info.shape
    return Int8Linear(in_features, out_features, bias, scheme=scheme)


def _scheme_of(stored: StoredTensor) -> Int8Scheme:
    assert stored.scheme is not None
    return stored.scheme

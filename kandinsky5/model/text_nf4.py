"""The text encoder's linear layers in NF4, 4 bits a weight; bitsandbytes quantises and multiplies.

NF4 (Dettmers et al., arXiv 2305.14314, section 3) gives every weight one of 16 levels, the quantiles of a
normal distribution, times the largest magnitude of its block of 64. That magnitude stays in float32:
quantising it too would save 305 MB of 5.9 GB of Qwen2.5-VL 7B, and every layer five more tensors.
Attention and feed-forward of the language part are quantised; token table, norms, biases, output layer and
vision tower are not. The library is optional: it is imported when NF4 is asked for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from kandinsky5.model.reader import put_tensor
from kandinsky5.model.text_loading import QWEN_TYPES, EncoderReader

BLOCK = 64
"""Weights that share a magnitude; a layer whose width is no multiple of it stays as it is."""
HOST_CHUNK = 2**20
"""Weights quantised at once in main memory, where the library makes several float32 copies of them."""
TOLERANCE = 0.01
"""Of the self-test, relative; products rounded to bfloat16 differ by about 0.003."""
MAX_QUANTISATION_ERROR = 0.12
"""Relative, for normal weights, which NF4 keeps to 0.09."""

_NF4 = "nf4"
_PACKED = ("weight", "absmax")
_INSTALL = "bitsandbytes is not installed (pip install bitsandbytes)"


class Nf4Linear(nn.Module):
    """A linear layer whose weight is kept in NF4; it is made on the meta device, to be filled.

    Its tensors are plain ones: they may be views into somebody's slab.

    Args:
        in_features: a multiple of :data:`BLOCK`.
        out_features: rows of the weight.
        bias: whether there is one.
        dtype: of the bias; inputs of any floating dtype are computed in their own.

    Attributes:
        weight: uint8 [out_features, in_features / 2], two levels a byte.
        absmax: float32 [out_features, in_features / 64].
        bias: [out_features] or None.
    """

    weight: torch.Tensor
    absmax: torch.Tensor
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype
    ) -> None:
        if in_features % BLOCK:
            raise ValueError(f"{in_features} input features: NF4 needs a multiple of {BLOCK}")
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        with torch.device("meta"):
            packed = torch.empty(out_features, in_features // 2, dtype=torch.uint8)
            absmax = torch.empty(out_features, in_features // BLOCK, dtype=torch.float32)
            added = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False)
        self.register_buffer("weight", packed)
        self.register_buffer("absmax", absmax)
        self.register_parameter("bias", added if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] → [..., out_features], in the dtype of ``x``."""
        state = _state(self.absmax, (self.out_features, self.in_features), x.dtype)
        if x.device.type == "cpu":  # the library's CPU kernels for products take bfloat16 alone
            return nn.functional.linear(x, _unpacked(self.weight, state), self.bias)
        packed = self.weight.view(-1, 1).t()
        return _library().matmul_4bit(x, packed, quant_state=state, bias=self.bias)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that the layer computes with, [out_features, in_features]."""
        shape = (self.out_features, self.in_features)
        return _unpacked(self.weight, _state(self.absmax, shape, dtype))


class Nf4Reader(EncoderReader):
    """The language part of Qwen2.5-VL with its linear layers in NF4, quantised one by one as they are read.

    Args:
        folder: with config.json and weights.
        dtype: of what is not quantised.
        quantise_on: the device that quantises; a GPU does it faster than a disk reads, one core of a CPU
            takes some 50 MB of bfloat16 a second.

    Raises:
        CheckpointError: the folder is missing, broken or of another model.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, quantise_on: torch.device) -> None:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

        super().__init__(Qwen2_5_VLTextModel, folder, QWEN_TYPES, dtype=dtype)
        self._quantise_on = quantise_on
        self._quantised = with_nf4_layers(self.model)
        for path in self._quantised:
            self._places[f"{path}.absmax"] = self._places[f"{path}.weight"]

    def _made_of(self, name: str) -> dict[str, torch.Tensor]:
        path, _, leaf = name.rpartition(".")
        if path not in self._quantised or leaf not in _PACKED:
            return super()._made_of(name)
        stored = self._stored_weight(name).to(self._quantise_on)
        packed, absmax = quantised(stored)
        return {f"{path}.weight": packed, f"{path}.absmax": absmax}


def open_qwen(
    folder: Path, *, dtype: torch.dtype, weights: str = "bf16", device: torch.device
) -> EncoderReader:
    """The language part of Qwen2.5-VL, to be read.

    Args:
        weights: ``nf4``, or anything else for weights in ``dtype``.
        device: where it will compute.

    Raises:
        CheckpointError: the folder is missing, broken or of another model.
    """
    if weights == _NF4:
        return Nf4Reader(folder, dtype=dtype, quantise_on=device)
    return EncoderReader.of_qwen(folder, dtype=dtype)


def with_nf4_layers(model: Any) -> frozenset[str]:
    """Put an empty :class:`Nf4Linear` in the place of every linear layer inside ``model.layers``.

    Args:
        model: ``Qwen2_5_VLTextModel``, its parameters on the meta device.

    Returns:
        The layers' names in the model.
    """
    found = {
        f"layers.{name}": layer
        for name, layer in model.layers.named_modules()
        if isinstance(layer, nn.Linear) and layer.in_features % BLOCK == 0
    }
    for name, layer in found.items():
        has_bias, dtype = layer.bias is not None, layer.weight.dtype
        empty = Nf4Linear(layer.in_features, layer.out_features, bias=has_bias, dtype=dtype)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, empty.eval())
    return frozenset(found)


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as :class:`Nf4Linear` keeps it, on the device where it is.

    Args:
        weight: floating [out, in], ``in`` a multiple of :data:`BLOCK`.

    Returns:
        uint8 [out, in / 2] and float32 [out, in / 64].
    """
    rows = len(weight)
    flat = weight.reshape(-1)
    packed = torch.empty(flat.numel() // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(flat.numel() // BLOCK, dtype=torch.float32, device=weight.device)
    step = HOST_CHUNK if weight.device.type == "cpu" else max(1, flat.numel())
    for begin in range(0, flat.numel(), step):
        part = flat[begin : begin + step]
        if part.dtype == torch.float64:
            part = part.float()
        levels, state = _library().functional.quantize_4bit(
            part, blocksize=BLOCK, compress_statistics=False, quant_type=_NF4
        )
        end = begin + part.numel()
        packed[begin // 2 : end // 2] = levels.view(-1)
        absmax[begin // BLOCK : end // BLOCK] = state.absmax
    return packed.view(rows, -1), absmax.view(rows, -1)


@cache
def nf4_problem(device: torch.device) -> str | None:
    """Why NF4 cannot be used on a device; None where a small layer gave right numbers there.

    Raises:
        torch.OutOfMemoryError: no room for the layer; the next call tries again.
    """
    try:
        _library()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "bitsandbytes":
            return _INSTALL
        return f"bitsandbytes cannot be imported ({_first_line(error)})"
    try:
        error_of_levels, error_of_product = _self_test(device)
    except (RuntimeError, AttributeError, TypeError, ValueError, NotImplementedError) as error:
        if isinstance(error, RuntimeError) and "out of memory" in str(error).lower():
            raise torch.OutOfMemoryError(str(error)) from error
        return f"bitsandbytes does not work on {device} ({_first_line(error)})"
    if not error_of_levels <= MAX_QUANTISATION_ERROR or not error_of_product <= TOLERANCE:
        return (
            f"bitsandbytes gives wrong numbers on {device}: weights off by {error_of_levels:.0e},"
            f" products by {error_of_product:.0e}"
        )
    return None


@torch.inference_mode()
def _self_test(device: torch.device) -> tuple[float, float]:
    """Relative errors: of quantised weights, and of products against those of the dequantised weights.

    One token and several take different kernels; the layer is no multiple of their tiles.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(136, 5 * BLOCK, generator=generator)
    layer = Nf4Linear(5 * BLOCK, 136, bias=True, dtype=dtype)
    bias = torch.randn(136, generator=generator).to(device, dtype)
    for name, tensor in zip(_PACKED, quantised(weight.to(device, dtype)), strict=True):
        put_tensor(layer, name, tensor)
    put_tensor(layer, "bias", bias)
    kept = layer.dequantised(torch.float32).cpu()
    of_product = 0.0
    for tokens in (1, 19):
        x = torch.randn(1, tokens, 5 * BLOCK, generator=generator).to(dtype)
        found = layer(x.to(device)).float().cpu()
        wanted = x.float() @ kept.t() + bias.float().cpu()
        of_product = max(of_product, _relative(found, wanted))
    return _relative(kept, weight), of_product


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    error = float((found - wanted).norm() / wanted.norm())
    return error if math.isfinite(error) else math.inf


@cache
def _library() -> ModuleType:
    """bitsandbytes, imported without its advice on packages that it could use besides.

    Raises:
        ImportError, OSError, RuntimeError, AttributeError: it is not there, or does not fit what is.
    """
    with _only_errors(logging.getLogger("bitsandbytes")):
        import bitsandbytes

    return bitsandbytes


@contextmanager
def _only_errors(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@cache
def _levels(device: torch.device) -> torch.Tensor:
    """The 16 levels; older releases of the library look them up in the state."""
    return _library().functional.get_4bit_type(_NF4, device=device)


def _state(absmax: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Any:
    """What the library wants to know of a weight beside its packed levels."""
    return _library().functional.QuantState(
        absmax=absmax.view(-1),
        shape=torch.Size(shape),
        code=_levels(absmax.device),
        blocksize=BLOCK,
        quant_type=_NF4,
        dtype=dtype,
    )


def _unpacked(packed: torch.Tensor, state: Any) -> torch.Tensor:
    return _library().functional.dequantize_4bit(packed.view(-1, 1), state)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

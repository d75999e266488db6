"""How quantised weights are computed on a device, after a self-test: once per process and device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from int8 import examine
from int8.backends import INT_MM, TRITON
from int8.failures import pass_on_out_of_memory
from kandinsky5.model.fp8 import (
    Fp8Linear,
    distrust_product,
    float8_scale,
    has_product,
    to_float8,
)

DEQUANTISED = "dequantised"
SCALED_MM = "scaled_mm"
"""Ways of fp8; those of int8 are the names of its backends."""

MIN_FP8_SQNR_DB = 25.0
"""Of the float8 product against the dequantised one: float8 inputs with 3 bits of mantissa give about 31."""
FP8_SHAPES = ((70, 128, 64), (1, 512, 96))
"""(tokens, inputs, outputs) of the self-test: ragged tokens, and one alone."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightsPath:
    """How one format of weights is computed on a device.

    Attributes:
        way: what gives right numbers there; None where nothing does.
        failed: what did not pass its self-test, in one line.
        lacking: why there is nothing faster on this device; None where ``way`` is fast or something failed.
    """

    way: str | None
    failed: str | None = None
    lacking: str | None = None


def weights_path(weights: str, device: torch.device) -> WeightsPath:
    """How ``int8`` or ``fp8`` weights are computed; the first call tests it, seconds on a GPU.

    Whatever fails is not used by any layer from then on.

    Raises:
        torch.OutOfMemoryError: no room for a few megabytes; the next call tries again.
    """
    return _PATHS[weights](device)


def is_examined(weights: str) -> bool:
    """Whether a format has a path that may fail; floats have none."""
    return weights in _PATHS


def _int8_path(device: torch.device) -> WeightsPath:
    found = examine(device)
    lacking = None if found.problems or device.type != "cuda" else _without_triton(found.backend)
    return WeightsPath(found.backend, "; ".join(found.problems) or None, lacking)


def _without_triton(backend: str | None) -> str | None:
    """Why a card's int8 product is not Triton's, where nothing failed; None where it is."""
    if backend == TRITON:
        return None
    if torch.version.cuda is None:  # ROCm, whose devices torch calls cuda too
        return "K1's int8 kernels are for NVIDIA cards: plain torch computes in their place"
    if backend == INT_MM:
        return "Triton is not installed: int8 runs through torch's own int8 product, slower"
    return "this card has no int8 tensor cores that K1 uses (sm_80 or newer has)"


@cache
def _fp8_path(device: torch.device) -> WeightsPath:
    if not has_product(device):
        where = "a CPU" if device.type == "cpu" else "this card"
        lacking = f"{where} has no float8 product (sm_89 or newer has)"
        return WeightsPath(DEQUANTISED, lacking=lacking)
    failed = _product_problem(device)
    if failed is None:
        return WeightsPath(SCALED_MM)
    log.warning("%s", failed)
    distrust_product(device)
    return WeightsPath(DEQUANTISED, failed)


_PATHS: dict[str, Callable[[torch.device], WeightsPath]] = {"int8": _int8_path, "fp8": _fp8_path}


def _product_problem(device: torch.device) -> str | None:
    """What is wrong with the device's float8 product, in one line; None when it is right."""
    start = f"fp8 by {SCALED_MM} on {device}"
    for tokens, inputs, outputs in FP8_SHAPES:
        try:
            found_db = _product_sqnr_db(device, tokens, inputs, outputs)
        except Exception as error:  # libraries and drivers fail in their own ways
            pass_on_out_of_memory(error)
            log.info("fp8 self-test", exc_info=True)
            return f"{start}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if not found_db >= MIN_FP8_SQNR_DB:
            return f"{start}: {found_db:.0f} dB, at least {MIN_FP8_SQNR_DB:.0f} are right"
    return None


@torch.inference_mode()
def _product_sqnr_db(device: torch.device, tokens: int, inputs: int, outputs: int) -> float:
    """Signal to noise of the product, against the dequantised weights in float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator).bfloat16()
    layer = Fp8Linear(inputs, outputs)
    layer.weight_scale.copy_(float8_scale(weight.abs().amax()))
    layer.weight.copy_(to_float8(weight, layer.weight_scale))
    exact = layer(x.float())
    noise = layer.to(device)._scaled_product(x.to(device)).cpu().float() - exact
    return float(10 * torch.log10(exact.square().sum() / noise.square().sum()))

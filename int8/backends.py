"""Which arithmetic a device uses: Triton kernels, torch's int8 matmul, or float32 that is exact here."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

from int8.reference import IntegerProduct, product_in_float32
from int8.scheme import INT8_MAX

TRITON = "triton"
INT_MM = "int_mm"
TORCH = "torch"
BACKENDS = (TRITON, INT_MM, TORCH)

AUTO = "auto"

MIN_CAPABILITY = (8, 0)
"""Ampere: the first with the int8 tensor-core instructions that the kernels are compiled to."""

INT_MM_CUDA_MIN_ROWS = 17
INT_MM_CUDA_MULTIPLE = 8
"""Shapes cuBLASLt's int8 matmul takes; others are padded with zeros."""


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def backends_for(device: torch.device) -> tuple[str, ...]:
    """What can run on tensors of the device, the preferred one first; never empty."""
    if interpreted() and has_triton():
        return (TRITON, TORCH)
    if device.type == "cuda":
        return _cuda_backends(device.index)
    if device.type == "cpu" and _int_mm_is_exact_on_cpu():
        return (INT_MM, TORCH)
    return (TORCH,)


@cache
def _cuda_backends(index: int | None) -> tuple[str, ...]:
    if torch.version.cuda is None:  # ROCm calls itself cuda too; its kernels were never tried
        return (TORCH,)
    if torch.cuda.get_device_capability(index) < MIN_CAPABILITY:
        return (TORCH,)
    return (TRITON, INT_MM, TORCH) if has_triton() else (INT_MM, TORCH)


_distrusted: set[tuple[str, str, int]] = set()
"""(backend, kind of device, its index) whose numbers were found wrong in this process."""


def distrust(backend: str, device: torch.device) -> None:
    """Have ``auto`` pass over a backend of this device from now on; asked for by name it still runs."""
    _distrusted.add(_of(backend, device))


def choose(backend: str, device: torch.device) -> str:
    """The backend to use for what was asked; the preferred one where none is to be trusted.

    Raises:
        ValueError: an unknown backend, or one that this device does not have.
    """
    possible = backends_for(device)
    if backend == AUTO:
        trusted = (name for name in possible if _of(name, device) not in _distrusted)
        return next(trusted, possible[0])
    if backend not in possible:
        raise ValueError(
            f"int8 backend {backend!r} on {device}; there are {(AUTO, *possible)} on it"
        )
    return backend


def _of(backend: str, device: torch.device) -> tuple[str, str, int]:
    return backend, device.type, device.index or 0


def integer_product(backend: str, device: torch.device) -> IntegerProduct:
    """The exact matmul of one group that a backend other than Triton uses."""
    if backend == TORCH:
        return product_in_float32
    return _product_on_cuda if device.type == "cuda" else _product_on_cpu


def _product_on_cpu(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(x.contiguous(), w.t())


def _product_on_cuda(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    (rows, depth), columns = x.shape, w.shape[0]
    more_rows = max(0, INT_MM_CUDA_MIN_ROWS - rows)
    more_depth = -depth % INT_MM_CUDA_MULTIPLE
    more_columns = -columns % INT_MM_CUDA_MULTIPLE
    if more_rows or more_depth or more_columns:
        x = torch.nn.functional.pad(x, (0, more_depth, 0, more_rows))
        w = torch.nn.functional.pad(w, (0, more_depth, 0, more_columns))
    return torch._int_mm(x.contiguous(), w.contiguous().t())[:rows, :columns]


@cache
def _int_mm_is_exact_on_cpu() -> bool:
    """Without VNNI, x86 adds pairs of products in 16 bits and may saturate: tried once, at the extremes."""
    if not hasattr(torch, "_int_mm"):
        return False
    x = torch.full((32, 256), INT8_MAX, dtype=torch.int8)
    x[::2] = -INT8_MAX
    try:
        found = _product_on_cpu(x, x)
    except (RuntimeError, NotImplementedError):
        return False
    return torch.equal(found, product_in_float32(x, x))

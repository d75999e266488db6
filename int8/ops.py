"""Quantisation and matmul as torch operators: seen by fake tensors and torch.compile, run by any backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from int8 import reference
from int8.backends import AUTO, TRITON, choose, integer_product
from int8.scheme import DEFAULT, Int8Scheme

PLAIN = "plain"
NORM = "norm"
GELU = "gelu"
"""What happens to x before it is quantised; NORM is a LayerNorm with modulation."""

NORM_EPS = 1e-5

CHUNK_BYTES = 64 << 20
"""Float32 temporaries of the paths without a kernel stay near this size, whatever the shapes."""
DEVICE_CHUNK_BYTES = 256 << 20
"""The same of a matmul off the CPU: narrower pieces would leave most of a card idle."""
COLUMNS_TOGETHER = 128
"""Pieces of a matmul are multiples of this: whole tiles, which torch's int8 product takes without padding."""


def before_quantising(
    x: torch.Tensor, prologue: str, shift: torch.Tensor | None, scale: torch.Tensor | None
) -> torch.Tensor:
    """The prologue in plain torch: [..., K] → [..., K] in the same dtype."""
    if prologue == GELU:
        return F.gelu(x)
    if prologue == NORM:
        assert shift is not None and scale is not None
        normed = F.layer_norm(x.float(), (x.shape[-1],), eps=NORM_EPS)
        return (normed * (scale + 1.0) + shift).to(x.dtype)
    return x


def _quantize(
    x: torch.Tensor,
    group: int,
    rotate: bool,
    prologue: str,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] → int8 [M, K], float32 [M, G]."""
    scheme = Int8Scheme(group, rotate)
    if choose(backend, x.device) == TRITON:
        from int8.launch import quantize  # Triton is not on every machine

        return quantize(x, scheme, prologue=prologue, shift=shift, scale=scale)
    if prologue == PLAIN:
        return reference.quantize(x, scheme)
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = x.new_empty((x.shape[0], scheme.groups(x.shape[1])), dtype=torch.float32)
    step = max(1, CHUNK_BYTES // (4 * x.shape[1]))
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        done = before_quantising(x[part], prologue, shift, scale)
        values[part], scales[part] = reference.quantize(done, scheme)
    return values, scales


quantize_op = torch.library.custom_op("k1_int8::quantize", _quantize, mutates_args=())


@quantize_op.register_fake
def _quantize_fake(x: torch.Tensor, group: int, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    groups = -(-x.shape[1] // group)
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return values, torch.empty((x.shape[0], groups), dtype=torch.float32, device=x.device)


def _matmul(
    xq: torch.Tensor,
    x_scales: torch.Tensor,
    weights: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    group: int,
    rotate: bool,
    out_dtype: torch.dtype,
    backend: str,
) -> list[torch.Tensor]:
    """int8 [M, K] times each of the weights int8 [N, K]ᵀ → [M, N] each; biases: one for each, or none."""
    scheme = Int8Scheme(group, rotate)
    chosen = choose(backend, xq.device)
    if chosen == TRITON:
        from int8.launch import matmul

        return matmul((xq, x_scales), weights, weight_scales, biases, scheme, out_dtype)
    product = integer_product(chosen, xq.device)
    outs = []
    for i, (q, scales) in enumerate(zip(weights, weight_scales, strict=True)):
        out = torch.empty((xq.shape[0], q.shape[0]), dtype=out_dtype, device=xq.device)
        step = _columns_at_once(xq)
        for start in range(0, q.shape[0], step):
            part = slice(start, start + step)
            total = reference.scaled_sum((xq, x_scales), (q[part], scales[part]), scheme, product)
            out[:, part] = total + biases[i][part].float() if biases else total
        outs.append(out)
    return outs


def _columns_at_once(xq: torch.Tensor) -> int:
    """How many output channels a piece of a matmul has."""
    at_once = CHUNK_BYTES if xq.device.type == "cpu" else DEVICE_CHUNK_BYTES
    columns = max(1, at_once // (4 * max(1, *xq.shape)))
    return columns - columns % COLUMNS_TOGETHER or columns


matmul_op = torch.library.custom_op("k1_int8::matmul", _matmul, mutates_args=())


@matmul_op.register_fake
def _matmul_fake(xq: torch.Tensor, *given: Any) -> list[torch.Tensor]:
    _, weights, _, _, _, _, out_dtype, _ = given  # after xq, as ``_matmul`` has them
    return [
        torch.empty((xq.shape[0], q.shape[0]), dtype=out_dtype, device=xq.device) for q in weights
    ]


def _runs_at_once(x: torch.Tensor) -> bool:
    """Whether x holds numbers and nobody traces what is done with it: no operator is needed then.

    The first call of an operator of torch.library loads torch's compiler: seconds, and 100 MB.
    """
    if type(x) is not torch.Tensor or x.is_meta or torch.compiler.is_compiling():
        return False
    return not (x.requires_grad and torch.is_grad_enabled())


def quantize_rows(
    x: torch.Tensor,
    scheme: Int8Scheme,
    *,
    prologue: str = PLAIN,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    backend: str = AUTO,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] → int8 [M, K], float32 [M, G], M being all leading axes together.

    Raises:
        ValueError: K of 0, x not floating, or shift and scale not of K values.
    """
    if x.dim() < 1 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"int8: input {tuple(x.shape)} {x.dtype}; floating with K ≥ 1 is allowed")
    for vector in (shift, scale):
        if vector is not None and vector.numel() != x.shape[-1]:
            raise ValueError(f"int8: modulation {tuple(vector.shape)} for K = {x.shape[-1]}")
    shift = None if shift is None else shift.reshape(-1)
    scale = None if scale is None else scale.reshape(-1)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    quantize = _quantize if _runs_at_once(rows) else quantize_op
    return quantize(rows, scheme.group, scheme.rotate, prologue, shift, scale, backend)


def quantize_activation(
    x: torch.Tensor, scheme: Int8Scheme = DEFAULT, *, backend: str = AUTO
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise an input per token and group of K.

    Args:
        x: [..., K] floating, finite.
        scheme: group length and rotation; the weights must have been quantised with the same.
        backend: ``auto``, or one of ``backends_for(x.device)``.

    Returns:
        int8 [..., K] and float32 scales [..., G], G = ``scheme.groups(K)``.

    Raises:
        ValueError: K of 0, or x not floating.
    """
    values, scales = quantize_rows(x, scheme, backend=backend)
    return values.reshape(x.shape), scales.reshape(*x.shape[:-1], scales.shape[1])


def quantize_weight(
    weight: torch.Tensor, scheme: Int8Scheme = DEFAULT
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a linear layer's weight per output channel and group of K.

    Args:
        weight: [out, in] floating; in temporaries of half a megabyte, whatever its size.
        scheme: group length and rotation.

    Returns:
        int8 [out, in] and float32 scales [out, G], the same bytes on every machine.

    Raises:
        ValueError: not a matrix with in ≥ 1, or it holds infinities or NaN.
    """
    if weight.dim() != 2:
        raise ValueError(f"int8: weight {tuple(weight.shape)}; [out, in] is allowed")
    values, scales = quantize_rows(weight.detach(), scheme)
    if type(scales) is torch.Tensor and not scales.is_meta and not scales.isfinite().all():
        raise ValueError("int8: the weight holds infinities or NaN; the checkpoint is damaged")
    return values, scales


def check_weight(
    q: torch.Tensor, scales: torch.Tensor, in_features: int, scheme: Int8Scheme
) -> None:
    """Raise ValueError unless q int8 [N, in_features] and scales float32 [N, G] belong together."""
    wanted = (q.shape[0], scheme.groups(in_features))
    if q.dtype != torch.int8 or q.dim() != 2 or q.shape[1] != in_features:
        raise ValueError(
            f"int8: weight {tuple(q.shape)} {q.dtype}; [out, {in_features}] torch.int8 is needed"
        )
    if scales.dtype != torch.float32 or tuple(scales.shape) != wanted:
        raise ValueError(
            f"int8: scales {tuple(scales.shape)} {scales.dtype}; {wanted} torch.float32 is needed"
            f" for weight {tuple(q.shape)} in groups of {scheme.group}"
        )


def int8_matmul(
    x: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scheme: Int8Scheme = DEFAULT,
    backend: str = AUTO,
) -> torch.Tensor:
    """x [..., K] times quantised weights, the input quantised on the way.

    Args:
        x: [..., K] floating, finite.
        q, scales: what ``quantize_weight`` gave: int8 [N, K], float32 [N, G].
        bias: [N] floating, or None.
        scheme: how q was quantised.
        backend: ``auto`` (Triton on a GPU, plain torch elsewhere), or one of ``backends_for(device)``.
            All have the same int32 part to the bit.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    check_weight(q, scales, x.shape[-1], scheme)
    if bias is not None and tuple(bias.shape) != (q.shape[0],):
        raise ValueError(f"int8: bias {tuple(bias.shape)} for {q.shape[0]} output channels")
    quantized = quantize_rows(x, scheme, backend=backend)
    biases = [] if bias is None else [bias]
    (out,) = matmul_rows(quantized, [q], [scales], biases, scheme, x.dtype, backend=backend)
    return out.reshape(*x.shape[:-1], q.shape[0])


def matmul_rows(
    quantized: tuple[torch.Tensor, torch.Tensor],
    weights: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    scheme: Int8Scheme,
    out_dtype: torch.dtype,
    *,
    backend: str = AUTO,
) -> list[torch.Tensor]:
    """What ``quantize_rows`` gave, times each of the weights: [M, N] each."""
    matmul = _matmul if _runs_at_once(quantized[0]) else matmul_op
    return matmul(
        *quantized,
        weights,
        weight_scales,
        biases,
        scheme.group,
        scheme.rotate,
        out_dtype,
        backend,
    )

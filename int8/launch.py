"""Launching the Triton kernels: outputs, grids and sizes. Imported only where Triton is."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton

from int8 import tuning
from int8.backends import interpreted
from int8.configs import QUANTIZE_ROWS, QUANTIZE_WARPS, MatmulConfig
from int8.kernels import matmul_kernel, quantize_kernel
from int8.reference import rotation_signs
from int8.scheme import Int8Scheme

MOST_SECTIONS = 3
"""How many matmuls one launch does: q, k and v."""


def quantize(
    x: torch.Tensor,
    scheme: Int8Scheme,
    *,
    prologue: str,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] → int8 [M, K], float32 [M, G], after the prologue (plain, norm or gelu)."""
    rows, depth = x.shape
    groups, rotated = scheme.groups(depth), scheme.rotated(depth)
    values = torch.empty((rows, depth), dtype=torch.int8, device=x.device)
    scales = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    if rows == 0:
        return values, scales
    signs = _signs(x.device)
    with _on(x.device):
        quantize_kernel[(triton.cdiv(rows, QUANTIZE_ROWS),)](
            x,
            signs if shift is None else shift.float().contiguous(),
            signs if scale is None else scale.float().contiguous(),
            signs,
            values,
            scales,
            rows,
            depth,
            rotated,
            groups,
            NORM=prologue == "norm",
            GELU=prologue == "gelu",
            ROTATE=rotated > 0,
            HAS_TAIL=rotated < depth,
            BY_HAND=_rounds_by_hand(x.dtype),
            ROWS=QUANTIZE_ROWS,
            GROUP=scheme.group,
            num_warps=QUANTIZE_WARPS,
            enable_fp_fusion=False,  # each rounding where the reference has it
        )
    return values, scales


def matmul(
    x: tuple[torch.Tensor, torch.Tensor],
    weights: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    scheme: Int8Scheme,
    out_dtype: torch.dtype,
    config: MatmulConfig | None = None,
) -> list[torch.Tensor]:
    """Quantised input times each of the weights, all [N, K] of one N: [M, N] each.

    Args:
        x: int8 [M, K] and float32 [M, G].
        weights, weight_scales: int8 [N, K] and float32 [N, G] each.
        biases: [N] each, or none at all.
        scheme: of all operands.
        out_dtype: of the results.
        config: tile sizes; None for the tuned ones.
    """
    outs: list[torch.Tensor] = []
    for first in range(0, len(weights), MOST_SECTIONS):
        part = slice(first, first + MOST_SECTIONS)
        operands = [[t.contiguous() for t in s[part]] for s in (weights, weight_scales, biases)]
        outs += _matmul_sections(x, operands, scheme, out_dtype, config)
    return outs


def _matmul_sections(
    x: tuple[torch.Tensor, torch.Tensor],
    operands: list[list[torch.Tensor]],
    scheme: Int8Scheme,
    out_dtype: torch.dtype,
    config: MatmulConfig | None,
) -> list[torch.Tensor]:
    xq, x_scales = x[0].contiguous(), x[1].contiguous()
    weights, weight_scales, biases = operands
    (rows, depth), columns, sections = xq.shape, weights[0].shape[0], len(weights)
    outs = [torch.empty((rows, columns), dtype=out_dtype, device=xq.device) for _ in weights]
    if rows == 0:
        return outs
    pointers = [
        pointer
        for tensors in (weights, weight_scales, biases or outs, outs)
        for pointer in _three(tensors)
    ]

    def launch(config: MatmulConfig) -> None:
        tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
        matmul_kernel[(tiles * sections,)](
            xq,
            x_scales,
            *pointers,
            rows,
            columns,
            depth,
            scheme.groups(depth),
            SECTIONS=sections,
            HAS_BIAS=bool(biases),
            GROUP=scheme.group,
            EVEN_K=depth % config.block_k == 0,
            BY_HAND=_rounds_by_hand(out_dtype),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            SUPER_M=config.super_m,
            num_warps=config.warps,
            num_stages=config.stages,
        )

    with _on(xq.device):
        shape = (rows, columns * sections, depth)
        launch(config or tuning.choose(launch, xq.device, shape, scheme.group))
    return outs


def _rounds_by_hand(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and interpreted()


def _three(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The kernel has three places; those that are not used repeat the first."""
    return [*tensors, *[tensors[0]] * (MOST_SECTIONS - len(tensors))]


@cache
def _signs(device: torch.device) -> torch.Tensor:
    return torch.tensor(rotation_signs(), dtype=torch.float32, device=device)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current CUDA device: make it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

"""int8 as the community program computes it, as a baseline: ``k1.py bench int8`` runs it beside ours.

Blocks of 128 columns, fractions cut off, scales of both operands applied after every block, float32
written out and cast afterwards. Written for this comparison from a description of that way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

BLOCK = 128


@triton.jit
def truncate_kernel(x, q, scales, K, BLOCK: tl.constexpr):
    """One program quantises one block of 128 columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + row * K + columns, mask=columns < K, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(values)) / 127.0
    tl.store(q + row * K + columns, (values / scale).to(tl.int8), mask=columns < K)
    tl.store(scales + row * tl.cdiv(K, BLOCK) + block, scale)


@triton.jit
def blockwise_kernel(
    a,
    a_scales,
    b,
    b_scales,
    out,
    M,
    N,
    K,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of the product, both scales applied after each block."""
    rows = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    columns = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    depth = tl.arange(0, BLOCK)
    blocks = tl.cdiv(K, BLOCK)
    a_pointers = a + (rows % M).to(tl.int64)[:, None] * K + depth[None, :]
    b_pointers = b + (columns % N).to(tl.int64)[None, :] * K + depth[:, None]
    total = tl.zeros([TILE_M, TILE_N], tl.float32)
    for block in range(0, blocks):
        inside = depth < K - block * BLOCK
        a_tile = tl.load(a_pointers, mask=inside[None, :], other=0)
        b_tile = tl.load(b_pointers, mask=inside[:, None], other=0)
        a_scale = tl.load(a_scales + (rows % M) * blocks + block)
        b_scale = tl.load(b_scales + (columns % N) * blocks + block)
        product = tl.dot(a_tile, b_tile, out_dtype=tl.int32).to(tl.float32)
        total += product * a_scale[:, None] * b_scale[None, :]
        a_pointers += BLOCK
        b_pointers += BLOCK
    places = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(places, total, mask=(rows[:, None] < M) & (columns[None, :] < N))


def truncate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] without a block of zeros → int8 [M, K], float32 [M, K/128]."""
    blocks = triton.cdiv(x.shape[1], BLOCK)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty((x.shape[0], blocks), dtype=torch.float32, device=x.device)
    truncate_kernel[(x.shape[0], blocks)](x, q, scales, x.shape[1], BLOCK=BLOCK)
    return q, scales


def blockwise(
    a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Truncated operands [M, K] and [N, K] → bf16 [M, N]."""
    (rows, depth), columns, tile = a[0].shape, b[0].shape[0], 128
    out = torch.empty((rows, columns), dtype=torch.float32, device=a[0].device)
    grid = (triton.cdiv(rows, tile), triton.cdiv(columns, tile))
    sizes = {"TILE_M": tile, "TILE_N": tile, "BLOCK": BLOCK}
    blockwise_kernel[grid](*a, *b, out, rows, columns, depth, **sizes, num_warps=8, num_stages=3)
    return out.bfloat16()


def prepare(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], torch.Tensor]:
    """For the bench: weights quantised beforehand, the input every time."""
    quantized = truncate(weight)
    return lambda: blockwise(truncate(x), quantized)

"""What choosing NABLA's blocks costs in memory, counted without a device, against all heads at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from kandinsky5.circumstances import circumstances
from kandinsky5.errors import UserError
from kandinsky5.family import TRANSFORMERS
from kandinsky5.model.attention import NablaParams
from kandinsky5.model.bench import LiveBytes
from kandinsky5.model.nabla import (
    BLOCK_TOKENS,
    TILE,
    NablaAttention,
    block_means,
    chosen_blocks,
    window_of,
)

TARGET_SHARE = 1 / 16
"""Most bytes, of what all heads at once take (A9 of the project's targets)."""
CASES = (
    ("pro", (61, 64, 64), 0.7),
    ("pro", (31, 64, 64), 0.8),
    ("lite", (61, 32, 48), 0.9),
)
"""Model, grid of tokens, P: 1024² of 10 s and 5 s, 512×768 of 10 s."""
SMALL_GRID = (4, 2 * TILE, 3 * TILE)


def nabla(*, heads: int = 4, seed: int = 0) -> dict[str, Any]:
    """Peak bytes of choosing blocks, beyond queries, keys and values, and whether both ways choose the same.

    Args:
        heads: of the small random case in which the blocks are compared.
        seed: of that case.

    Raises:
        UserError: no heads.
    """
    if heads < 1:
        raise UserError("heads", heads, "at least 1")
    cases = [count(*case) for case in CASES]
    share = cases[0]["share"]
    same = all(same_blocks(heads, p, seed) for p in (0.5, 0.7, 0.8, 0.9, 0.95))
    return {
        "benchmark": "nabla",
        "target_share": TARGET_SHARE,
        "share": share,
        "same_blocks": same,
        "reached": same and share <= TARGET_SHARE,
        "cases": cases,
        **circumstances(),
    }


def count(model: str, grid: tuple[int, int, int], share_kept: float) -> dict[str, Any]:
    """Peaks of both ways for one evaluation's self-attention in bfloat16."""
    shape = TRANSFORMERS[model]
    params = NablaParams(share_kept, 11, 3, 3)
    ours = _peak(shape.heads, shape.head_dim, grid, params, all_heads=False)
    plain = _peak(shape.heads, shape.head_dim, grid, params, all_heads=True)
    return {
        "model": model,
        "grid": list(grid),
        "blocks": math.prod(grid) // BLOCK_TOKENS,
        "heads": shape.heads,
        "peak_bytes": ours,
        "all_heads_peak_bytes": plain,
        "share": round(ours / plain, 4),
    }


def same_blocks(heads: int, share_kept: float, seed: int) -> bool:
    """Whether row by row and all at once choose the same blocks of random queries and keys."""
    generator = torch.Generator().manual_seed(seed)
    tokens = math.prod(SMALL_GRID)
    query, key = (torch.randn(heads, tokens, 64, generator=generator) * 3 for _ in range(2))
    window = window_of(SMALL_GRID, NablaParams(share_kept, 3, 1, 1), query.device)
    ours = chosen_blocks(block_means(query), block_means(key), share_kept, window)
    plain = chosen_all_heads(query, key, share_kept, window)
    return all(map(torch.equal, ours, plain))


def chosen_all_heads(
    query: torch.Tensor, key: torch.Tensor, share_kept: float, window: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same choice with one tensor for all heads in every step, 64-bit orders and two searches for places.

    Args:
        query, key: [heads, S, d].
        share_kept: P.
        window: bool [blocks, blocks].

    Returns:
        counts int32 [heads, blocks] and indices int32 [heads, blocks, blocks].
    """
    means = block_means(query) @ block_means(key).transpose(-2, -1)
    probabilities = torch.softmax(means / math.sqrt(query.shape[-1]), dim=-1, dtype=torch.float32)
    del means
    ascending, order = probabilities.sort(dim=-1, stable=True)
    del probabilities
    kept = (ascending.cumsum_(dim=-1) >= 1 - share_kept).int()
    del ascending
    places = order.argsort(dim=-1)
    del order
    chosen = kept.gather(-1, places) | window
    del kept, places
    counts = chosen.sum(dim=-1).int()
    return counts, chosen.argsort(dim=-1, descending=True, stable=True).int()


def _peak(
    heads: int, head_dim: int, grid: tuple[int, int, int], params: NablaParams, *, all_heads: bool
) -> int:
    tokens, device = math.prod(grid), torch.device("meta")
    with torch.inference_mode(), device, LiveBytes(apart_from=nn.Module()) as live:
        qkv = [torch.empty(tokens, heads, head_dim, dtype=torch.bfloat16) for _ in range(3)]
        if all_heads:
            window = window_of(grid, params, device)
            query, key = (t.transpose(0, 1) for t in qkv[:2])
            chosen = chosen_all_heads(query, key, params.P, window)
            del chosen
            return live.peak_bytes - live.now_bytes + window.nbytes
        before = live.now_bytes
        NablaAttention(params, grid, device, _nothing_new)(*qkv)
        return live.peak_bytes - before - qkv[0].nbytes


def _nothing_new(query: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """In attention's place: only the choice of blocks is to be counted."""
    return query

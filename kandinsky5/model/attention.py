"""Attention engines behind one call.

Every engine takes queries, keys and values shaped ``[..., tokens, heads, head_dim]`` and returns the
attended values in the same layout. The transformer knows nothing else about them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class NablaParams:
    """Settings of NABLA block-sparse attention (arXiv 2507.13546).

    Attributes:
        P: share of each row's block probability to keep, in (0, 1].
        wT, wH, wW: widths of the sliding window in blocks along time, height and width.
    """

    P: float
    wT: int
    wH: int
    wW: int


class AttentionEngine(Protocol):
    """Softmax attention over all keys: softmax(q·kᵀ/√head_dim)·v, per head."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend ``query`` [..., Sq, heads, d] over ``key``/``value`` [..., Sk, heads, d]."""
        ...


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Full attention by ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        query: [..., Sq, heads, head_dim], any float dtype.
        key, value: [..., Sk, heads, head_dim], the query's dtype.

    Returns:
        [..., Sq, heads, head_dim] in the query's dtype.
    """
    unbatched = query.dim() == 3
    q, k, v = ((t.unsqueeze(0) if unbatched else t).transpose(-3, -2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v).transpose(-3, -2)
    return out.squeeze(0) if unbatched else out

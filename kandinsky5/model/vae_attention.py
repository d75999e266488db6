"""The attention of both VAEs: one head as wide as the features, held to a bound of memory.

Fused kernels hold no scores. Flash attention takes heads of 256 numbers at most; of PyTorch's kernels for
CUDA the memory-efficient one takes any width (its variant that sums up in global memory), the CPU's too.
Where neither is to be had, parts of queries and keys are multiplied out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)

NORM_EPS = 1e-6

SCORES_AT_ONCE = 2**24
"""So many scores are held, in float32 (67 MB), where no fused kernel can be used."""


class WideAttention(nn.Module):
    """Weights of the attention; subclasses say who sees whom."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q·kᵀ / √d)·v for q [B, 1, n, d], k and v [B, 1, m, d]: [B, 1, n, d], no mask."""
    if has_fused_kernel(query, key, value):
        return F.scaled_dot_product_attention(query, key, value)
    return attended_in_parts(query, key, value)


def has_fused_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether PyTorch has a kernel for these that holds no n×m scores."""
    if not query.is_cuda:
        return True
    given = SDPAParams(query, key, value, None, 0.0, False, False)
    kernels = (can_use_flash_attention, can_use_efficient_attention, can_use_cudnn_attention)
    return any(can_use(given) for can_use in kernels)


def attended_in_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores_at_once: int = SCORES_AT_ONCE,
) -> torch.Tensor:
    """As :func:`attended`, in float32 and with few scores at a time (online softmax, arXiv 1805.02867)."""
    side = max(1, math.isqrt(scores_at_once // query.shape[:-2].numel()))
    out = torch.empty_like(query)
    for start in range(0, query.shape[-2], side):
        rows = query[..., start : start + side, :].float() * query.shape[-1] ** -0.5
        top = rows.new_full((*rows.shape[:-1], 1), -math.inf)
        total, mixed = torch.zeros_like(top), torch.zeros_like(rows)
        for keys, values in zip(key.split(side, -2), value.split(side, -2), strict=True):
            scores = rows @ keys.float().mT
            highest = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights, kept = scores.sub_(highest).exp_(), (top - highest).exp()
            total = total * kept + weights.sum(-1, keepdim=True)
            mixed = mixed * kept + weights @ values.float()
            top = highest
            del scores, weights  # before the next ones come
        out[..., start : start + side, :] = mixed / total
    return out

"""Signal to quantisation noise of the schemes: ``k1.py bench int8-accuracy``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from int8.ops import int8_matmul, quantize_weight
from int8.reference import scaled_sum
from int8.scheme import COMMUNITY, DEFAULT, INT8_MAX, Int8Scheme

OUTLIER_CHANNELS = 8
OUTLIER_FACTOR = 20.0

Matmul = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def inputs(kind: str, tokens: int, features: int, seed: int) -> torch.Tensor:
    """float32 [tokens, features].

    Args:
        kind: ``gaussian``; ``outliers``: the same with 8 channels 20 times as large; ``gelu``: the exact
            GELU of the same.
        tokens, features: M and K.
        seed: of values and of the channels.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator)
    if kind == "outliers":
        channels = torch.randperm(features, generator=generator)[:OUTLIER_CHANNELS]
        x[:, channels] *= OUTLIER_FACTOR
    return F.gelu(x) if kind == "gelu" else x


KINDS = ("gaussian", "outliers", "gelu")


def truncated(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As the community program quantises: blocks of 128, fractions cut off towards zero."""
    blocks = F.pad(x, (0, -x.shape[1] % COMMUNITY.group)).unflatten(1, (-1, COMMUNITY.group))
    scales = blocks.abs().amax(-1).clamp_min(1e-30) / INT8_MAX
    q = (blocks / scales[..., None]).trunc().to(torch.int8).flatten(1)
    return q[:, : x.shape[1]], scales


def matmul_by(scheme: Int8Scheme) -> Matmul:
    """x·Wᵀ with both operands rounded under the scheme."""
    return lambda x, weight: int8_matmul(x, *quantize_weight(weight, scheme), scheme=scheme)


def matmul_truncated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x·Wᵀ with both operands truncated in blocks of 128."""
    return scaled_sum(truncated(x), truncated(weight), COMMUNITY)


SCHEMES: dict[str, Matmul] = {
    "own": matmul_by(DEFAULT),
    "own_unrotated": matmul_by(Int8Scheme(DEFAULT.group, rotate=False)),
    "community_truncating_128": matmul_truncated,
    "rounding_128": matmul_by(COMMUNITY),
}


def quality(found: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """``sqnr_db`` and ``gain`` (the factor that fits found to exact best) of a result."""
    found, exact = found.double(), exact.double()
    noise, signal = float((found - exact).square().sum()), float(exact.square().sum())
    sqnr_db = 10 * math.log10(signal / noise) if noise else math.inf
    return {"sqnr_db": round(sqnr_db, 3), "gain": round(float((found * exact).sum()) / signal, 6)}


def int8_accuracy(
    *, tokens: int = 128, features: int = 4096, outputs: int = 256, seed: int = 0
) -> dict[str, Any]:
    """SQNR and gain of a linear layer's output under each scheme, for three kinds of input.

    Args:
        tokens, features, outputs: M, K, N of the layer; its weights are Gaussian.
        seed: of everything random.

    Returns:
        ``{"benchmark", "tokens", …, "schemes": {scheme: {kind: {"sqnr_db", "gain"}}}}``.

    Raises:
        ValueError: a size below 1, or too few features for the outliers.
    """
    if min(tokens, outputs) < 1 or features < OUTLIER_CHANNELS:
        raise ValueError(
            f"int8-accuracy with {tokens} tokens, {features} features, {outputs} outputs;"
            f" at least 1, {OUTLIER_CHANNELS} and 1"
        )
    weight = torch.randn(outputs, features, generator=torch.Generator().manual_seed(seed + 1))
    table: dict[str, dict[str, dict[str, float]]] = {name: {} for name in SCHEMES}
    for kind in KINDS:
        x = inputs(kind, tokens, features, seed)
        exact = x.double() @ weight.double().t()
        for name, matmul in SCHEMES.items():
            table[name][kind] = quality(matmul(x, weight), exact)
    sizes = {"tokens": tokens, "features": features, "outputs": outputs, "seed": seed}
    return {"benchmark": "int8-accuracy", **sizes, "schemes": table}

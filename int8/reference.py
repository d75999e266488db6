"""The int8 arithmetic in plain torch: what every kernel is compared with, and the path of a CPU.

Shapes: M rows (tokens, or output channels), K input channels, N output channels, G groups of K.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from int8.scheme import DEFAULT, INT8_MAX, MIN_ABSMAX, ROTATION_BLOCK, SIGN_BITS, Int8Scheme

CHUNK_VALUES = 1 << 17
"""Values worked on at a time on a CPU: half a megabyte in float32 stays in a core's cache (5 × faster)."""
DEVICE_CHUNK_VALUES = 1 << 24
"""The same elsewhere, where every piece costs some thirty launches: 64 MB in float32, a few times over."""

IntegerProduct = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

INVERSE_SQRT_BLOCK = ROTATION_BLOCK**-0.5
INVERSE_INT8_MAX = 1 / INT8_MAX


@cache
def rotation_signs() -> tuple[float, ...]:
    """The sign of each channel of a rotation block, ±1."""
    last = ROTATION_BLOCK - 1
    return tuple(-1.0 if SIGN_BITS >> (last - i) & 1 else 1.0 for i in range(ROTATION_BLOCK))


def rotate(x: torch.Tensor, scheme: Int8Scheme = DEFAULT) -> torch.Tensor:
    """x [..., K] in the basis in which it is quantised, float32 [..., K].

    Signs, then a Walsh–Hadamard transform of each block of 128 as seven stages of sums and differences,
    then 1/√128. The order of the stages is fixed (neighbours first), so that every implementation rounds
    alike.
    """
    x = x.float()
    whole = scheme.rotated(x.shape[-1])
    if not whole:
        return x
    signs = torch.tensor(rotation_signs(), device=x.device)[:, None]
    # A block's channels run down the columns: each stage then adds long contiguous rows.
    blocks = x[..., :whole].reshape(-1, ROTATION_BLOCK).t() * signs
    blocks = _hadamard(blocks) * INVERSE_SQRT_BLOCK
    return _with_tail(blocks, x, whole)


def rotate_back(y: torch.Tensor, scheme: Int8Scheme = DEFAULT) -> torch.Tensor:
    """Inverse of ``rotate``, up to rounding: float32 [..., K]."""
    whole = scheme.rotated(y.shape[-1])
    if not whole:
        return y.float()
    signs = torch.tensor(rotation_signs(), device=y.device)[:, None]
    blocks = y[..., :whole].float().reshape(-1, ROTATION_BLOCK).t()
    blocks = _hadamard(blocks) * INVERSE_SQRT_BLOCK * signs
    return _with_tail(blocks, y.float(), whole)


def _with_tail(blocks: torch.Tensor, x: torch.Tensor, whole: int) -> torch.Tensor:
    rotated = blocks.t().reshape(*x.shape[:-1], whole)
    return rotated if whole == x.shape[-1] else torch.cat([rotated, x[..., whole:]], dim=-1)


def _hadamard(blocks: torch.Tensor) -> torch.Tensor:
    """[128, R] → the Walsh–Hadamard transform of each column, without a factor."""
    source = blocks.clone(memory_format=torch.contiguous_format)  # both are written to
    target = torch.empty_like(source)
    half = 1
    while half < ROTATION_BLOCK:
        first, second = source.view(-1, 2, half, source.shape[1]).unbind(1)
        sums, differences = target.view(-1, 2, half, source.shape[1]).unbind(1)
        torch.add(first, second, out=sums)
        torch.sub(first, second, out=differences)
        source, target = target, source
        half *= 2
    return source


@torch.no_grad()
def quantize(x: torch.Tensor, scheme: Int8Scheme = DEFAULT) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 per row and group.

    Args:
        x: [..., K] in any floating dtype, K ≥ 1.
        scheme: group length and rotation.

    Returns:
        int8 [..., K] within ±127 and float32 scales [..., G]. A group of zeros has scale 0, one with a NaN
        or an infinity has no finite scale, so that whatever is computed with it shows.
    """
    rows = x.reshape(-1, x.shape[-1])
    in_features, groups = rows.shape[1], scheme.groups(rows.shape[1])
    values = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty((rows.shape[0], groups), dtype=torch.float32, device=x.device)
    at_once = CHUNK_VALUES if x.device.type == "cpu" else DEVICE_CHUNK_VALUES
    step = max(1, at_once // in_features)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        values[part], scales[part] = _quantize_rows(rows[part], scheme)
    return values.reshape(x.shape), scales.reshape(*x.shape[:-1], groups)


def _quantize_rows(x: torch.Tensor, scheme: Int8Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    in_features = x.shape[1]
    missing = -in_features % scheme.group
    y = rotate(x, scheme)
    if missing:  # padding copies even where nothing is added
        y = F.pad(y, (0, missing))
    y = y.unflatten(1, (-1, scheme.group))
    absmax = y.abs().amax(dim=-1)
    empty = absmax < MIN_ABSMAX
    # A tensor above the line: torch divides a number by multiplying with the reciprocal, which rounds twice.
    inverse = torch.where(empty, 0.0, torch.full_like(absmax, INT8_MAX) / absmax)
    q = torch.round(y * inverse[..., None]).to(torch.int8).flatten(1)
    return q[:, :in_features], torch.where(empty, 0.0, absmax * INVERSE_INT8_MAX)


def dequantize(q: torch.Tensor, scales: torch.Tensor, scheme: Int8Scheme = DEFAULT) -> torch.Tensor:
    """Inverse of ``quantize`` up to its rounding: int8 [..., K], scales [..., G] → float32 [..., K]."""
    in_features = q.shape[-1]
    per_value = scales.repeat_interleave(scheme.group, dim=-1)[..., :in_features]
    return rotate_back(q.float() * per_value, scheme)


def group_products(
    xq: torch.Tensor, wq: torch.Tensor, scheme: Int8Scheme = DEFAULT
) -> torch.Tensor:
    """The exact part: int8 [M, K] and [N, K] → the sums of products of each group, int32 [G, M, N]."""
    parts = zip(xq.split(scheme.group, dim=1), wq.split(scheme.group, dim=1), strict=True)
    return torch.stack([product_in_float32(x, w) for x, w in parts])


def product_in_float32(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] · [N, K]ᵀ → int32 [M, N], exact; K at most 1024.

    In float32: |sum| ≤ 127²·1024 < 2^24, so no addition rounds, whatever the order.
    """
    return (x.float() @ w.float().t()).to(torch.int32)


def scaled_sum(
    x: tuple[torch.Tensor, torch.Tensor],
    w: tuple[torch.Tensor, torch.Tensor],
    scheme: Int8Scheme = DEFAULT,
    product: IntegerProduct = product_in_float32,
) -> torch.Tensor:
    """Σ over groups of int32 product · (input scale · weight scale).

    Args:
        x: what ``quantize`` gave for the input: int8 [M, K], float32 [M, G].
        w: the same of the weights: int8 [N, K], float32 [N, G].
        scheme: how both were quantised.
        product: multiplies int8 [M, K'] by [N, K']ᵀ exactly, K' at most a group.

    Returns:
        float32 [M, N].
    """
    (xq, x_scales), (wq, w_scales) = x, w
    total = torch.zeros((xq.shape[0], wq.shape[0]), dtype=torch.float32, device=xq.device)
    parts = zip(xq.split(scheme.group, dim=1), wq.split(scheme.group, dim=1), strict=True)
    for group, (x_part, w_part) in enumerate(parts):
        scales = x_scales[:, group, None] * w_scales[None, :, group]
        total += scales.mul_(product(x_part, w_part))
    return total

"""Building blocks of the Kandinsky 5 transformer.

Shapes: ``...`` is nothing or a batch; S visual tokens, L text tokens, D model_dim. Vectors that hold for a
whole sequence (time, modulation) keep a token axis of one, ``[..., 1, D]``, so that they broadcast in both
cases. What decides quality is computed in float32 whatever the weights' dtype: the time embedding,
modulation, LayerNorm arithmetic, q/k norms and the rotary rotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from kandinsky5.model.attention import AttentionEngine

MAX_PERIOD = 10_000.0

LinearFactory = Callable[..., nn.Module]
"""``factory(in_features, out_features, bias=True) -> Module``: how quantised layers come in."""


def frequencies(count: int, device: torch.device | None = None) -> torch.Tensor:
    """Geometric frequencies 1 … 1/10000 (exclusive), float32 [count]."""
    steps = torch.arange(count, dtype=torch.float32, device=device)
    return torch.exp(-math.log(MAX_PERIOD) * steps / count)


def rope_angles_1d(length: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """Rotary angles of ``length`` consecutive text positions, float32 [length, head_dim/2]."""
    positions = torch.arange(length, dtype=torch.float32, device=device)
    return torch.outer(positions, frequencies(head_dim // 2, device))


def rope_angles_3d(
    grid: tuple[int, int, int],
    axes_dims: Sequence[int],
    rope_scale: Sequence[float],
    device: torch.device,
) -> torch.Tensor:
    """Rotary angles of a (time, height, width) grid of tokens.

    angle = position · frequency / rope_scale for each axis, the three parts side by side. They are
    computed rather than kept as buffers, so that casting the model cannot round them.

    Args:
        grid: tokens along time, height, width; each at most 128.
        axes_dims: how many of the head's channels belong to each axis; they add up to head_dim.
        rope_scale: divisor of the angle per axis.

    Returns:
        float32 [time, height, width, head_dim/2].
    """
    per_axis = [
        torch.outer(
            torch.arange(size, dtype=torch.float32, device=device), frequencies(dim // 2, device)
        )
        / scale
        for size, dim, scale in zip(grid, axes_dims, rope_scale, strict=True)
    ]
    time, height, width = grid
    return torch.cat(
        [
            per_axis[0].view(time, 1, 1, -1).expand(time, height, width, -1),
            per_axis[1].view(1, height, 1, -1).expand(time, height, width, -1),
            per_axis[2].view(1, 1, width, -1).expand(time, height, width, -1),
        ],
        dim=-1,
    )


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate (even, odd) channel pairs of x [..., tokens, heads, d] by angles [tokens, d/2], in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosine.unsqueeze(-2), sine.unsqueeze(-2)
    rotated = torch.stack([cosine * even - sine * odd, sine * even + cosine * odd], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LayerNorm(x)·(1+scale)+shift in float32, given back in x's dtype."""
    normed = F.layer_norm(x.float(), (x.shape[-1],))
    return (normed * (scale + 1.0) + shift).to(x.dtype)


def gated_sum(x: torch.Tensor, out: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + gate·out in float32, given back in x's dtype."""
    return (x.float() + gate * out.float()).to(x.dtype)


def linear_float32(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The layer evaluated in float32 whatever its weights' dtype."""
    bias = None if layer.bias is None else layer.bias.float()
    return F.linear(x.float(), layer.weight.float(), bias)


class TimeEmbeddings(nn.Module):
    """Sinusoid of 1000·t (cosines, then sines) → Linear → SiLU → Linear, all float32."""

    def __init__(self, model_dim: int, time_dim: int) -> None:
        super().__init__()
        self.model_dim = model_dim
        self.in_layer = nn.Linear(model_dim, time_dim)
        self.out_layer = nn.Linear(time_dim, time_dim)

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        """time float32 [...] in [0, 1] → float32 [..., 1, time_dim]."""
        angles = (time * 1000.0)[..., None, None] * frequencies(self.model_dim // 2, time.device)
        sinusoid = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        hidden = F.silu(linear_float32(self.in_layer, sinusoid))
        return linear_float32(self.out_layer, hidden)


class TextEmbeddings(nn.Module):
    """Linear, then LayerNorm with affine: [..., text_dim] → [..., model_dim]."""

    def __init__(self, text_dim: int, model_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(text_dim, model_dim)
        self.norm = nn.LayerNorm(model_dim)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        hidden = self.in_layer(text.to(self.in_layer.weight.dtype))
        weight, bias = self.norm.weight.float(), self.norm.bias.float()
        normed = F.layer_norm(hidden.float(), self.norm.normalized_shape, weight, bias)
        return normed.to(hidden.dtype)


class VisualEmbeddings(nn.Module):
    """Patches of a latent, flattened in (t, h, w, channel) order → Linear."""

    def __init__(self, visual_dim: int, model_dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.in_layer = nn.Linear(math.prod(patch_size) * visual_dim, model_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., T, H, W, C] → [..., T/pt, H/ph, W/pw, model_dim]."""
        *_, frames, height, width, _ = x.shape
        pt, ph, pw = self.patch_size
        x = x.unflatten(-4, (frames // pt, pt))
        x = x.unflatten(-3, (height // ph, ph))
        x = x.unflatten(-2, (width // pw, pw))
        first = x.dim() - 7
        order = (first, first + 2, first + 4, first + 1, first + 3, first + 5, first + 6)
        patches = x.permute(*range(first), *order).flatten(-4)
        return self.in_layer(patches.to(self.in_layer.weight.dtype))


class Modulation(nn.Module):
    """SiLU → Linear to ``parts`` vectors of model_dim, in float32 and starting at zero."""

    def __init__(self, time_dim: int, model_dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.out_layer = nn.Linear(time_dim, parts * model_dim)
        nn.init.zeros_(self.out_layer.weight)
        nn.init.zeros_(self.out_layer.bias)

    def forward(self, time_vector: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """float32 [..., 1, time_dim] → ``parts`` tensors float32 [..., 1, model_dim]."""
        return linear_float32(self.out_layer, F.silu(time_vector)).chunk(self.parts, dim=-1)


class Attention(nn.Module):
    """Multi-head attention with RMS-normed queries and keys; cross-attention when given a context."""

    def __init__(
        self, model_dim: int, head_dim: int, *, engine: AttentionEngine, linear: LinearFactory
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.engine = engine
        self.to_query = linear(model_dim, model_dim)
        self.to_key = linear(model_dim, model_dim)
        self.to_value = linear(model_dim, model_dim)
        self.query_norm = nn.RMSNorm(head_dim)
        self.key_norm = nn.RMSNorm(head_dim)
        self.out_layer = linear(model_dim, model_dim)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """x [..., S, D], context [..., L, D] or None for self-attention, rope (cos, sin) [S, d/2]."""
        context = x if context is None else context
        query = self._heads_normed(self.to_query(x), self.query_norm)
        key = self._heads_normed(self.to_key(context), self.key_norm)
        value = self.to_value(context).unflatten(-1, (-1, self.head_dim))
        if rope is not None:
            query, key = rotate(query, *rope), rotate(key, *rope)
        return self.out_layer(self.engine(query, key, value).flatten(-2))

    def _heads_normed(self, projected: torch.Tensor, norm: nn.RMSNorm) -> torch.Tensor:
        heads = projected.unflatten(-1, (-1, self.head_dim))
        normed = F.rms_norm(heads.float(), (self.head_dim,), norm.weight.float(), norm.eps)
        return normed.to(projected.dtype)


class FeedForward(nn.Module):
    """Linear → exact GELU → Linear, without biases."""

    def __init__(self, model_dim: int, ff_dim: int, linear: LinearFactory) -> None:
        super().__init__()
        self.in_layer = linear(model_dim, ff_dim, bias=False)
        self.out_layer = linear(ff_dim, model_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_layer(F.gelu(self.in_layer(x)))


class OutLayer(nn.Module):
    """Modulated LayerNorm → Linear → pixels of the patch back in their places."""

    def __init__(
        self, model_dim: int, time_dim: int, visual_dim: int, patch_size: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.modulation = Modulation(time_dim, model_dim, 2)
        self.out_layer = nn.Linear(model_dim, math.prod(patch_size) * visual_dim)

    def forward(
        self, x: torch.Tensor, time_vector: torch.Tensor, grid: tuple[int, int, int]
    ) -> torch.Tensor:
        """x [..., S, D] → [..., T, H, W, C_out]; the channel runs slowest inside a patch."""
        shift, scale = self.modulation(time_vector)
        patches = self.out_layer(modulated_norm(x, shift, scale))
        patches = patches.unflatten(-2, grid).unflatten(-1, (-1, *self.patch_size))
        first = patches.dim() - 7
        order = (first, first + 4, first + 1, first + 5, first + 2, first + 6, first + 3)
        *batch, t, pt, h, ph, w, pw, channels = (
            pixels := patches.permute(*range(first), *order)
        ).shape
        return pixels.reshape(*batch, t * pt, h * ph, w * pw, channels)

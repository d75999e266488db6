"""Building blocks of the Kandinsky 5 transformer.

Shapes: ``...`` is nothing or a batch; S visual tokens, L text tokens, D model_dim. Vectors that hold for a
whole sequence (time, modulation) keep a token axis of one, ``[..., 1, D]``, so that they broadcast in both
cases. What decides quality is computed in float32 whatever the weights' dtype: the time embedding,
modulation, LayerNorm arithmetic, q/k norms and the rotary rotation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kandinsky5.model.attention import AttentionEngine
from kandinsky5.model.chunks import WHOLE, ActivationChunks, joined, part_of, renewed, spans
from kandinsky5.model.rope import Rope, frequencies, rotate

LinearFactory = Callable[..., nn.Module]
"""``factory(in_features, out_features, bias=True) -> Module``: how quantised layers come in.

A layer may also offer, for speed or memory, what :func:`after_norm`, :func:`together`, :func:`after_gelu` and
:func:`rows_of` do otherwise: methods of these names."""

Gated = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Shift, scale and gate of one part of a block, float32 [..., 1, D] each."""


def modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LayerNorm(x)·(1+scale)+shift in float32, given back in x's dtype."""
    normed = F.layer_norm(x.float(), (x.shape[-1],))
    return (normed * (scale + 1.0) + shift).to(x.dtype)


def gated_sum(x: torch.Tensor, out: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + gate·out, given back in x's dtype; float32 inside, as the gate is."""
    return (x + gate * out).to(x.dtype)


def after_norm(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, layers: Sequence[nn.Module]
) -> tuple[torch.Tensor, ...]:
    """Each layer's output for :func:`modulated_norm` of x."""
    if (fused := _offer("after_norm", layers)) is not None:
        return fused(x, shift, scale, layers)
    return together(modulated_norm(x, shift, scale), layers)


def together(x: torch.Tensor, layers: Sequence[nn.Module]) -> tuple[torch.Tensor, ...]:
    """Each layer's output for the same x."""
    if (fused := _offer("together", layers)) is not None:
        return fused(x, layers)
    return tuple(layer(x) for layer in layers)


def after_gelu(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """The layer's output for the exact GELU of x."""
    fused = _offer("after_gelu", [layer])
    return layer(F.gelu(x)) if fused is None else fused(x)


def rows_of(layer: nn.Module, rows: slice) -> nn.Module:
    """The layer cut down to some of its outputs, sharing its memory.

    Without a method of its own the layer must hold tensors whose first axis runs over the outputs, and
    nothing else.
    """
    if (own := _offer("rows_of", [layer])) is not None:
        return own(rows)
    part: Any = copy.copy(layer)
    for tensors in ("_parameters", "_buffers"):
        whole = getattr(layer, tensors)
        cut = {name: t if t is None else part_of(t, rows, 0) for name, t in whole.items()}
        setattr(part, tensors, cut)
    part.out_features = rows.stop - rows.start
    return part


def _offer(name: str, layers: Sequence[nn.Module]) -> Callable[..., Any] | None:
    """The first layer's method of this name, if they are of one kind that has one."""
    if len({type(layer) for layer in layers}) != 1 or not hasattr(layers[0], name):
        return None
    method: Callable[..., Any] = getattr(layers[0], name)
    return method


def linear_float32(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The layer evaluated in float32 whatever its weights' dtype."""
    return F.linear(x.float(), *weights_float32(layer))


def weights_float32(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a layer that is computed in float32; the layer may offer a method of this name."""
    if (own := _offer("weights_float32", [layer])) is not None:
        weight, bias = own()
        return weight, bias
    plain: Any = layer
    return plain.weight.float(), None if plain.bias is None else plain.bias.float()


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
        self.out_layer = nn.Linear(time_dim, parts * model_dim)
        nn.init.zeros_(self.out_layer.weight)
        nn.init.zeros_(self.out_layer.bias)

    def forward(self, *time_vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """float32 [..., 1, time_dim] → float32 [..., 1, parts·model_dim] each, the parts side by side.

        Each vector is multiplied by itself, so that its numbers do not depend on the others; the weights
        become float32 once for all of them, which takes longer than the product does.
        """
        weight, bias = weights_float32(self.out_layer)
        return tuple(F.linear(F.silu(vector), weight, bias) for vector in time_vectors)


class Attention(nn.Module):
    """Projections of multi-head attention; queries and keys are RMS-normed per head."""

    def __init__(
        self, model_dim: int, head_dim: int, *, engine: AttentionEngine, linear: LinearFactory
    ) -> None:
        super().__init__()
        self.heads = model_dim // head_dim
        self.head_dim = head_dim
        self.engine = engine
        self.to_query = linear(model_dim, model_dim)
        self.to_key = linear(model_dim, model_dim)
        self.to_value = linear(model_dim, model_dim)
        self.query_norm = nn.RMSNorm(head_dim)
        self.key_norm = nn.RMSNorm(head_dim)
        self.out_layer = linear(model_dim, model_dim)

    def _in_heads(self, projected: torch.Tensor, norm: nn.RMSNorm | None = None) -> torch.Tensor:
        """[..., n, heads·d] → [..., n, heads, d], normed in float32 where a norm is given."""
        heads = projected.unflatten(-1, (-1, self.head_dim))
        if norm is None:
            return heads
        normed = F.rms_norm(heads.float(), (self.head_dim,), norm.weight.float(), norm.eps)
        return normed.to(projected.dtype)


class SelfAttention(Attention):
    """x + gate · attention of the modulated x to itself."""

    def forward(
        self,
        x: torch.Tensor,
        vectors: Gated,
        rope: Rope,
        chunks: ActivationChunks = WHOLE,
        engine: AttentionEngine | None = None,
    ) -> torch.Tensor:
        """x [..., S, D] (see :func:`~kandinsky5.model.chunks.renewed`) → [..., S, D].

        ``engine`` takes the place of the layer's own, for tokens that have an attention of their own.
        """
        attend = engine or self.engine
        groups = (
            (attend(*self._projected(x, vectors, rope, heads, chunks)),)
            for heads in spans(self.heads, chunks.heads)
        )
        (attended,) = joined(groups, self.heads, dim=-2)

        def add(part: torch.Tensor, tokens: slice) -> torch.Tensor:
            out = self.out_layer(part_of(attended, tokens, dim=-3).flatten(-2))
            return gated_sum(part, out, vectors[2])

        return renewed(x, chunks.tokens, add)

    def _projected(
        self,
        x: torch.Tensor,
        vectors: Gated,
        rope: Rope,
        heads: slice,
        chunks: ActivationChunks,
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of some heads, [..., S, some heads, d] each."""
        shift, scale, _ = vectors
        length = x.shape[-2]
        layers: list[nn.Module] = [self.to_query, self.to_key, self.to_value]
        if heads != slice(0, self.heads):
            rows = slice(heads.start * self.head_dim, heads.stop * self.head_dim)
            layers = [rows_of(layer, rows) for layer in layers]

        def project(tokens: slice) -> tuple[torch.Tensor, ...]:
            query, key, value = after_norm(part_of(x, tokens, dim=-2), shift, scale, layers)
            cosine, sine = (part_of(table, tokens, dim=0) for table in rope)
            query = rotate(self._in_heads(query, self.query_norm), cosine, sine)
            key = rotate(self._in_heads(key, self.key_norm), cosine, sine)
            return query, key, self._in_heads(value)

        parts = (project(tokens) for tokens in spans(length, chunks.tokens))
        return joined(parts, length, dim=-3)


class CrossAttention(Attention):
    """x + gate · attention of the modulated x to a context."""

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        vectors: Gated,
        chunks: ActivationChunks = WHOLE,
    ) -> torch.Tensor:
        """x [..., S, D] (see :func:`~kandinsky5.model.chunks.renewed`), context [..., L, D] → [..., S, D]."""
        shift, scale, gate = vectors
        projected, value = together(context, [self.to_key, self.to_value])
        key, value = self._in_heads(projected, self.key_norm), self._in_heads(value)

        def add(part: torch.Tensor, tokens: slice) -> torch.Tensor:
            (query,) = after_norm(part, shift, scale, [self.to_query])
            out = self.engine(self._in_heads(query, self.query_norm), key, value)
            return gated_sum(part, self.out_layer(out.flatten(-2)), gate)

        return renewed(x, chunks.tokens, add)


class FeedForward(nn.Module):
    """x + gate · (Linear → exact GELU → Linear, without biases) of the modulated x."""

    def __init__(self, model_dim: int, ff_dim: int, linear: LinearFactory) -> None:
        super().__init__()
        self.in_layer = linear(model_dim, ff_dim, bias=False)
        self.out_layer = linear(ff_dim, model_dim, bias=False)

    def forward(
        self, x: torch.Tensor, vectors: Gated, chunks: ActivationChunks = WHOLE
    ) -> torch.Tensor:
        """x [..., S, D] (see :func:`~kandinsky5.model.chunks.renewed`) → [..., S, D]."""
        shift, scale, gate = vectors

        def add(part: torch.Tensor, tokens: slice) -> torch.Tensor:
            (hidden,) = after_norm(part, shift, scale, [self.in_layer])
            return gated_sum(part, after_gelu(hidden, self.out_layer), gate)

        return renewed(x, chunks.tokens, add)


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
        self,
        x: torch.Tensor,
        modulation: torch.Tensor,
        grid: tuple[int, int, int],
        chunks: ActivationChunks = WHOLE,
    ) -> torch.Tensor:
        """x [..., S, D], modulation float32 [..., 1, 2·D] → [..., T, H, W, C_out].

        The channel runs slowest inside a patch.
        """
        shift, scale = modulation.chunk(2, dim=-1)
        length = x.shape[-2]
        parts = (
            (self.out_layer(modulated_norm(part_of(x, tokens, dim=-2), shift, scale)),)
            for tokens in spans(length, chunks.tokens)
        )
        (patches,) = joined(parts, length, dim=-2)
        patches = patches.unflatten(-2, grid).unflatten(-1, (-1, *self.patch_size))
        first = patches.dim() - 7
        order = (first, first + 4, first + 1, first + 5, first + 2, first + 6, first + 3)
        pixels = patches.permute(*range(first), *order)
        *batch, t, pt, h, ph, w, pw, channels = pixels.shape
        return pixels.reshape(*batch, t * pt, h * ph, w * pw, channels)

"""The transformer's two kinds of block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from kandinsky5.model.attention import AttentionEngine
from kandinsky5.model.chunks import WHOLE, ActivationChunks
from kandinsky5.model.layers import (
    CrossAttention,
    FeedForward,
    LinearFactory,
    Modulation,
    SelfAttention,
)
from kandinsky5.model.rope import Rope

if TYPE_CHECKING:
    from kandinsky5.model.dit import DiTConfig


class TextBlock(nn.Module):
    """Modulated self-attention and feed-forward on the text alone."""

    def __init__(self, config: DiTConfig, engine: AttentionEngine, linear: LinearFactory) -> None:
        super().__init__()
        self.text_modulation = Modulation(config.time_dim, config.model_dim, 6)
        self.self_attention = SelfAttention(
            config.model_dim, config.head_dim, engine=engine, linear=linear
        )
        self.feed_forward = FeedForward(config.model_dim, config.ff_dim, linear)

    def forward(self, text: torch.Tensor, time_vector: torch.Tensor, rope: Rope) -> torch.Tensor:
        """text [..., L, D], time_vector float32 [..., 1, time_dim] → [..., L, D].

        The text is overwritten unless gradients are recorded.
        """
        (modulation,) = self.text_modulation(time_vector)
        vectors = modulation.chunk(6, dim=-1)
        text = self.self_attention(text, vectors[:3], rope)
        return self.feed_forward(text, vectors[3:])


class VisualBlock(nn.Module):
    """Modulated self-attention, cross-attention to the text, and feed-forward.

    Its modulation is not computed here but beforehand, by the model's ``prepare``.
    """

    def __init__(self, config: DiTConfig, engine: AttentionEngine, linear: LinearFactory) -> None:
        super().__init__()
        self.visual_modulation = Modulation(config.time_dim, config.model_dim, 9)
        self.self_attention = SelfAttention(
            config.model_dim, config.head_dim, engine=engine, linear=linear
        )
        self.cross_attention = CrossAttention(
            config.model_dim, config.head_dim, engine=engine, linear=linear
        )
        self.feed_forward = FeedForward(config.model_dim, config.ff_dim, linear)

    def forward(
        self,
        visual: torch.Tensor,
        text: torch.Tensor,
        modulation: torch.Tensor,
        rope: Rope,
        chunks: ActivationChunks = WHOLE,
        engine: AttentionEngine | None = None,
    ) -> torch.Tensor:
        """visual [..., S, D], text [..., L, D], modulation float32 [..., 1, 9·D] → [..., S, D].

        ``visual`` is overwritten unless gradients are recorded. ``engine`` is that of self-attention in
        place of the layer's own.
        """
        vectors = modulation.chunk(9, dim=-1)
        visual = self.self_attention(visual, vectors[:3], rope, chunks, engine)
        visual = self.cross_attention(visual, text, vectors[3:6], chunks)
        return self.feed_forward(visual, vectors[6:], chunks)

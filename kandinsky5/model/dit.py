"""The Kandinsky 5 diffusion transformer (arXiv 2511.14993), one class for Lite, Image, Pro and the demo.

Tensor names and shapes are those of the published checkpoints. The model does not know whether it is
streamed, quantised or cached: linear layers come from a factory, attention from an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from kandinsky5.model.attention import AttentionEngine, NablaParams, sdpa
from kandinsky5.model.layers import (
    Attention,
    FeedForward,
    LinearFactory,
    Modulation,
    OutLayer,
    TextEmbeddings,
    TimeEmbeddings,
    VisualEmbeddings,
    gated_sum,
    modulated_norm,
    rope_angles_1d,
    rope_angles_3d,
)

Rope = tuple[torch.Tensor, torch.Tensor]

MAX_ROPE_POSITIONS = 128
"""Longest side of the token grid the checkpoints were made for, along every axis."""


@dataclass(frozen=True)
class DiTConfig:
    """Dimensions of a transformer; fields and meanings as in the published configurations.

    ``in_visual_dim`` counts the latent's channels alone: with ``visual_cond`` or
    ``instruct_type="channel"`` the model's input has as many condition channels again and one mask.
    """

    in_visual_dim: int = 16
    out_visual_dim: int = 16
    in_text_dim: int = 3584
    in_text_dim2: int = 768
    time_dim: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    model_dim: int = 1792
    ff_dim: int = 7168
    num_text_blocks: int = 2
    num_visual_blocks: int = 32
    axes_dims: tuple[int, int, int] = (16, 24, 24)
    visual_cond: bool = True
    instruct_type: str | None = None

    @property
    def head_dim(self) -> int:
        return sum(self.axes_dims)

    @property
    def input_channels(self) -> int:
        """Channels of the latent as the model takes it: with conditions and mask where it has them."""
        conditioned = self.visual_cond or self.instruct_type == "channel"
        return 2 * self.in_visual_dim + 1 if conditioned else self.in_visual_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiTConfig:
        """Read a published ``config.json``; keys that are not dimensions of the model are ignored."""
        known = {field.name for field in fields(cls)}
        dimensions: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
            if key in known
        }
        return cls(**dimensions)


class TextBlock(nn.Module):
    """Modulated self-attention and feed-forward on the text alone."""

    def __init__(self, config: DiTConfig, engine: AttentionEngine, linear: LinearFactory) -> None:
        super().__init__()
        self.text_modulation = Modulation(config.time_dim, config.model_dim, 6)
        self.self_attention = Attention(
            config.model_dim, config.head_dim, engine=engine, linear=linear
        )
        self.feed_forward = FeedForward(config.model_dim, config.ff_dim, linear)

    def forward(self, text: torch.Tensor, time_vector: torch.Tensor, rope: Rope) -> torch.Tensor:
        """text [..., L, D], time_vector float32 [..., 1, time_dim] → [..., L, D]."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.text_modulation(time_vector)
        out = self.self_attention(modulated_norm(text, shift, scale), rope=rope)
        text = gated_sum(text, out, gate)
        out = self.feed_forward(modulated_norm(text, ff_shift, ff_scale))
        return gated_sum(text, out, ff_gate)


class VisualBlock(nn.Module):
    """Modulated self-attention, cross-attention to the text, and feed-forward."""

    def __init__(self, config: DiTConfig, engine: AttentionEngine, linear: LinearFactory) -> None:
        super().__init__()
        self.visual_modulation = Modulation(config.time_dim, config.model_dim, 9)
        self.self_attention = Attention(
            config.model_dim, config.head_dim, engine=engine, linear=linear
        )
        self.cross_attention = Attention(
            config.model_dim, config.head_dim, engine=engine, linear=linear
        )
        self.feed_forward = FeedForward(config.model_dim, config.ff_dim, linear)

    def forward(
        self, visual: torch.Tensor, text: torch.Tensor, time_vector: torch.Tensor, rope: Rope
    ) -> torch.Tensor:
        """visual [..., S, D], text [..., L, D], time_vector float32 [..., 1, time_dim] → [..., S, D]."""
        modulation = self.visual_modulation(time_vector)
        shift, scale, gate = modulation[:3]
        out = self.self_attention(modulated_norm(visual, shift, scale), rope=rope)
        visual = gated_sum(visual, out, gate)
        shift, scale, gate = modulation[3:6]
        out = self.cross_attention(modulated_norm(visual, shift, scale), context=text)
        visual = gated_sum(visual, out, gate)
        shift, scale, gate = modulation[6:]
        out = self.feed_forward(modulated_norm(visual, shift, scale))
        return gated_sum(visual, out, gate)


class DiffusionTransformer3D(nn.Module):
    """Predicts the velocity of a latent on its way from noise to video.

    Args:
        config: dimensions.
        attention: engine of every attention layer.
        linear: factory of the layers in attention and feed-forward; embeddings, modulation and the
            output layer are always ``nn.Linear``.
    """

    def __init__(
        self,
        config: DiTConfig,
        *,
        attention: AttentionEngine = sdpa,
        linear: LinearFactory = nn.Linear,
    ) -> None:
        super().__init__()
        self.config = config
        self.time_embeddings = TimeEmbeddings(config.model_dim, config.time_dim)
        self.text_embeddings = TextEmbeddings(config.in_text_dim, config.model_dim)
        self.pooled_text_embeddings = TextEmbeddings(config.in_text_dim2, config.time_dim)
        self.visual_embeddings = VisualEmbeddings(
            config.input_channels, config.model_dim, config.patch_size
        )
        self.text_transformer_blocks = nn.ModuleList(
            TextBlock(config, attention, linear) for _ in range(config.num_text_blocks)
        )
        self.visual_transformer_blocks = nn.ModuleList(
            VisualBlock(config, attention, linear) for _ in range(config.num_visual_blocks)
        )
        self.out_layer = OutLayer(
            config.model_dim, config.time_dim, config.out_visual_dim, config.patch_size
        )

    def forward(
        self,
        x: torch.Tensor,
        text_embed: torch.Tensor,
        pooled_text_embed: torch.Tensor,
        time: float | torch.Tensor,
        *,
        rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
        sparse: NablaParams | None = None,
    ) -> torch.Tensor:
        """One evaluation. A leading batch axis on every tensor is allowed (training uses it).

        Args:
            x: latent [T, H, W, C_in], C_in = ``config.input_channels``; H and W multiples of the patch.
            text_embed: [L, in_text_dim], L ≥ 1.
            pooled_text_embed: [in_text_dim2].
            time: in [0, 1], 1 being pure noise.
            rope_scale: divisor of the rotary angles along (time, height, width).
            sparse: NABLA settings, or None for full attention.

        Returns:
            Velocity [T, H, W, C_out] in the dtype of the model's weights.

        Raises:
            ValueError: the grid is longer than 128 tokens on an axis.
        """
        if sparse is not None:
            raise ValueError(
                "NABLA attention is not available yet; use full attention (sparse=None)"
            )
        time_vector = self._time_vector(time, pooled_text_embed, x.device)
        text = self._text(text_embed, time_vector)
        visual = self.visual_embeddings(x)
        grid = visual.shape[-4:-1]
        if max(grid) > MAX_ROPE_POSITIONS:
            raise ValueError(
                f"token grid {tuple(grid)} is longer than {MAX_ROPE_POSITIONS} on an axis"
            )
        angles = rope_angles_3d(grid, self.config.axes_dims, rope_scale, x.device).flatten(0, 2)
        rope = (torch.cos(angles), torch.sin(angles))

        visual = visual.flatten(-4, -2)
        for block in self.visual_transformer_blocks:
            visual = block(visual, text, time_vector, rope)
        return self.out_layer(visual, time_vector, grid)

    def _time_vector(
        self, time: float | torch.Tensor, pooled: torch.Tensor, device: torch.device
    ) -> torch.Tensor:
        """float32 [..., 1, time_dim]: embedded time plus embedded pooled text."""
        moment = torch.as_tensor(time, dtype=torch.float32, device=device)
        return self.time_embeddings(moment) + self.pooled_text_embeddings(pooled).float().unsqueeze(
            -2
        )

    def _text(self, text_embed: torch.Tensor, time_vector: torch.Tensor) -> torch.Tensor:
        """Text after its own blocks, [..., L, model_dim]; it depends on the prompt and t, not on x."""
        text = self.text_embeddings(text_embed)
        angles = rope_angles_1d(text.shape[-2], self.config.head_dim, text.device)
        rope = (torch.cos(angles), torch.sin(angles))
        for block in self.text_transformer_blocks:
            text = block(text, time_vector, rope)
        return text

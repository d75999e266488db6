"""Rotary position embedding (arXiv 2104.09864): angles of the text's and the video's tokens, in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

MAX_PERIOD = 10_000.0
MAX_ROPE_POSITIONS = 128
"""Longest side of the token grid the checkpoints were made for, along every axis."""

Rope = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of rotary angles, float32 [tokens, head_dim/2] each."""


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


def rope_of(angles: torch.Tensor) -> Rope:
    """Cosines and sines of angles [..., head_dim/2], their leading axes made one of tokens."""
    angles = angles.flatten(0, -2)
    return torch.cos(angles), torch.sin(angles)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate (even, odd) channel pairs of x [..., tokens, heads, d] by angles [tokens, d/2], in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosine.unsqueeze(-2), sine.unsqueeze(-2)
    rotated = torch.stack([cosine * even - sine * odd, sine * even + cosine * odd], dim=-1)
    return rotated.flatten(-2).to(x.dtype)

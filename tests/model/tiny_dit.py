"""Small random transformers for tests, their inputs, and how far two results are apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig

TINY = DiTConfig(
    in_text_dim=40,
    in_text_dim2=24,
    time_dim=48,
    model_dim=128,
    ff_dim=192,
    num_text_blocks=2,
    num_visual_blocks=3,
    axes_dims=(16, 24, 24),
)


def changed(config: DiTConfig, **values: Any) -> DiTConfig:
    return DiTConfig(**{**vars(config), **values})


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """Weights as torch draws them, but with modulation, norms and biases that act."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            nn.init.normal_(parameter, std=0.05)
        elif "norm" in name:
            nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def tiny(config: DiTConfig = TINY, seed: int = 0) -> DiffusionTransformer3D:
    torch.manual_seed(seed)
    model = randomised(DiffusionTransformer3D(config), seed)
    assert isinstance(model, DiffusionTransformer3D)
    return model


def inputs(
    config: DiTConfig, shape: tuple[int, int, int] = (3, 8, 12), text_length: int = 7, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, config.input_channels, generator=generator)
    text = torch.randn(text_length, config.in_text_dim, generator=generator) * 2
    return x, text, torch.randn(config.in_text_dim2, generator=generator)


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    assert ours.shape == reference.shape
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()

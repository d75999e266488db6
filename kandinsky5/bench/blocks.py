"""The visual blocks of a member of the family, without weights."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from int8 import Int8Linear
from kandinsky5.errors import UserError
from kandinsky5.family import TRANSFORMERS, TransformerShape
from kandinsky5.model.attention import sdpa
from kandinsky5.model.blocks import VisualBlock
from kandinsky5.model.dit import DiTConfig

MODULATION = "visual_modulation"
"""The part of a block that is used before the loop and not in it."""
FORMATS = ("bf16", "int8")


def shape_of(model: str) -> TransformerShape:
    """The dimensions of a model by its name.

    Raises:
        UserError: there is no such model.
    """
    if model not in TRANSFORMERS:
        raise UserError("model", model, f"one of {', '.join(TRANSFORMERS)}")
    return TRANSFORMERS[model]


def config_of(shape: TransformerShape) -> DiTConfig:
    """The dimensions as a checkpoint names them."""
    return DiTConfig(
        in_visual_dim=shape.output_channels,
        out_visual_dim=shape.output_channels,
        in_text_dim=shape.text_dim,
        in_text_dim2=shape.pooled_dim,
        visual_cond=shape.input_channels != shape.output_channels,
        time_dim=shape.time_dim,
        model_dim=shape.model_dim,
        ff_dim=shape.ff_dim,
        axes_dims=shape.axes_dims,
        num_text_blocks=shape.text_blocks,
        num_visual_blocks=shape.visual_blocks,
    )


def empty_blocks(shape: TransformerShape, weights: str, count: int | None = None) -> nn.ModuleList:
    """Visual blocks on the meta device, as a checkpoint in this format is loaded into them.

    Args:
        shape: the model.
        weights: ``bf16``, or ``int8`` for the layers of attention and feed-forward.
        count: how many; None for all.

    Raises:
        UserError: another format.
    """
    if weights not in FORMATS:
        raise UserError("weights", weights, f"one of {', '.join(FORMATS)}")
    linear = nn.Linear if weights == "bf16" else partial(Int8Linear, dtype=torch.bfloat16)
    config = config_of(shape)
    with torch.device("meta"):
        blocks = nn.ModuleList(
            VisualBlock(config, sdpa, linear)
            for _ in range(shape.visual_blocks if count is None else count)
        )
    for module in blocks.modules():
        for name, parameter in module._parameters.items():  # scales are buffers and stay float32
            if parameter is not None:
                half = parameter.detach().to(torch.bfloat16)
                module._parameters[name] = nn.Parameter(half, requires_grad=False)
    return blocks

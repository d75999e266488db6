"""A whole model of random weights in a preset's true shapes, in the layout of diffusers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kandinsky5.bench.blocks import config_of
from kandinsky5.bench.random_file import write_random_tensors, write_random_transformer
from kandinsky5.family import MODEL_SETS, ModelSet, TextEncoderShape, VaeShape
from kandinsky5.model.image_vae import ImageVAE, ImageVAEConfig
from kandinsky5.model.text_shapes import clip_config, empty_clip, empty_qwen, qwen_config
from kandinsky5.model.vae import VideoVAE, VideoVAEConfig
from kandinsky5.presets import DEMO_FOLDER, PRESETS, Preset

TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
VAE_CLASSES = {True: "AutoencoderKLHunyuanVideo", False: "AutoencoderKL"}
"""diffusers' names, by whether it is a video VAE."""
SMALL_GROUPS = 8
"""Of the norms of a VAE whose widths are no multiples of 32."""


def models_of(preset: Preset) -> ModelSet:
    """The shapes of a preset's models."""
    return MODEL_SETS["image-edit" if preset.mode == "i2i" else preset.model]


def write_random_model(folder: Path, preset_name: str, weights: str, *, with_text: bool) -> int:
    """Write all parts of a preset's model; gives the bytes of the random ones.

    Tokenizers are the built-in model's: published ones are not at hand everywhere. So are the text encoders
    of the demo, and those of others where they are not wanted.

    Args:
        weights: of the transformer, ``int8`` or ``bf16``.
        with_text: whether the text encoders have their true shapes, of 15 GB.

    Raises:
        UserError: too little room on the disk, or another format.
    """
    preset = PRESETS[preset_name]
    models = models_of(preset)
    for part in TEXT_PARTS:
        shutil.copytree(DEMO_FOLDER / part, folder / part)
    (folder / "transformer").mkdir()
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    config = config_of(models.transformer)
    if preset.mode == "i2i":
        config = dataclasses.replace(config, visual_cond=False, instruct_type="channel")
    total = write_random_transformer(path, config, weights)
    total += write_random_vae(folder / "vae", models.vae)
    if with_text and not preset.is_builtin:
        total += write_random_qwen(folder / "text_encoder", models.text_encoder)
        total += write_random_clip(folder / "text_encoder_2", clip_config())
    return total


def write_random_vae(folder: Path, shape: VaeShape) -> int:
    """A VAE with its config.json; gives its bytes."""
    widths = {"block_out_channels": shape.widths, "layers_per_block": shape.layers}
    if any(width % 32 for width in shape.widths):
        widths["norm_num_groups"] = SMALL_GROUPS
    given: dict[str, Any] = {**widths, "latent_channels": shape.latent_channels}
    with torch.device("meta"):
        config = VideoVAEConfig(**given) if shape.is_video else ImageVAEConfig(**given)
        vae = (VideoVAE if shape.is_video else ImageVAE)(config)  # type: ignore[arg-type]
    values = {"_class_name": VAE_CLASSES[shape.is_video], **dataclasses.asdict(config)}
    return _write(folder, values, vae, "diffusion_pytorch_model.safetensors")


def write_random_qwen(folder: Path, shape: TextEncoderShape) -> int:
    """Qwen's language part with its config.json; gives its bytes."""
    return _write(folder, qwen_config(shape).to_dict(), empty_qwen(shape), "model.safetensors")


def write_random_clip(folder: Path, config: Any) -> int:
    """CLIP's text part, of the library's configuration; gives its bytes."""
    return _write(folder, config.to_dict(), empty_clip(config), "model.safetensors")


def _write(folder: Path, values: dict[str, Any], model: nn.Module, name: str) -> int:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return write_random_tensors(folder / name, model.to(torch.bfloat16).state_dict())

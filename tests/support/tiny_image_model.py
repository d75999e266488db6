"""A random image model small enough for every test, in either published layout."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.image_vae import ImageVAE, ImageVAEConfig
from kandinsky5.presets import DEMO_FOLDER, PRESETS

T2I = DiTConfig(
    in_visual_dim=16,
    out_visual_dim=16,
    in_text_dim=128,
    in_text_dim2=64,
    time_dim=32,
    model_dim=64,
    ff_dim=96,
    num_text_blocks=1,
    num_visual_blocks=2,
    axes_dims=(8, 12, 12),
    visual_cond=False,
)
I2I = dataclasses.replace(T2I, instruct_type="channel")
VAE = ImageVAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
FLUX_KEYS = {"_class_name": "AutoencoderKL", "shift_factor": 0.1159, "act_fn": "silu"}
ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def transformer(config: DiTConfig) -> DiffusionTransformer3D:
    torch.manual_seed(5)
    model = DiffusionTransformer3D(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return model.requires_grad_(False)


def vae() -> ImageVAE:
    torch.manual_seed(6)
    return ImageVAE(VAE).eval().requires_grad_(False)


def diffusers_layout(folder: Path, config: DiTConfig) -> Path:
    """``transformer/``, ``vae/`` and the demo's text encoders."""
    model = transformer(config)
    _save(folder / "transformer", model.state_dict(), dataclasses.asdict(config))
    _save_vae(folder / "vae")
    for name in ENCODERS:
        shutil.copytree(DEMO_FOLDER / name, folder / name)
    return folder


def official_layout(folder: Path, config: DiTConfig, preset: str) -> Path:
    """``model/<file>`` without a configuration, ``vae/``, tokenizers inside the encoders' folders."""
    file = folder / "model" / PRESETS[preset].weights_file
    file.parent.mkdir(parents=True)
    save_file(transformer(config).state_dict(), file)
    _save_vae(folder / "vae")
    for number, name in (("", "text_encoder"), ("_2", "text_encoder2")):
        shutil.copytree(DEMO_FOLDER / f"text_encoder{number}", folder / name)
        shutil.copytree(DEMO_FOLDER / f"tokenizer{number}", folder / name, dirs_exist_ok=True)
    return folder


def picture(width: int, height: int) -> Image.Image:
    """Smooth colours with an edge."""
    y, x = np.mgrid[0:height, 0:width]
    colours = np.stack([255 * x / width, 255 * y / height, 200.0 * (x > width // 2)], axis=-1)
    return Image.fromarray(colours.astype(np.uint8))


def _save_vae(folder: Path) -> None:
    _save(folder, vae().state_dict(), {**dataclasses.asdict(VAE), **FLUX_KEYS})


def _save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))

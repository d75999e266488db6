"""Whole tiny models of all four modes, as their publishers lay them out, saved by the published libraries.

Weights are random and drawn from fixed seeds: results are noise, the same noise every time. The text
encoders have the dimensions of the demo's, whose tokenizers they use.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_image_model import I2I, T2I, VAE, picture

from kandinsky5.model.dit import DiTConfig
from kandinsky5.presets import DEMO_FOLDER, PRESETS


@dataclass(frozen=True)
class TinyMode:
    """What is written for a mode: for which preset, as which pipeline of diffusers, of which dimensions."""

    preset: str
    pipeline: str
    config: DiTConfig


VIDEO = dataclasses.replace(T2I, visual_cond=True)
MODES = {
    "t2v": TinyMode("lite-t2v-5s-sft", "Kandinsky5T2VPipeline", VIDEO),
    "i2v": TinyMode("lite-i2v-5s", "Kandinsky5I2VPipeline", VIDEO),
    "t2i": TinyMode("image-t2i", "Kandinsky5T2IPipeline", T2I),
    "i2i": TinyMode("image-i2i", "Kandinsky5I2IPipeline", I2I),
}
LAYOUTS = ("diffusers", "official")
WIDTH_PX, HEIGHT_PX, SECONDS, FRAMES, STEPS = 96, 64, 1 / 3, 9, 2
"""Of :func:`quick` requests; pictures have one frame."""


def write_model(folder: Path, mode: str, layout: str) -> Path:
    """Write a model of one mode (a key of :data:`MODES`) into a new folder and give the folder.

    ``diffusers``: as a ``-Diffusers`` repository has it, with ``model_index.json``. ``official``: as
    kandinskylab has it, ``model/<file>`` without a configuration and tokenizers inside the encoders' folders.
    """
    kind = MODES[mode]
    if layout == "diffusers":
        transformer, encoders = folder / "transformer", ("text_encoder", "text_encoder_2")
        tokenizers = ("tokenizer", "tokenizer_2")
    else:
        transformer, encoders = folder / "model", ("text_encoder", "text_encoder2")
        tokenizers = encoders
    _transformer(kind.config).save_pretrained(transformer)
    _vae(PRESETS[kind.preset].vae).save_pretrained(folder / "vae")
    for encoder, place in zip(_encoders(), encoders, strict=True):
        encoder.save_pretrained(folder / place)
    for name, place in zip(("tokenizer", "tokenizer_2"), tokenizers, strict=True):
        shutil.copytree(DEMO_FOLDER / name, folder / place, dirs_exist_ok=True)
    if layout == "diffusers":
        _write_index(folder, kind.pipeline)
    else:
        saved = transformer / "diffusion_pytorch_model.safetensors"
        saved.rename(transformer / PRESETS[kind.preset].weights_file)
        (transformer / "config.json").unlink()
    return folder


def quick(mode: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """Values of a request that the model in ``folder`` answers within a second; expansion is off.

    For a mode that takes a picture one is written beside the folder.
    """
    values: dict[str, Any] = {
        "preset": MODES[mode].preset,
        "prompt": "a red circle moves right",
        "seed": 3,
        "width": WIDTH_PX,
        "height": HEIGHT_PX,
        "steps": STEPS,
        "model_dir": str(folder),
        "expand": False,
        "device": "cpu",
        "dtype": "fp32",
    }
    preset = PRESETS[values["preset"]]
    if preset.is_video:
        values["seconds"] = SECONDS
    if preset.takes_image:
        image = folder.parent / f"{folder.name}-start.png"
        picture(150, 100).save(image)
        values["image"] = str(image)
    return values | changes


def _transformer(config: DiTConfig) -> Any:
    diffusers = pytest.importorskip("diffusers")
    dims = {n: v for n, v in vars(config).items() if n not in ("visual_cond", "instruct_type")}
    torch.manual_seed(5)
    model = diffusers.Kandinsky5Transformer3DModel(
        **dims, visual_cond=config.input_channels > config.in_visual_dim
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return model


def _vae(kind: str) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(6)
    if kind == "flux":
        return diffusers.AutoencoderKL(
            **vars(VAE),
            shift_factor=0.1159,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    return diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=VAE.block_out_channels,
        layers_per_block=VAE.layers_per_block,
        norm_num_groups=VAE.norm_num_groups,
    )


@functools.cache
def _encoders() -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(7)
    models = []
    for kind, name in (
        (transformers.Qwen2_5_VLForConditionalGeneration, "text_encoder"),
        (transformers.CLIPTextModel, "text_encoder_2"),
    ):
        config = transformers.AutoConfig.from_pretrained(DEMO_FOLDER / name)
        models.append(kind(config))
    return models[0], models[1]


def _write_index(folder: Path, pipeline: str) -> None:
    """``model_index.json`` and the scheduler's folder; K1 has its own schedule and reads neither."""
    index = json.loads((DEMO_FOLDER / "model_index.json").read_text(encoding="utf-8"))
    vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    index |= {
        "_class_name": pipeline,
        "vae": ["diffusers", vae["_class_name"]],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 10.0}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))

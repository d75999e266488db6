"""Tiny VAEs and text encoders of the published libraries, saved as single files as ComfyUI's users have them.

Dimensions are small; all else is as published. Names are made here, from lists of what a model has, without
anything of K1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

WIDTHS = (32, 32, 64, 64)
FLOAT8 = torch.float8_e4m3fn

QWEN_PUBLISHED = {
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1_000_000.0,
        "mrope_section": [16, 24, 24],
    },
}
TOWER_PUBLISHED = {
    "depth": 9,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "window_size": 112,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
}
MARKS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def video_vae(**changes: Any) -> Any:
    """diffusers' video VAE with random weights, norms among them."""
    diffusers = pytest.importorskip("diffusers")
    values = {"block_out_channels": WIDTHS, "layers_per_block": 1, **changes}
    vae = diffusers.AutoencoderKLHunyuanVideo(**values)
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return _randomised(vae, seed=1)


def image_vae(**changes: Any) -> Any:
    """diffusers' image VAE as FLUX.1 configures it, with random weights."""
    diffusers = pytest.importorskip("diffusers")
    values = {
        "block_out_channels": WIDTHS,
        "layers_per_block": 1,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        **changes,
    }
    vae = diffusers.AutoencoderKL(
        **values,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    return _randomised(vae, seed=2)


def qwen(vocabulary: int, layers: int = 2) -> Any:
    """transformers' Qwen2.5-VL: 128 wide, of one head."""
    transformers = pytest.importorskip("transformers")
    text = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **QWEN_PUBLISHED,
    }
    tower = {"hidden_size": 64, "intermediate_size": 48, "out_hidden_size": 128, **TOWER_PUBLISHED}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **MARKS)
    return _randomised(transformers.Qwen2_5_VLForConditionalGeneration(config), seed=3)


def clip(vocabulary: int) -> Any:
    """transformers' text part of CLIP: 64 wide, of one head, pooled at the highest token."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    return _randomised(transformers.CLIPTextModel(config), seed=4)


def vae_in_original_names(vae: Any) -> dict[str, torch.Tensor]:
    """A VAE's state as CompVis' latent diffusion names and shapes it: attention of convolutions."""
    state = vae.state_dict()
    axes = state[
        "encoder.conv_in.conv.weight" if _is_video(state) else "encoder.conv_in.weight"
    ].dim()
    names = original_names(state)
    renamed = {}
    for name, tensor in state.items():
        is_matrix = ".attentions." in name and tensor.dim() == 2
        shape = (*tensor.shape, *[1] * (axes - 2)) if is_matrix else tensor.shape
        renamed[names[name]] = tensor.reshape(shape).clone()
    return renamed


def original_names(state: Collection[str]) -> dict[str, str]:
    """Name in diffusers → original name, for all tensors of a VAE of four levels."""
    wrap = ".conv" if _is_video(state) else ""
    pairs = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    for half, way, ways in (("encoder", "down", "down_blocks"), ("decoder", "up", "up_blocks")):
        pairs += [(f"{half}.{end}{wrap}", f"{half}.{end}{wrap}") for end in ("conv_in", "conv_out")]
        pairs.append((f"{half}.conv_norm_out", f"{half}.norm_out"))
        attention = f"{half}.mid_block.attentions.0"
        for ours, theirs in zip(
            ("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
            ("norm", "q", "k", "v", "proj_out"),
            strict=True,
        ):
            pairs.append((f"{attention}.{ours}", f"{half}.mid.attn_1.{theirs}"))
        blocks = [(f"{half}.mid_block.resnets.{i}", f"{half}.mid.block_{i + 1}") for i in (0, 1)]
        for level in range(4):
            other = level if half == "encoder" else 3 - level
            ours, theirs = f"{half}.{ways}.{level}", f"{half}.{way}.{other}"
            blocks += [(f"{ours}.resnets.{i}", f"{theirs}.block.{i}") for i in range(3)]
            sampled = (f"{ours}.{way}samplers.0.conv{wrap}", f"{theirs}.{way}sample.conv{wrap}")
            pairs.append(sampled)
        for ours, theirs in blocks:
            pairs += [(f"{ours}.norm{i}", f"{theirs}.norm{i}") for i in (1, 2)]
            pairs += [(f"{ours}.conv{i}{wrap}", f"{theirs}.conv{i}{wrap}") for i in (1, 2)]
            pairs.append((f"{ours}.conv_shortcut{wrap}", f"{theirs}.nin_shortcut{wrap}"))
    found = {f"{a}.{leaf}": f"{b}.{leaf}" for a, b in pairs for leaf in ("weight", "bias")}
    return {name: found[name] for name in state}


def qwen_as_published(model: Any) -> dict[str, torch.Tensor]:
    """Qwen2.5-VL's state by the names of its repository on the hub."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        place = name.removeprefix("model.")
        if place.startswith("language_model."):
            place = "model." + place.removeprefix("language_model.")
        renamed[place] = tensor.clone()
    return renamed


def clip_as_published(model: Any) -> dict[str, torch.Tensor]:
    """CLIP's state as in clip_l.safetensors, with what is in there besides."""
    state = {
        f"text_model.{n.removeprefix('text_model.')}": t for n, t in model.state_dict().items()
    }
    return {
        **{name: tensor.clone() for name, tensor in state.items()},
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_projection.weight": torch.zeros(64, 64),
        "logit_scale": torch.zeros(()),
    }


def in_scaled_fp8(state: Mapping[str, torch.Tensor], scale: str) -> dict[str, torch.Tensor]:
    """A state with its linear layers in float8, each with a scale of its own, as ComfyUI saves it.

    Args:
        scale: ``scale_weight`` with the marker of older files, or ``weight_scale``.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        is_linear = tensor.dim() == 2 and name.endswith(("proj.weight", "lm_head.weight"))
        if not is_linear:
            stored[name] = tensor.clone()
            continue
        factor = tensor.float().abs().amax() / 448
        stored[name] = (tensor.float() / factor).to(FLOAT8)
        stored[f"{name.removesuffix('.weight')}.{scale}"] = factor
    if scale == "scale_weight":
        stored["scaled_fp8"] = torch.empty(0, dtype=FLOAT8)
    return stored


def dequantised(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the numbers of such a state mean, in float32; scales and marker left out."""
    meant = {}
    for name, tensor in stored.items():
        layer = name.removesuffix(".weight")
        scales = [
            stored[key]
            for end in ("scale_weight", "weight_scale")
            if (key := f"{layer}.{end}") in stored
        ]
        if name.endswith(("scale_weight", "weight_scale")) or name == "scaled_fp8":
            continue
        meant[name] = tensor.float() * scales[0] if scales and name != layer else tensor
    return meant


def write(path: Path, state: Mapping[str, torch.Tensor], prefix: str = "") -> Path:
    """A .safetensors file of a state, with a prefix before every name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + name: t.contiguous() for name, t in state.items()}, path, {"format": "pt"})
    return path


def _is_video(state: Collection[str]) -> bool:
    return "encoder.conv_in.conv.weight" in state


def _randomised(model: Any, seed: int) -> Any:
    """Weights that act, in float32; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.dim() == 1 and name.endswith("weight")
        fan = parameter[0].numel() if parameter.dim() > 1 else 25
        parameter.data = 1 + 0.2 * noise if is_norm else noise * fan**-0.5
    return model.eval().requires_grad_(False)

"""From files to models that can run: checked by their headers, built on the meta device, filled one by one.

A weight exists once: the model is made without memory, then each tensor is read, converted, moved and put
in its place before the next is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kandinsky5.errors import CheckpointError
from kandinsky5.model.architecture import check_tensors, empty_transformer
from kandinsky5.model.checkpoint import Checkpoint, read_json
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.files import ModelChoice, ModelFiles, locate_model, typed_transformer
from kandinsky5.model.inspect import check_fits, quantization_of, weight_shapes
from kandinsky5.model.vae import VideoVAE, VideoVAEConfig
from kandinsky5.presets import PRESETS, Preset

__all__ = [
    "ModelFiles",
    "check_transformer",
    "check_video_vae",
    "find_model_files",
    "load_transformer",
    "load_video_vae",
]

VIDEO_VAE_CLASS = "AutoencoderKLHunyuanVideo"

_TORCH_FLOATS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_KEPT_FLOAT32 = re.compile(r"(^|[._])(time_embeddings|modulation|norm)\.")
"""Tensors that are computed with in float32 whatever the rest; rounding them costs quality."""


def find_model_files(request: ModelChoice, models_dirs: Sequence[Path] = ()) -> ModelFiles:
    """Where the parts of a request's model are, each checked as far as headers tell.

    Args:
        request: a :class:`~kandinsky5.request.GenerationRequest`: its preset, dit and model_dir count.
        models_dirs: folders looked through before the places K1 knows.

    Raises:
        UserError: field ``dit`` or ``model_dir``: nothing there, or nothing that holds a model.
        CheckpointError: a part is missing or unusable, the transformer is no Kandinsky 5 or made for other
            modes, or the parts do not fit each other.
    """
    preset = PRESETS[request.preset]
    given = typed_transformer(request)
    if (
        given is not None
    ):  # before anything else: a wrong file must not cost the fetching of the others
        check_transformer(given, preset)
    files = locate_model(request, models_dirs)
    dit = check_transformer(files.transformer, preset)
    if preset.vae == "hunyuan":
        vae = check_video_vae(files.vae)
        _check_match(files.vae, "latent channels", vae.latent_channels, dit.out_visual_dim)
    for folder, dim in (
        (files.text_encoder, dit.in_text_dim),
        (files.text_encoder_2, dit.in_text_dim2),
    ):
        Checkpoint(folder).close()
        _check_match(folder, "text channels", _hidden_size(folder), dim)
    return files


def check_transformer(path: Path, preset: Preset | None = None) -> DiTConfig:
    """Dimensions of a transformer that can be loaded, told from headers alone.

    Args:
        path: as :func:`load_transformer` takes it.
        preset: what it shall serve, or None not to ask.

    Raises:
        CheckpointError: it cannot be loaded, or is made for pictures where video is wanted or the reverse.
    """
    with Checkpoint(path) as checkpoint:
        config = _transformer_for(checkpoint).config
        if preset is not None:
            check_fits(checkpoint, config, preset)
        return config


def load_transformer(
    path: Path, *, device: torch.device, dtype: torch.dtype | None = None
) -> DiffusionTransformer3D:
    """A transformer with its weights, ready for inference.

    Args:
        path: a .safetensors file, an index of shards, or a folder with either.
        device: where the weights go.
        dtype: of the weights; None takes the one most of the file's weights have. Where the file has
            modulation, time embedding and norms in float32, they stay so.

    Raises:
        CheckpointError: see :class:`Checkpoint` and :func:`check_transformer`; or the file became shorter
            while it was read.
    """
    with Checkpoint(path) as checkpoint:
        model = _transformer_for(checkpoint)
        compute = dtype or _usual_dtype(checkpoint)

        def dtype_of(name: str) -> torch.dtype:
            in_float32 = checkpoint.tensors[name].dtype in ("F32", "F64")
            return torch.float32 if in_float32 and _KEPT_FLOAT32.search(name) else compute

        _fill(model, checkpoint, device, dtype_of)
    return model.eval()


def check_video_vae(folder: Path) -> VideoVAEConfig:
    """Dimensions of a video VAE that can be loaded, told from its config and header alone.

    Raises:
        CheckpointError: another kind of VAE (named), or files that do not fit together.
    """
    with Checkpoint(folder) as checkpoint:
        return _vae_for(folder, checkpoint).config


def load_video_vae(
    folder: Path, *, device: torch.device, dtype: torch.dtype | None = None
) -> VideoVAE:
    """A video VAE with its weights, ready for inference.

    Args:
        folder: with config.json and diffusion_pytorch_model.safetensors.
        device: where the weights go.
        dtype: of all weights; None takes the one most of them have in the file.

    Raises:
        CheckpointError: see :func:`check_video_vae`; or the file became shorter while it was read.
    """
    with Checkpoint(folder) as checkpoint:
        model = _vae_for(folder, checkpoint)
        compute = dtype or _usual_dtype(checkpoint)
        _fill(model, checkpoint, device, lambda name: compute)
    return model.eval()


def _transformer_for(checkpoint: Checkpoint) -> DiffusionTransformer3D:
    """The checked transformer on the meta device."""
    shapes = weight_shapes(checkpoint.tensors)
    model = empty_transformer(checkpoint.path, shapes, checkpoint.read_config())
    stored_as = quantization_of(checkpoint.tensors, checkpoint.metadata)
    for family in ("int8", "fp8"):
        if stored_as.startswith(family):
            raise CheckpointError(
                checkpoint.path,
                f"{family} checkpoints are not supported yet ({stored_as}); use the bf16 file",
            )
    _refuse_other_dtypes(checkpoint)
    return model


def _vae_for(folder: Path, checkpoint: Checkpoint) -> VideoVAE:
    """The checked VAE on the meta device."""
    path = folder / "config.json"
    values = read_json(path)
    name = values.get("_class_name", VIDEO_VAE_CLASS)
    if name != VIDEO_VAE_CLASS:
        raise CheckpointError(path, f"a VAE of class {name!r}; video needs {VIDEO_VAE_CLASS}")
    config = _vae_config(path, values)
    with torch.device("meta"):
        model = VideoVAE(config)
    check_tensors(checkpoint.path, checkpoint.shapes, model, VIDEO_VAE_CLASS)
    _refuse_other_dtypes(checkpoint)
    return model


def _vae_config(path: Path, values: dict[str, Any]) -> VideoVAEConfig:
    config = VideoVAEConfig.from_dict(values)
    widths = config.block_out_channels
    whole = isinstance(widths, tuple) and len(widths) == 4
    counts = (
        *(widths if whole else (0,)),
        config.in_channels,
        config.out_channels,
        config.latent_channels,
        config.layers_per_block,
        config.norm_num_groups,
    )
    if not all(type(count) is int and 0 < count <= 65_536 for count in counts):
        raise CheckpointError(path, "its dimensions are not those of a video VAE")
    if any(width % config.norm_num_groups for width in widths):
        raise CheckpointError(path, f"widths {widths} not in {config.norm_num_groups} equal groups")
    factor = config.scaling_factor
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor > 0:
        raise CheckpointError(path, f"scaling_factor {factor!r}, a positive number is needed")
    return config


def _check_match(path: Path, what: str, found: int | None, needed: int) -> None:
    if found is not None and found != needed:
        raise CheckpointError(
            path, f"gives {found} {what}, the transformer takes {needed}: another model's"
        )


def _hidden_size(folder: Path) -> int | None:
    """Width of a text encoder's output, or None where its config does not tell."""
    path = folder / "config.json"
    values = read_json(path)
    inner = values.get("text_config")
    for place in (inner, values):
        if isinstance(place, dict) and type(size := place.get("hidden_size")) is int:
            return size
    return None


def _refuse_other_dtypes(checkpoint: Checkpoint) -> None:
    for name, info in checkpoint.tensors.items():
        if info.dtype not in _TORCH_FLOATS:
            raise CheckpointError(
                checkpoint.path,
                f"{name} has dtype {info.dtype}; weights in bf16, fp16 or fp32 are needed",
            )


def _usual_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most weights, those that stay float32 anyway not counted; float64 counts as float32."""
    elements: Counter[torch.dtype] = Counter()
    for name, info in checkpoint.tensors.items():
        if not _KEPT_FLOAT32.search(name):
            elements[_TORCH_FLOATS[info.dtype]] += info.elements
    usual = elements.most_common(1)[0][0]
    return torch.float32 if usual == torch.float64 else usual


def _fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype_of: Callable[[str], torch.dtype],
) -> None:
    """Put every tensor of the checkpoint in its place, in the order in which they lie on the disk."""
    for name in checkpoint.names_in_file_order():
        tensor = checkpoint.read(name).to(device=device, dtype=dtype_of(name))
        module, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(tensor, requires_grad=False)
        setattr(model.get_submodule(module), leaf, parameter)

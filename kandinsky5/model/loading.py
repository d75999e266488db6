"""From files to models that can run: checked by their headers, built on the meta device, filled one by one.

A weight exists once: the model is made without memory, then each tensor is read, converted, moved and put
in its place before the next is read.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kandinsky5.errors import CheckpointError
from kandinsky5.model.architecture import check_tensors
from kandinsky5.model.attention import AttentionEngine, sdpa
from kandinsky5.model.checkpoint import Checkpoint, read_json
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.files import ModelChoice, ModelFiles, locate_model, typed_transformer
from kandinsky5.model.inspect import check_fits
from kandinsky5.model.reader import TransformerReader, checked_model, put_tensor
from kandinsky5.model.recipes import copy_into
from kandinsky5.model.safetensors_file import TORCH_DTYPES
from kandinsky5.model.vae import VideoVAE, VideoVAEConfig
from kandinsky5.model.weights import FLOATS
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


def find_model_files(request: ModelChoice, models_dirs: Sequence[Path] = ()) -> ModelFiles:
    """Where the parts of a request's model are, each checked as far as headers tell.

    Args:
        request: a :class:`~kandinsky5.request.GenerationRequest`: its preset, dit and model_dir count.
        models_dirs: folders looked through before the places K1 knows.

    Returns:
        The parts; in ``notices`` what is unusual about them but keeps nothing from running.

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
    dit, warning = _checked(files.transformer, preset)
    if preset.vae == "hunyuan":
        vae = check_video_vae(files.vae)
        _check_match(files.vae, "latent channels", vae.latent_channels, dit.out_visual_dim)
    for folder, dim in (
        (files.text_encoder, dit.in_text_dim),
        (files.text_encoder_2, dit.in_text_dim2),
    ):
        Checkpoint(folder).close()
        _check_match(folder, "text channels", _hidden_size(folder), dim)
    return dataclasses.replace(files, notices=(warning,)) if warning else files


def check_transformer(path: Path, preset: Preset | None = None) -> DiTConfig:
    """Dimensions of a transformer that can be loaded, told from headers alone.

    Args:
        path: as :func:`load_transformer` takes it.
        preset: what it shall serve, or None not to ask.

    Raises:
        CheckpointError: it cannot be loaded, or is made for pictures where video is wanted or the reverse.
    """
    return _checked(path, preset)[0]


def load_transformer(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    weights: str = "auto",
    attention: AttentionEngine = sdpa,
) -> DiffusionTransformer3D:
    """A transformer with its weights, ready for inference.

    Args:
        path: a .safetensors file, an index of shards, or a folder with either, in any format K1 reads.
        device: where the weights go.
        dtype: of weights that are not quantised; None takes the one most of the file's floats have. Where
            the file has modulation, time embedding and norms in float32, they stay so.
        weights: format of the layers that may be quantised; see :class:`TransformerReader`.
        attention: the model's engine.

    Raises:
        UserError: no such ``weights``.
        CheckpointError: see :class:`Checkpoint` and :func:`check_transformer`; or the file became shorter,
            or was changed, replaced or removed while it was read.
    """
    with TransformerReader(path, weights=weights, dtype=dtype, attention=attention) as reader:
        _fill(reader.model, reader.names_read_together(), reader.read_into, device)
        return reader.model


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
        model = _vae_for(folder, checkpoint).to(dtype or _usual_dtype(checkpoint))

        def read_into(targets: Mapping[str, torch.Tensor]) -> None:
            for name, target in targets.items():
                copy_into(checkpoint, name, target)

        one_by_one = ((name,) for name in checkpoint.names_in_file_order())
        _fill(model, one_by_one, read_into, device)
        checkpoint.check_unchanged()
    return model.eval()


def _checked(path: Path, preset: Preset | None) -> tuple[DiTConfig, str | None]:
    """Dimensions of a transformer that can be loaded, and what the user should know about it."""
    with Checkpoint(path) as checkpoint:
        config = checked_model(checkpoint)[0].config
        return config, None if preset is None else check_fits(checkpoint, config, preset)


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
        if info.dtype not in FLOATS:
            raise CheckpointError(
                checkpoint.path,
                f"{name} has dtype {info.dtype}; weights in bf16, fp16 or fp32 are needed",
            )


def _usual_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most weights; float64 counts as float32."""
    elements: Counter[torch.dtype] = Counter()
    for info in checkpoint.tensors.values():
        elements[TORCH_DTYPES[info.dtype]] += info.elements
    usual = elements.most_common(1)[0][0]
    return torch.float32 if usual == torch.float64 else usual


def _fill(
    model: nn.Module,
    groups: Iterable[tuple[str, ...]],
    read_into: Callable[[Mapping[str, torch.Tensor]], None],
    device: torch.device,
) -> None:
    """Give a model on the meta device its weights, a few tensors at a time, none of them twice.

    Args:
        model: its tensors have the dtypes and shapes they will have.
        groups: names of tensors that are read together.
        read_into: fills tensors in main memory, given by name.
        device: where they go then.
    """
    expected = model.state_dict()
    for names in groups:
        targets = {name: torch.empty_like(expected[name], device="cpu") for name in names}
        read_into(targets)
        for name in names:
            put_tensor(model, name, targets.pop(name).to(device))

"""VAEs from their folders: kind told by ``config.json``, checked by the header, filled tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from kandinsky5.errors import CheckpointError
from kandinsky5.model.architecture import check_tensors
from kandinsky5.model.checkpoint import Checkpoint, read_json
from kandinsky5.model.image_vae import ImageVAE, ImageVAEConfig
from kandinsky5.model.reader import fill_model
from kandinsky5.model.recipes import copy_into
from kandinsky5.model.safetensors_file import TORCH_DTYPES
from kandinsky5.model.vae import VideoVAE, VideoVAEConfig
from kandinsky5.model.weights import FLOATS

VAE: TypeAlias = VideoVAE | ImageVAE
VAEConfig: TypeAlias = VideoVAEConfig | ImageVAEConfig

_LEVELS = 4
"""With so many a latent cell is eight pixels wide, which everything else reckons with."""


@dataclass(frozen=True)
class _Kind:
    """A kind of VAE: diffusers' name of its class, what it makes, and our classes."""

    class_name: str
    makes: str
    config: type[VideoVAEConfig] | type[ImageVAEConfig]
    model: type[VideoVAE] | type[ImageVAE]


_KINDS = {
    "hunyuan": _Kind("AutoencoderKLHunyuanVideo", "video", VideoVAEConfig, VideoVAE),
    "flux": _Kind("AutoencoderKL", "pictures", ImageVAEConfig, ImageVAE),
}
"""By the names that presets use."""


def check_vae(folder: Path, kind: str) -> VAEConfig:
    """Dimensions of a VAE that can be loaded, told from its config and header alone.

    Args:
        kind: ``hunyuan`` or ``flux``, as :attr:`kandinsky5.presets.Preset.vae`.

    Raises:
        CheckpointError: another kind of VAE (named), or files that do not fit together.
    """
    with Checkpoint(folder) as checkpoint:
        return _empty_vae(folder, checkpoint, _KINDS[kind]).config


def load_vae(
    folder: Path, kind: str, *, device: torch.device, dtype: torch.dtype | None = None
) -> VAE:
    """A VAE with its weights, ready for inference.

    Args:
        folder: with config.json and diffusion_pytorch_model.safetensors.
        kind: ``hunyuan`` or ``flux``.
        device: where the weights go.
        dtype: of all weights; None takes the one most of them have in the file.

    Raises:
        CheckpointError: see :func:`check_vae`; or the file became shorter while it was read.
    """
    with Checkpoint(folder) as checkpoint:
        model = _empty_vae(folder, checkpoint, _KINDS[kind]).to(dtype or _usual_dtype(checkpoint))

        def read_into(targets: Mapping[str, torch.Tensor]) -> None:
            for name, target in targets.items():
                copy_into(checkpoint, name, target)

        one_by_one = ((name,) for name in checkpoint.names_in_file_order())
        fill_model(model, one_by_one, read_into, device)
        checkpoint.check_unchanged()
    return model.eval()


def check_video_vae(folder: Path) -> VideoVAEConfig:
    """:func:`check_vae` of a video VAE."""
    config = check_vae(folder, "hunyuan")
    assert isinstance(config, VideoVAEConfig)
    return config


def load_video_vae(
    folder: Path, *, device: torch.device, dtype: torch.dtype | None = None
) -> VideoVAE:
    """:func:`load_vae` of a video VAE."""
    model = load_vae(folder, "hunyuan", device=device, dtype=dtype)
    assert isinstance(model, VideoVAE)
    return model


def _empty_vae(folder: Path, checkpoint: Checkpoint, kind: _Kind) -> VAE:
    """The checked VAE on the meta device."""
    path = folder / "config.json"
    values = read_json(path)
    name = values.get("_class_name", kind.class_name)
    if name != kind.class_name:
        raise CheckpointError(
            path, f"a VAE of class {name!r}; {kind.makes} needs {kind.class_name}"
        )
    config = _checked_config(path, values, kind)
    with torch.device("meta"):
        model = kind.model(config)  # type: ignore[arg-type]
    check_tensors(checkpoint.path, checkpoint.shapes, model, kind.class_name)
    _refuse_other_dtypes(checkpoint)
    return model


def _checked_config(path: Path, values: dict[str, Any], kind: _Kind) -> VAEConfig:
    config = kind.config.from_dict(values)
    widths = config.block_out_channels
    whole = isinstance(widths, tuple) and len(widths) == _LEVELS
    counts = (
        *(widths if whole else (0,)),
        config.in_channels,
        config.out_channels,
        config.latent_channels,
        config.layers_per_block,
        config.norm_num_groups,
    )
    if not all(type(count) is int and 0 < count <= 65_536 for count in counts):
        what = "a video VAE" if kind.makes == "video" else "an image VAE"
        raise CheckpointError(path, f"its dimensions are not those of {what}")
    if any(width % config.norm_num_groups for width in widths):
        raise CheckpointError(path, f"widths {widths} not in {config.norm_num_groups} equal groups")
    factor = config.scaling_factor
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor > 0:
        raise CheckpointError(path, f"scaling_factor {factor!r}, a positive number is needed")
    return config


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

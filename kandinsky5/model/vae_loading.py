"""VAEs from their folders or single files: checked by the header, filled tensor by tensor.

In a folder ``config.json`` tells kind and dimensions; of a single file its shapes do, and what they cannot
tell (groups of the norms, scaling factor) is as published. Names are diffusers' or the original ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from kandinsky5.errors import CheckpointError
from kandinsky5.model import vae_names
from kandinsky5.model.architecture import Shapes, check_tensors
from kandinsky5.model.checkpoint import Checkpoint, read_json
from kandinsky5.model.image_vae import ImageVAE, ImageVAEConfig
from kandinsky5.model.part_kinds import VAE as VAE_KIND
from kandinsky5.model.part_kinds import part_kind
from kandinsky5.model.reader import fill_model
from kandinsky5.model.recipes import copy_into
from kandinsky5.model.safetensors_file import shown
from kandinsky5.model.torch_dtypes import TORCH_DTYPES
from kandinsky5.model.vae import VideoVAE, VideoVAEConfig
from kandinsky5.model.weights import FLOATS

VAE: TypeAlias = VideoVAE | ImageVAE
VAEConfig: TypeAlias = VideoVAEConfig | ImageVAEConfig


@dataclass(frozen=True)
class _Kind:
    """A kind of VAE: diffusers' name of its class, whose it is, what it makes, and our classes.

    ``convolution`` is what stands between the name of a convolution and ``weight``.
    """

    class_name: str
    title: str
    makes: str
    convolution: str
    config: type[VideoVAEConfig] | type[ImageVAEConfig]
    model: type[VideoVAE] | type[ImageVAE]


_KINDS = {
    "hunyuan": _Kind(
        "AutoencoderKLHunyuanVideo",
        "HunyuanVideo's VAE",
        "video",
        ".conv",
        VideoVAEConfig,
        VideoVAE,
    ),
    "flux": _Kind("AutoencoderKL", "FLUX.1's VAE", "pictures", "", ImageVAEConfig, ImageVAE),
}
"""By the names that presets use."""
VAE_KINDS = tuple(_KINDS)


def check_vae(path: Path, kind: str) -> VAEConfig:
    """Dimensions of a VAE that can be loaded, told from its config and header alone.

    Args:
        path: a folder with config.json and weights, or a single file.
        kind: ``hunyuan`` or ``flux``, as :attr:`kandinsky5.presets.Preset.vae`.

    Raises:
        CheckpointError: another kind of VAE (named), or files that do not fit together.
    """
    with Checkpoint(path) as checkpoint:
        return _empty_vae(path, checkpoint, _KINDS[kind]).config


def load_vae(
    path: Path, kind: str, *, device: torch.device, dtype: torch.dtype | None = None
) -> VAE:
    """A VAE with its weights, ready for inference.

    Args:
        path: a folder with config.json and diffusion_pytorch_model.safetensors, or a single file.
        kind: ``hunyuan`` or ``flux``.
        device: where the weights go.
        dtype: of all weights; None takes the one most of them have in the file.

    Raises:
        CheckpointError: see :func:`check_vae`; or the file became shorter while it was read.
    """
    with Checkpoint(path) as checkpoint:
        model = _empty_vae(path, checkpoint, _KINDS[kind]).to(dtype or _usual_dtype(checkpoint))
        places = vae_names.stored_names(checkpoint.tensors)

        def read_into(targets: Mapping[str, torch.Tensor]) -> None:
            for name, target in targets.items():
                stored = places[name]
                copy_into(checkpoint, stored, target.view(checkpoint.tensors[stored].shape))

        ours = {stored: name for name, stored in places.items()}
        one_by_one = ((ours[stored],) for stored in checkpoint.names_in_file_order())
        fill_model(model, one_by_one, read_into, device)
        checkpoint.check_unchanged()
    return model.eval()


def check_video_vae(path: Path) -> VideoVAEConfig:
    """:func:`check_vae` of a video VAE."""
    config = check_vae(path, "hunyuan")
    assert isinstance(config, VideoVAEConfig)
    return config


def load_video_vae(
    path: Path, *, device: torch.device, dtype: torch.dtype | None = None
) -> VideoVAE:
    """:func:`load_vae` of a video VAE."""
    model = load_vae(path, "hunyuan", device=device, dtype=dtype)
    assert isinstance(model, VideoVAE)
    return model


def _empty_vae(path: Path, checkpoint: Checkpoint, kind: _Kind) -> VAE:
    """The checked VAE on the meta device."""
    names = vae_names.stored_names(checkpoint.tensors)
    if len(names) != len(checkpoint.tensors):
        twice = next(s for s in checkpoint.tensors if s not in names.values())
        raise CheckpointError(checkpoint.path, f"{shown(twice)} is stored twice, by two names")
    shapes = vae_names.model_shapes(checkpoint.shapes, names)
    if path.is_dir():
        place, values = path / "config.json", _stated_values(path / "config.json", kind)
    else:
        place, values = checkpoint.path, _deduced_values(checkpoint, shapes, kind)
    config = _checked_config(place, values, kind)
    with torch.device("meta"):
        model = kind.model(config)  # type: ignore[arg-type]
    check_tensors(checkpoint.path, shapes, model, kind.class_name)
    _refuse_other_dtypes(checkpoint)
    return model


def _stated_values(path: Path, kind: _Kind) -> dict[str, Any]:
    values = read_json(path)
    name = values.get("_class_name", kind.class_name)
    if name != kind.class_name:
        raise CheckpointError(
            path, f"a VAE of class {name!r}; {kind.makes} needs {kind.class_name}"
        )
    return values


def _deduced_values(checkpoint: Checkpoint, shapes: Shapes, kind: _Kind) -> dict[str, Any]:
    """What a config.json would say of a single file."""
    levels = range(vae_names.LEVELS)
    widths = [f"encoder.down_blocks.{i}.resnets.0.conv1{kind.convolution}.weight" for i in levels]
    ends = [
        f"{name}{kind.convolution}.weight"
        for name in ("encoder.conv_in", "decoder.conv_in", "decoder.conv_out")
    ]
    axes = 5 if kind.convolution else 4
    for name in (*ends, *widths):
        if len(shapes.get(name, ())) != axes:
            raise _another_file(checkpoint, shapes, kind, name)
    first, latents, last = (shapes[name] for name in ends)
    if not kind.convolution and "quant_conv.weight" in shapes:
        raise _another_file(checkpoint, shapes, kind, None)
    start = "encoder.down_blocks.0.resnets."
    layers = {name[len(start) :].split(".")[0] for name in shapes if name.startswith(start)}
    return {
        "in_channels": first[1],
        "out_channels": last[0],
        "latent_channels": latents[1],
        "block_out_channels": [shapes[name][0] for name in widths],
        "layers_per_block": len(layers),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def _another_file(
    checkpoint: Checkpoint, shapes: Shapes, kind: _Kind, missing: str | None
) -> CheckpointError:
    """For a single file that is no VAE of the kind; ``missing`` is a tensor that it lacks."""
    found = part_kind(checkpoint.shapes)
    looks = ""
    if found is not None and found.model != "unknown" and _KINDS.get(found.model) is not kind:
        what = found.model if found.kind == VAE_KIND else f"the text encoder {found.model}"
        looks = f" (looks like {what})"
    with torch.device("meta"):
        expected = kind.model(kind.config()).state_dict()  # type: ignore[arg-type]
    lacking = "" if missing is None else f": first missing tensor {shown(missing)}"
    unexpected = next((name for name in shapes if name not in expected), None)
    also = "" if unexpected is None else f", first unexpected {shown(unexpected)}"
    return CheckpointError(
        checkpoint.path, f"not {kind.title}, the one for {kind.makes}{looks}{lacking}{also}"
    )


def _checked_config(path: Path, values: dict[str, Any], kind: _Kind) -> VAEConfig:
    config = kind.config.from_dict(values)
    widths = config.block_out_channels
    whole = isinstance(widths, tuple) and len(widths) == vae_names.LEVELS
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

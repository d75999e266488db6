"""Which transformer a set of tensors is: dimensions from names and shapes, before anything is read."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kandinsky5.errors import CheckpointError
from kandinsky5.model.attention import AttentionEngine, sdpa
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.lora_names import is_adapter
from kandinsky5.model.safetensors_file import shown

Shapes = Mapping[str, tuple[int, ...]]

PATCH_SIZE = (1, 2, 2)
MAX_BLOCKS = 512
IMAGE_MODEL_DIM = 2560

_ESSENTIAL = {
    "time_embeddings.in_layer.weight": 2,
    "text_embeddings.in_layer.weight": 2,
    "pooled_text_embeddings.in_layer.weight": 2,
    "visual_embeddings.in_layer.weight": 2,
    "visual_transformer_blocks.0.self_attention.query_norm.weight": 1,
    "visual_transformer_blocks.0.feed_forward.in_layer.weight": 2,
    "out_layer.out_layer.weight": 2,
}
"""Tensors the dimensions are read from, with their numbers of axes."""

_FREE: dict[str, tuple[type, ...]] = {
    "in_visual_dim": (int,),
    "axes_dims": (tuple,),
    "visual_cond": (bool,),
    "instruct_type": (str, type(None)),
}
"""What a config may say beyond the shapes, with the types it may have."""

_OWN_NAME = re.compile(
    r"(time_embeddings|text_embeddings|pooled_text_embeddings|visual_embeddings|out_layer"
    r"|text_transformer_blocks\.\d+|visual_transformer_blocks\.\d+)\."
)
_FOREIGN = {
    "double_blocks.0.": "Flux or HunyuanVideo",
    "double_stream_modulation": "Flux 2",
    "single_transformer_blocks.0.": "Flux",
    "joint_blocks.0.": "Stable Diffusion 3",
    "input_blocks.0.": "Stable Diffusion (SD 1.5, SD 2, SDXL)",
    "down_blocks.0.": "Stable Diffusion or a VAE",
    "patch_embedding.": "Wan",
    "patchify_proj.": "LTX-Video",
    "transformer_blocks.0.": "another diffusion transformer",
}
"""Beginnings of names by which other families are told; the first that is there counts."""


def foreign_family(names: Collection[str]) -> str | None:
    """Name of another model family these tensors look like, or None."""
    for start, family in _FOREIGN.items():
        if any(name.removeprefix("model.diffusion_model.").startswith(start) for name in names):
            return family
    return None


def deduce_config(path: Path, shapes: Shapes) -> DiTConfig:
    """Dimensions of the transformer whose tensors these are.

    What shapes cannot tell follows the published models: head_dim is split over (time, height, width) as
    1/4, 3/8, 3/8 (64 → 16, 24, 24; 128 → 32, 48, 48); an input with condition channels means
    ``visual_cond``, in the image model ``instruct_type="channel"``.

    Args:
        path: named in errors.
        shapes: unquantised, without prefix.

    Raises:
        CheckpointError: not Kandinsky 5, with the first names missing and unexpected; or dimensions that
            fit no such model.
    """
    if missing := [name for name in _ESSENTIAL if name not in shapes]:
        raise _not_kandinsky(path, missing[0], shapes)
    for name, axes in _ESSENTIAL.items():
        if len(shapes[name]) != axes or 0 in shapes[name]:
            raise CheckpointError(
                path, f"not Kandinsky 5: {shown(name)} has shape {list(shapes[name])}"
            )
    model_dim, columns = shapes["visual_embeddings.in_layer.weight"]
    time_dim, in_text_dim2 = shapes["pooled_text_embeddings.in_layer.weight"]
    head_dim = shapes["visual_transformer_blocks.0.self_attention.query_norm.weight"][0]
    patch = math.prod(PATCH_SIZE)
    rows = shapes["out_layer.out_layer.weight"][0]
    if columns % patch or rows % patch or model_dim % head_dim:
        raise CheckpointError(
            path,
            f"not Kandinsky 5: {columns} input columns, {rows} output rows, {head_dim} channels a head",
        )
    channels, out_visual_dim = columns // patch, rows // patch
    conditioned = channels == 2 * out_visual_dim + 1
    is_edit_model = conditioned and model_dim == IMAGE_MODEL_DIM
    return DiTConfig(
        in_visual_dim=(channels - 1) // 2 if conditioned else channels,
        out_visual_dim=out_visual_dim,
        in_text_dim=shapes["text_embeddings.in_layer.weight"][1],
        in_text_dim2=in_text_dim2,
        time_dim=time_dim,
        patch_size=PATCH_SIZE,
        model_dim=model_dim,
        ff_dim=shapes["visual_transformer_blocks.0.feed_forward.in_layer.weight"][0],
        num_text_blocks=_block_count(path, shapes, "text_transformer_blocks"),
        num_visual_blocks=_block_count(path, shapes, "visual_transformer_blocks"),
        axes_dims=_axes_of(path, head_dim),
        visual_cond=conditioned and not is_edit_model,
        instruct_type="channel" if is_edit_model else None,
    )


def settled_config(path: Path, shapes: Shapes, stated: Mapping[str, Any] | None) -> DiTConfig:
    """The dimensions as stated by a config, where it says something, checked against the tensors.

    Args:
        path: named in errors.
        shapes: unquantised, without prefix.
        stated: what config.json or the header says; None or missing keys leave it to the shapes.

    Raises:
        CheckpointError: as :func:`deduce_config`, or what is stated does not fit the tensors.
    """
    deduced = deduce_config(path, shapes)
    if not stated:
        return deduced
    given: dict[str, Any] = {}
    for field in dataclasses.fields(DiTConfig):
        if field.name not in stated:
            continue
        value, found = stated[field.name], getattr(deduced, field.name)
        value = tuple(value) if isinstance(value, list) else value
        if field.name not in _FREE:
            if value != found:
                raise _contradiction(path, field.name, value, found)
        elif not isinstance(value, _FREE[field.name]):
            raise _contradiction(path, field.name, value, f"such as {found}")
        else:
            given[field.name] = value
    axes = given.get("axes_dims", deduced.axes_dims)
    whole = all(type(dim) is int and dim > 0 and dim % 2 == 0 for dim in axes)
    if not whole or len(axes) != 3 or sum(axes) != deduced.head_dim:
        raise _contradiction(path, "axes_dims", axes, f"three even numbers, sum {deduced.head_dim}")
    config = dataclasses.replace(deduced, **given)
    if config.input_channels != deduced.input_channels:
        given_text = f"{config.visual_cond} with in_visual_dim {config.in_visual_dim}"
        raise _contradiction(path, "visual_cond", given_text, f"{deduced.input_channels} channels")
    return config


def empty_transformer(
    path: Path,
    shapes: Shapes,
    stated: Mapping[str, Any] | None = None,
    *,
    attention: AttentionEngine = sdpa,
) -> DiffusionTransformer3D:
    """The transformer these tensors fill, on the meta device; every name and shape has been checked.

    Raises:
        CheckpointError: they do not make up a whole Kandinsky 5 transformer; see :func:`settled_config`.
    """
    config = settled_config(path, shapes, stated)
    with torch.device("meta"):
        model = DiffusionTransformer3D(config, attention=attention)
    check_tensors(path, shapes, model, "Kandinsky 5")
    return model


def check_tensors(path: Path, shapes: Shapes, model: nn.Module, title: str) -> None:
    """Strict comparison of names and shapes.

    Raises:
        CheckpointError: how many are missing, unexpected or of another shape, with the first of each.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in expected if name not in shapes]
    unexpected = [name for name in shapes if name not in expected]
    reshaped = [n for n, shape in expected.items() if n in shapes and shapes[n] != shape]
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors missing (first {shown(missing[0])})")
    if unexpected:
        faults.append(f"{len(unexpected)} unexpected (first {shown(unexpected[0])})")
    if reshaped:
        first = reshaped[0]
        faults.append(
            f"{len(reshaped)} of another shape (first {shown(first)}:"
            f" {list(shapes[first])}, expected {list(expected[first])})"
        )
    if faults:
        raise CheckpointError(path, f"not a whole {title} model: {', '.join(faults)}")


def _not_kandinsky(path: Path, missing: str, shapes: Shapes) -> CheckpointError:
    unexpected = next((name for name in shapes if not _OWN_NAME.match(name)), None)
    is_lora = is_adapter(shapes)
    family = "a LoRA, which goes beside a model" if is_lora else foreign_family(shapes)
    looks = f" (looks like {family})" if family else ""
    also = f", first unexpected {shown(unexpected)}" if unexpected else ""
    return CheckpointError(
        path, f"not Kandinsky 5{looks}: first missing tensor {shown(missing)}{also}"
    )


def _contradiction(path: Path, key: str, given: object, found: object) -> CheckpointError:
    return CheckpointError(
        path, f"its config says {key} {str(given)[:60]}, its tensors need {found}: one is wrong"
    )


def _block_count(path: Path, shapes: Shapes, blocks: str) -> int:
    start = f"{blocks}."
    found = {name[len(start) :].split(".")[0] for name in shapes if name.startswith(start)}
    count = len(found)
    if count > MAX_BLOCKS:
        raise CheckpointError(path, f"{count} {blocks}, at most {MAX_BLOCKS} make sense")
    if absent := [str(i) for i in range(count) if str(i) not in found]:
        raise CheckpointError(
            path, f"not a whole Kandinsky 5 model: {blocks}.{absent[0]} is missing of {count}"
        )
    return count


def _axes_of(path: Path, head_dim: int) -> tuple[int, int, int]:
    side = head_dim * 3 // 16 * 2
    time = head_dim - 2 * side
    if side == 0 or time % 2:
        raise CheckpointError(path, f"not Kandinsky 5: {head_dim} channels a head")
    return (time, side, side)

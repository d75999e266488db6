"""From files to models that can run: checked by their headers, built on the meta device, filled one by one.

A weight exists once: the model is made without memory, then each tensor is read, converted, moved and put
in its place before the next is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from kandinsky5.errors import CheckpointError
from kandinsky5.model.attention import AttentionEngine, sdpa
from kandinsky5.model.checkpoint import Checkpoint, read_json
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.facts import transformer_facts
from kandinsky5.model.files import ModelChoice, ModelFiles, locate_model, typed_transformer
from kandinsky5.model.inspect import check_fits
from kandinsky5.model.part_kinds import part_kind
from kandinsky5.model.reader import TransformerReader, fill_model
from kandinsky5.model.single_files import notices_of
from kandinsky5.model.vae_loading import check_vae, check_video_vae, load_vae, load_video_vae
from kandinsky5.presets import PRESETS, Preset

__all__ = [
    "ModelFiles",
    "check_transformer",
    "check_vae",
    "check_video_vae",
    "find_model_files",
    "load_transformer",
    "load_vae",
    "load_video_vae",
]


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
    if given is not None:
        # Before anything else: a wrong file must not cost the fetching of the others.
        check_transformer(given, preset)
    files = locate_model(request, models_dirs)
    dit, warning = _checked(files.transformer, preset)
    vae = check_vae(files.vae, preset.vae)
    _check_match(files.vae, "latent channels", vae.latent_channels, dit.out_visual_dim)
    for folder, dim in (
        (files.text_encoder, dit.in_text_dim),
        (files.text_encoder_2, dit.in_text_dim2),
    ):
        Checkpoint(folder).close()
        _check_match(folder, "text channels", _hidden_size(folder), dim)
    notices = (*((warning,) if warning else ()), *notices_of(files.vae, files.text_encoder))
    return dataclasses.replace(files, notices=notices)


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
        fill_model(reader.model, reader.names_read_together(), reader.read_into, device)
        return reader.model


def _checked(path: Path, preset: Preset | None) -> tuple[DiTConfig, str | None]:
    """Dimensions of a transformer that can be loaded, and what the user should know about it."""
    config = transformer_facts(path).config  # opens the file, the first time
    if preset is None:
        return config, None
    with Checkpoint(path) as checkpoint:
        return config, check_fits(checkpoint, config, preset)


def _check_match(path: Path, what: str, found: int | None, needed: int) -> None:
    if found is not None and found != needed:
        raise CheckpointError(
            path, f"gives {found} {what}, the transformer takes {needed}: another model's"
        )


def _hidden_size(path: Path) -> int | None:
    """Width of a text encoder's output, or None where its config does not tell."""
    if not path.is_dir():
        with Checkpoint(path) as checkpoint:
            found = part_kind(checkpoint.shapes)
        return found.width if found else None
    values = read_json(path / "config.json")
    inner = values.get("text_config")
    for place in (inner, values):
        if isinstance(place, dict) and type(size := place.get("hidden_size")) is int:
            return size
    return None

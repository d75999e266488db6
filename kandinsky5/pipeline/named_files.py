"""What the model files of a form are, told from their headers before any job names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kandinsky5.errors import CheckpointError, K1Error, UserError
from kandinsky5.model.checkpoint import Checkpoint
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.facts import text_encoder_facts
from kandinsky5.model.files import locate_model, parts_at_hand, typed_path, typed_transformer
from kandinsky5.model.inspect import FileReport, check_fits, inspect_file
from kandinsky5.model.lora import layer_sizes
from kandinsky5.model.lora_file import LayerSizes, open_lora
from kandinsky5.model.text_generation import can_write
from kandinsky5.pipeline.adapters import lora_path
from kandinsky5.pipeline.planning import file_format
from kandinsky5.presets import PRESETS, Preset

PART_TITLES = {
    "transformer": "transformer",
    "vae": "VAE",
    "text_encoder": "text encoder",
    "tokenizer": "tokenizer",
    "text_encoder_2": "CLIP",
    "tokenizer_2": "CLIP tokenizer",
}


@dataclass(frozen=True)
class NamedFiles:
    """Model files as a person names them.

    Attributes:
        preset: for which they shall serve.
        dit, model_dir: as in a request.
        loras: paths, or names in a folder for models.
    """

    preset: str
    dit: str | None = None
    model_dir: str | None = None
    loras: tuple[str, ...] = ()


def describe_files(named: NamedFiles, models_dirs: Sequence[Path] = ()) -> dict[str, Any]:
    """What each of them is; never raises for what it finds, reads no tensor and writes nothing.

    Returns:
        JSON-ready: ``dit`` and ``model_dir``, None where not named, else {problem} or {name, model,
        task_hint, quantization, weights, parameters, config, notices}, a folder beside a ``dit`` {name,
        supplies}; ``loras``, a list of {problem} or {name, variant, tensors, matched, unmatched, trigger,
        parameters}, ``matched`` None while no transformer is known; ``text_encoder``, None while none is
        found or it is the built-in one, else {dimensions, writes}; ``missing``, the parts of the preset's own
        model that are not on this machine, of no account where a folder is named.
    """
    dit = _transformer(named, named.dit) if named.dit else None
    usable = dit is None or "problem" not in dit
    folder = _folder(named, models_dirs) if named.model_dir and usable else None
    layers = None
    if named.loras and (config := _config(named, models_dirs, dit, folder)) is not None:
        with torch.device("meta"):
            layers = layer_sizes(DiffusionTransformer3D(config))
    loras = [_lora(text, models_dirs, layers) for text in named.loras]
    missing = [] if named.model_dir else missing_parts(PRESETS[named.preset], models_dirs)
    return {
        "dit": dit,
        "model_dir": folder,
        "loras": loras,
        "text_encoder": _text_encoder(named, models_dirs),
        "missing": missing,
    }


def missing_parts(preset: Preset, models_dirs: Sequence[Path]) -> list[str]:
    """Titles of the parts of a preset's model that are not here."""
    if preset.is_builtin:
        return []
    here = parts_at_hand(preset, models_dirs)
    return [title for name, title in PART_TITLES.items() if name not in here]


def _transformer(named: NamedFiles, text: str) -> dict[str, Any]:
    try:
        path = typed_transformer(NamedFiles(named.preset, dit=text))
        assert path is not None
        return _described(path, named.preset)
    except K1Error as error:
        return {"problem": _reason(error)}


def _folder(named: NamedFiles, models_dirs: Sequence[Path]) -> dict[str, Any]:
    """The transformer of a folder that holds the whole model; beside one's own, that the rest is there."""
    try:
        files = locate_model(named, models_dirs)
        name = typed_path("model_dir", named.model_dir or "").resolve().name
        if named.dit:
            return {"name": name, "supplies": "text encoders and VAE"}
        return {**_described(files.transformer, named.preset), "name": name}
    except UserError as error:
        return {"problem": error.allowed}
    except CheckpointError as error:
        return {"problem": str(error)}  # of all the files in the folder it names the one


def _described(path: Path, preset: str) -> dict[str, Any]:
    """Raises CheckpointError for what is no transformer, or none for this preset."""
    report = inspect_file(path)
    if report.kind != "dit" or report.problems or report.config is None:
        raise CheckpointError(path, "; ".join(report.problems) or _what_else(report))
    with Checkpoint(path) as checkpoint:
        warning = check_fits(checkpoint, DiTConfig(**report.config), PRESETS[preset])
    return {
        "name": path.name,
        "model": report.model,
        "task_hint": report.task_hint,
        "quantization": report.quantization,
        "weights": file_format(report.quantization),
        "parameters": report.parameters,
        "config": report.config,
        "notices": [warning] if warning else [],
    }


def _what_else(report: FileReport) -> str:
    if report.kind in ("vae", "text encoder"):
        where = "; keep it in a folder for models, where it is found by what is in it"
    else:
        where = "; name it as a LoRA" if report.kind == "lora" else ""
    return f"is a {report.kind}, not a transformer{where}"


def _text_encoder(named: NamedFiles, models_dirs: Sequence[Path]) -> dict[str, Any] | None:
    """What a plan needs to know of the text encoder that a job would use; None for the preset's own row."""
    preset = PRESETS[named.preset]
    if preset.is_builtin:
        return None
    try:
        if named.model_dir:
            path: Path | None = locate_model(named, models_dirs).text_encoder
        else:
            path = parts_at_hand(preset, models_dirs).get("text_encoder")
        facts = None if path is None else text_encoder_facts(path)
        if path is None or facts is None:
            return None
        return {"dimensions": dataclasses.asdict(facts), "writes": can_write(path)}
    except K1Error:
        return None  # what is wrong is said of the folder, or when the job begins


def _config(
    named: NamedFiles,
    models_dirs: Sequence[Path],
    dit: dict[str, Any] | None,
    folder: dict[str, Any] | None,
) -> DiTConfig | None:
    """Dimensions of the transformer that a job would use; None while that is not known."""
    for found in (dit, folder):
        if found is not None:
            return DiTConfig(**found["config"]) if "config" in found else None
    preset = PRESETS[named.preset]
    if preset.is_builtin:
        path: Path | None = locate_model(NamedFiles(preset.name)).transformer
    else:
        path = parts_at_hand(preset, models_dirs).get("transformer")
    config = inspect_file(path).config if path is not None else None
    return DiTConfig(**config) if config else None


def _lora(text: str, models_dirs: Sequence[Path], layers: LayerSizes | None) -> dict[str, Any]:
    try:
        path = lora_path(text, models_dirs)
        report = inspect_file(path)
        if report.kind != "lora":
            problem = "; ".join(report.problems) or f"is a {report.kind}, not a LoRA"
            raise CheckpointError(path, problem)
        told = {"name": path.name, "variant": report.variant, "tensors": report.tensors}
        if layers is None:
            return {**told, "matched": None}
        file = open_lora(path, layers)
    except K1Error as error:
        return {"problem": _reason(error)}
    return {
        **told,
        "matched": file.matched,
        "unmatched": file.shortfall or None,
        "trigger": file.trigger.strip()[:80],
        "parameters": file.parameters,
    }


def _reason(error: K1Error) -> str:
    """One line without the name of the field that the page shows anyway."""
    if isinstance(error, UserError):
        return f"{error.allowed}"
    return error.reason if isinstance(error, CheckpointError) else str(error)

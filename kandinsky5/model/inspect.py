"""What a file is, told from its header alone."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kandinsky5.errors import CheckpointError
from kandinsky5.model.architecture import empty_transformer, foreign_family
from kandinsky5.model.checkpoint import STANDARD_STEMS, Checkpoint, read_json
from kandinsky5.model.dit import DiTConfig
from kandinsky5.model.lora_names import adapter_variant, why_not_run
from kandinsky5.model.part_kinds import PartKind, part_kind
from kandinsky5.model.safetensors_file import TensorInfo
from kandinsky5.model.vae_loading import VAE_KINDS, check_vae
from kandinsky5.model.weights import (
    SOURCE_FINGERPRINT_KEY,
    SOURCE_KEY,
    is_beside_weights,
    quantization_of,
    stored_tensors,
    weight_shapes,
)
from kandinsky5.presets import MODES, Preset

DEMO_MODEL_DIM = 192
_FAMILY = {
    (1792, 7168, 512, 2, 32): "lite",
    (2560, 10240, 512, 2, 50): "image",
    (4096, 16384, 1024, 4, 60): "pro",
}
"""(model_dim, ff_dim, time_dim, text blocks, visual blocks) of the published transformers."""

_PIPELINE = re.compile(r"Kandinsky5([TI]2[VI])Pipeline")
"""diffusers' names of its pipelines."""

_DTYPE_NAMES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64", "I8": "int8"}

_LATENTS = "latents"
"""Kind of a file of latents, and its tensor."""


@dataclass(frozen=True)
class FileReport:
    """What a file is.

    Attributes:
        kind: ``dit``, ``lora``, ``vae``, ``text encoder``, ``latents``, ``other`` or ``unusable``.
        model: ``lite``, ``image``, ``pro``, ``demo``, ``custom`` for a DiT; for a VAE or a text encoder as
            :attr:`kandinsky5.model.part_kinds.PartKind.model`; ``unknown``.
        task_hint: ``t2v``, ``i2v``, ``t2i`` or ``i2i`` where name or shapes tell, or the choices left.
        quantization: ``bf16``, ``fp16``, ``fp32``, ``mixed``; ``int8`` (this project's own),
            ``int8-community``, ``fp8-community``, ``fp8-scaled``, ``fp8-unscaled``; ``unknown``.
        parameters: weights, the scales of quantised ones not counted.
        tensors: all tensors in the file.
        dtype_bytes: bytes of tensors by dtype.
        problems: what is wrong with it, one line each; empty for a file that can be used.
        variant: family of a LoRA's names as :func:`kandinsky5.model.lora_names.adapter_variant` has it, or
            of a VAE's (``diffusers``, ``original``).
        files: how many files it lies in.
        prefix: what stands before every name.
        config: dimensions of a DiT or a VAE; of a text encoder its ``width``.
        source: of a file that ``k1.py convert`` made, what it was made of: ``header_sha256`` and
            ``fingerprint``, as the header says.
    """

    kind: str
    model: str = "unknown"
    task_hint: str = "unknown"
    quantization: str = "unknown"
    parameters: int = 0
    tensors: int = 0
    dtype_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    problems: tuple[str, ...] = ()
    variant: str | None = None
    files: int = 0
    prefix: str = ""
    config: dict[str, Any] | None = None
    source: dict[str, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary of all attributes."""
        values = dataclasses.asdict(self)
        return {**values, "problems": list(self.problems)}


def inspect_file(path: Path) -> FileReport:
    """Describe a file, an index or a folder; tensors are not read.

    Never raises for what it finds: a file that cannot be used has kind ``unusable`` or ``other`` and says
    why in ``problems``.
    """
    try:
        with Checkpoint(Path(path)) as checkpoint:
            return _report(checkpoint)
    except CheckpointError as error:
        return FileReport(kind="unusable", problems=(str(error),))


def check_fits(checkpoint: Checkpoint, config: DiTConfig, preset: Preset) -> str | None:
    """Whether a transformer can serve a preset.

    Returns:
        A warning about a file that runs but by its name was made for another task, or None.

    Raises:
        CheckpointError: an image model for a video preset, or the reverse; or one that takes no picture where
            one is given.
    """
    model = _model_name(config, checkpoint.metadata)
    if model == "image" and preset.is_video:
        raise CheckpointError(
            checkpoint.path,
            f"makes images, {preset.name} makes video: choose image-t2i, image-i2i or a video model",
        )
    if model in ("lite", "pro", "demo") and not preset.is_video:
        raise CheckpointError(
            checkpoint.path,
            f"makes video, {preset.name} makes images: choose a t2v or i2v preset or an image model",
        )
    if preset.takes_image and config.input_channels == config.in_visual_dim:
        raise CheckpointError(
            checkpoint.path,
            f"takes no picture, {preset.name} does: choose image-t2i or an image-i2i model",
        )
    hint = _task_hint(checkpoint.path, config, model)
    if hint in MODES and hint != preset.mode:
        return (
            f"{checkpoint.path.name} is by its name for {hint}, {preset.name} is for {preset.mode}"
        )
    return None


def _report(checkpoint: Checkpoint) -> FileReport:
    tensors = checkpoint.tensors
    shapes = weight_shapes(tensors)
    dtype_bytes: Counter[str] = Counter()
    for info in tensors.values():
        dtype_bytes[_DTYPE_NAMES.get(info.dtype, info.dtype.lower())] += info.size_bytes
    base = FileReport(
        kind="other",
        quantization=quantization_of(_numbers(tensors), checkpoint.metadata),
        parameters=sum(tensors[n].elements for n in tensors if not is_beside_weights(n)),
        tensors=len(tensors),
        dtype_bytes=dict(dtype_bytes),
        files=len(checkpoint.files),
        prefix=checkpoint.prefix,
        source=_source_of(checkpoint.metadata),
    )
    if variant := adapter_variant(tensors):
        why = why_not_run(tensors)
        faults = (why,) if why else ()
        return dataclasses.replace(base, kind="lora", variant=variant, problems=faults)
    if _LATENTS in tensors:
        return dataclasses.replace(base, kind=_LATENTS)
    if part := part_kind(shapes):
        return _part_report(checkpoint, base, part)
    try:
        config = empty_transformer(checkpoint.path, shapes, checkpoint.read_config()).config
        problems = _storage_problems(checkpoint)
    except CheckpointError as error:
        ours = foreign_family(shapes) is None and "visual_embeddings.in_layer.weight" in shapes
        kind = "dit" if ours else "other"
        return dataclasses.replace(base, kind=kind, problems=(error.reason,))
    model = _model_name(config, checkpoint.metadata)
    return dataclasses.replace(
        base,
        kind="dit",
        model=model,
        task_hint=_task_hint(checkpoint.path, config, model),
        config=dataclasses.asdict(config),
        problems=problems,
    )


def _numbers(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Without the positions that some text encoders list."""
    return {name: info for name, info in tensors.items() if info.dtype != "I64"}


def _part_report(checkpoint: Checkpoint, base: FileReport, part: PartKind) -> FileReport:
    """Of a VAE or a text encoder."""
    config: dict[str, Any] | None = {"width": part.width} if part.width else None
    problems: tuple[str, ...] = ()
    if part.kind == "vae" and part.model in VAE_KINDS:
        try:
            config = dataclasses.asdict(check_vae(_place_of(checkpoint.path), part.model))
        except CheckpointError as error:
            problems = (error.reason,)
    return dataclasses.replace(
        base,
        kind=part.kind,
        model=part.model,
        variant=part.naming,
        config=config,
        problems=problems,
    )


def _place_of(weights: Path) -> Path:
    """The folder whose weights a file is, or the file itself."""
    is_folder = weights.stem in STANDARD_STEMS and (weights.parent / "config.json").exists()
    return weights.parent if is_folder else weights


def _source_of(metadata: Mapping[str, str]) -> dict[str, str] | None:
    keys = {"header_sha256": SOURCE_KEY, "fingerprint": SOURCE_FINGERPRINT_KEY}
    return {name: metadata[key] for name, key in keys.items() if key in metadata} or None


def _storage_problems(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Why weights of the right names and shapes cannot be read all the same."""
    try:
        stored_tensors(checkpoint)
    except CheckpointError as error:
        return (error.reason,)
    return ()


def _model_name(config: DiTConfig, metadata: Mapping[str, str]) -> str:
    dims = (
        config.model_dim,
        config.ff_dim,
        config.time_dim,
        config.num_text_blocks,
        config.num_visual_blocks,
    )
    if dims in _FAMILY:
        return _FAMILY[dims]
    is_demo = metadata.get("model") == "demo" or config.model_dim == DEMO_MODEL_DIM
    return "demo" if is_demo else "custom"


def _task_hint(path: Path, config: DiTConfig, model: str) -> str:
    """The task a name says (of file, repository or pipeline), else what the shapes leave open."""
    if model == "demo":
        return "t2v or i2v"
    folders = [folder.name for folder in path.parents if "kandinsky-5" in folder.name.lower()]
    for part in (path.name, *folders):
        if found := re.search(r"(?<![a-z0-9])([ti]2[vi])(?![a-z0-9])", part.lower()):
            return found[1]
    if hint := _pipelines_task(path):
        return hint
    conditioned = config.input_channels > config.in_visual_dim
    if model == "image":
        return "i2i" if conditioned else "t2i"
    return "t2v or i2v" if conditioned else "unknown"


def _pipelines_task(path: Path) -> str | None:
    """What the ``model_index.json`` of a ``-Diffusers`` folder says of the transformer in it."""
    if path.parent.name != "transformer":
        return None
    try:
        name = read_json(path.parent.parent / "model_index.json").get("_class_name")
    except CheckpointError:
        return None
    found = _PIPELINE.fullmatch(name) if isinstance(name, str) else None
    return found[1].lower() if found else None

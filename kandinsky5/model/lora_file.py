"""LoRA files (arXiv 2106.09685): which layers of a transformer their tensors belong to.

=================  =====================================================================================
PEFT, official     ``base_model.model.PATH.lora_A[.default].weight``; r and alpha in a JSON file beside it
diffusers          ``transformer.PATH.lora_A.weight``; r and alpha may be in the header metadata
kohya, musubi      ``lora_unet_PATH_WITH_UNDERSCORES.lora_down.weight`` and ``….alpha``
=================  =====================================================================================

A layer's output becomes W·x + strength · alpha/r · up·(down·x). Paths are matched against the names the model
has, never taken apart: which underscore was a dot cannot be told from the key.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kandinsky5.errors import CheckpointError
from kandinsky5.model.safetensors_file import SafetensorsFile, TensorInfo, shown

LayerSizes = Mapping[str, tuple[int, int]]
"""Name of a linear layer in the model → (outputs, inputs)."""

MAX_CONFIG_BYTES = 1_000_000
_PREFIXES = ("base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")
_CONFIG_NAMES = ("adapter_config.json", "lora_config.json", "config.json")
_HEADER_CONFIG = "lora_adapter_metadata"
_ROLES = {
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora.down.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
    "lora.up.weight": "up",
    "alpha": "alpha",
}
_KEY = re.compile("(.+)[.](" + "|".join(re.escape(role) for role in _ROLES) + ")")
_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass(frozen=True)
class LoraFile:
    """A LoRA whose header has been matched against a model.

    Attributes:
        path: the file.
        parts: layer → {"down": name in the file, "up": …, maybe "alpha": …}.
        total: tensors in the file.
        unmatched: names that belong to no layer.
        trigger: text the prompt has to begin with, as the file says; may be empty.
        header_sha256, modified_ns: tell whether the file is still the same.
        parameters: numbers in all matched layers.
    """

    path: Path
    parts: Mapping[str, Mapping[str, str]]
    total: int
    unmatched: tuple[str, ...]
    trigger: str
    header_sha256: str
    modified_ns: int
    parameters: int
    _scaling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def matched(self) -> int:
        """How many of its tensors belong to the model."""
        return self.total - len(self.unmatched)

    def read(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """For each layer: its name, down [r, inputs] and up [outputs, r], the latter times alpha/r, float32.

        Raises:
            CheckpointError: the file is another one by now, or holds numbers that are none.
        """
        with SafetensorsFile(self.path) as file:
            now = (file.header_sha256, file.modified_ns)
            if now != (self.header_sha256, self.modified_ns):
                raise CheckpointError(self.path, "was changed while the job waited: start again")
            for layer, parts in self.parts.items():
                down = file.read(parts["down"]).float()
                up = file.read(parts["up"]).float()
                alpha = file.read(parts["alpha"]).float().item() if "alpha" in parts else None
                up = up * self._scale(down.shape[0], alpha)
                if not (down.isfinite().all() and up.isfinite().all()):
                    raise CheckpointError(self.path, f"NaN or infinity for {layer}: damaged")
                yield layer, down, up

    def _scale(self, rank: int, alpha: float | None) -> float:
        if alpha is None:
            alpha = float(self._scaling.get("alpha", rank))
        return alpha / (math.sqrt(rank) if self._scaling.get("use_rslora") else rank)


def open_lora(path: Path, layers: LayerSizes) -> LoraFile:
    """Match a file's names and shapes against a model's layers; no tensor is read.

    Raises:
        CheckpointError: unusable, of another model, or of a kind that does more than add up·down.
    """
    with SafetensorsFile(path) as file:
        tensors, metadata = file.tensors, file.metadata
        digest, modified_ns = file.header_sha256, file.modified_ns
    flat = {name.replace(".", "_"): name for name in layers}
    parts: dict[str, dict[str, str]] = {}
    unmatched = []
    for key in tensors:
        if "lora_magnitude_vector" in key or key.endswith(".dora_scale"):
            raise CheckpointError(path, "a DoRA, which this program does not run; give a LoRA")
        layer, role = _place_of(key, layers, flat)
        if layer is None or role in parts.get(layer, {}):
            unmatched.append(key)
        else:
            parts.setdefault(layer, {})[role] = key
    if not parts:
        first = next(iter(tensors), None)
        named = f" (first {shown(first)})" if first else ""
        raise CheckpointError(
            path,
            f"a LoRA of another model, or none: 0 of its {len(tensors)} tensors match{named}",
        )
    parameters = sum(
        _checked(path, layer, found, tensors, layers[layer]) for layer, found in parts.items()
    )
    return LoraFile(
        path=path,
        parts=parts,
        total=len(tensors),
        unmatched=tuple(unmatched),
        trigger=metadata.get("trigger", ""),
        header_sha256=digest,
        modified_ns=modified_ns,
        parameters=parameters,
        _scaling=_scaling_of(path, metadata),
    )


def _place_of(key: str, layers: LayerSizes, flat: Mapping[str, str]) -> tuple[str | None, str]:
    """Which layer a tensor belongs to, or None, and what it is there."""
    match = _KEY.fullmatch(key.replace(".default", ""))
    if match is None:
        return None, ""
    name, role = match[1], _ROLES[match[2]]
    for prefix in _FLAT_PREFIXES:
        if name.startswith(prefix):
            return flat.get(name.removeprefix(prefix)), role
    while name not in layers and (found := [p for p in _PREFIXES if name.startswith(p)]):
        name = name.removeprefix(found[0])
    return (name if name in layers else None), role


def _checked(
    path: Path,
    layer: str,
    found: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    size: tuple[int, int],
) -> int:
    """Numbers of one layer's pair.

    Raises:
        CheckpointError: half of it is missing, or it does not fit the layer.
    """
    for role, other in (("down", "up"), ("up", "down")):
        if role not in found:
            there = shown(found.get(other) or found["alpha"])
            raise CheckpointError(path, f"{there} has no {role} part: download the LoRA again")
    down, up = tensors[found["down"]], tensors[found["up"]]
    outputs, inputs = size
    rank = down.shape[0] if down.shape else 0
    if down.shape != (rank, inputs) or up.shape != (outputs, rank) or rank == 0:
        raise CheckpointError(
            path,
            f"a LoRA of another model: {shown(found['down'])} and its other part are"
            f" {list(down.shape)} and {list(up.shape)}, {layer} needs [r, {inputs}] and [{outputs}, r]",
        )
    kinds = {down.dtype, up.dtype}
    if "alpha" in found:
        alpha = tensors[found["alpha"]]
        kinds.add(alpha.dtype)
        if alpha.elements != 1:
            raise CheckpointError(path, f"{shown(found['alpha'])} is not one number")
    if not kinds <= _FLOATS:
        strange = ", ".join(sorted(kinds - _FLOATS))
        raise CheckpointError(path, f"{layer} has dtype {strange}; bf16, fp16 or fp32 is needed")
    return down.elements + up.elements


def _scaling_of(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """``alpha`` and ``use_rslora`` as the header or a JSON file beside the LoRA tells them; maybe nothing."""
    texts = [metadata.get(_HEADER_CONFIG, "")]
    for name in (f"{path.stem}.json", *_CONFIG_NAMES):
        beside = path.with_name(name)
        try:
            if beside.stat().st_size <= MAX_CONFIG_BYTES:
                texts.append(beside.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
    for text in texts:
        try:
            values = json.loads(text) if text else None
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and (scaling := _read_scaling(values)):
            return scaling
    return {}


def _read_scaling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a PEFT config; diffusers puts ``transformer.`` before its keys."""
    named = {str(key).removeprefix("transformer."): value for key, value in values.items()}
    rank = named.get("r", named.get("rank"))
    alpha = named.get("lora_alpha", named.get("alpha"))
    for number in (rank, alpha):
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            return {}
        if not math.isfinite(number):
            return {}
    return {"alpha": alpha, "use_rslora": named.get("use_rslora") is True}

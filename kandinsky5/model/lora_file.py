"""LoRA files (arXiv 2106.09685), in the ways that :mod:`kandinsky5.model.lora_names` knows.

A layer's output becomes W·x + strength · scale · up·(down·x), the scale being alpha/r or as
:mod:`kandinsky5.model.lora_scaling` has it. r and alpha lie in the file, its header or a JSON file beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kandinsky5.errors import CheckpointError
from kandinsky5.model.lora_names import (
    ALPHA,
    PEFT_PREFIX,
    adapter_name,
    layer_of,
    why_not_run,
)
from kandinsky5.model.lora_scaling import LoraScaling, scaling_of
from kandinsky5.model.safetensors_file import SafetensorsFile, TensorInfo, shown

LayerSizes = Mapping[str, tuple[int, int]]
"""Name of a linear layer in the model → (outputs, inputs)."""

_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass(frozen=True)
class LoraFile:
    """A LoRA whose header has been matched against a model.

    Attributes:
        path: the file.
        parts: layer → {"down": name in the file, "up": …, maybe "alpha": …}.
        total: tensors in the file.
        unmatched: names that belong to no layer, or are of a kind that is not run.
        left_out: of these kinds, how many tensors.
        trigger: text the prompt has to begin with, as the file says; may be empty.
        header_sha256, modified_ns: tell whether the file is still the same.
        parameters: numbers in all matched layers.
        scaling: what its layers are multiplied by.
    """

    path: Path
    parts: Mapping[str, Mapping[str, str]]
    total: int
    unmatched: tuple[str, ...]
    trigger: str
    header_sha256: str
    modified_ns: int
    parameters: int
    scaling: LoraScaling = field(default_factory=LoraScaling)
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def matched(self) -> int:
        """How many of its tensors belong to the model."""
        return self.total - len(self.unmatched)

    @property
    def shortfall(self) -> str:
        """The first name that does not act, and the kinds that do not; empty where all of the file acts."""
        if not self.unmatched:
            return ""
        said = self.unmatched[0][:80]
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.left_out.items())
        return f"{said}; left out, as this program does not run them: {kinds}" if kinds else said

    def read(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """For each layer: its name, down [r, inputs] and up [outputs, r], this times its scale, float32.

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
                up = up * self.scaling.of(_names_of(layer, parts), down.shape[0], alpha)
                if not (down.isfinite().all() and up.isfinite().all()):
                    raise CheckpointError(self.path, f"NaN or infinity for {layer}: damaged")
                yield layer, down, up


def open_lora(path: Path, layers: LayerSizes) -> LoraFile:
    """Match a file's names and shapes against a model's layers; no tensor is read.

    Raises:
        CheckpointError: unusable, of another model, or of a kind that does more than add up·down.
    """
    with SafetensorsFile(path) as file:
        tensors, metadata = file.tensors, file.metadata
        digest, modified_ns = file.header_sha256, file.modified_ns
    if why := why_not_run(tensors):
        raise CheckpointError(path, why)
    parts, unmatched, left_out = _matched(tensors, layers)
    if not parts:
        first = next(iter(tensors), None)
        named = f" (first {shown(first)})" if first else ""
        raise CheckpointError(
            path,
            f"a LoRA of another model, or none: 0 of its {len(tensors)} tensors match{named}",
        )
    scaling = scaling_of(path, metadata)
    parameters = 0
    for layer, found in parts.items():
        parameters += _checked(path, layer, found, tensors, layers[layer])
        _check_rank(path, layer, found, tensors, scaling)
    return LoraFile(
        path=path,
        parts=parts,
        total=len(tensors),
        unmatched=unmatched,
        left_out=left_out,
        trigger=metadata.get("trigger", ""),
        header_sha256=digest,
        modified_ns=modified_ns,
        parameters=parameters,
        scaling=scaling,
    )


def _matched(
    tensors: Iterable[str], layers: LayerSizes
) -> tuple[dict[str, dict[str, str]], tuple[str, ...], Counter[str]]:
    """(parts, unmatched, left out) as :class:`LoraFile` has them."""
    flat = {name.replace(".", "_"): name for name in layers}
    parts: dict[str, dict[str, str]] = {}
    adapters: dict[str, str] = {}
    others: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    for key in tensors:
        name = adapter_name(key)
        if name is None:
            continue
        layer = layer_of(name.path, layers, flat)
        if name.kind:
            left_out[name.kind] += 1
            others[layer or name.path] = name.kind
        elif (
            layer is not None
            and name.role not in parts.get(layer, {})
            and (name.role == ALPHA or adapters.setdefault(layer, name.adapter) == name.adapter)
        ):
            parts.setdefault(layer, {})[name.role] = key
    for layer in [layer for layer in parts if set(parts[layer]) == {ALPHA} and layer in others]:
        left_out[others[layer]] += 1  # that alpha was theirs
        del parts[layer]
    used = {key for found in parts.values() for key in found.values()}
    return parts, tuple(key for key in tensors if key not in used), left_out


def _names_of(layer: str, parts: Mapping[str, str]) -> tuple[str, ...]:
    """A layer's names in the model and in the file, where PEFT may have trained it inside another."""
    found = adapter_name(parts["down"])
    name = found.path.removeprefix(PEFT_PREFIX) if found else layer
    return (layer,) if name == layer else (layer, name)


def _check_rank(
    path: Path,
    layer: str,
    found: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    scaling: LoraScaling,
) -> None:
    """Raise CheckpointError where the configuration gives a layer another rank than its tensors have."""
    rank, said = tensors[found["down"]].shape[0], scaling.rank_of(_names_of(layer, found))
    if said is not None and said != rank:
        raise CheckpointError(
            path,
            f"{layer} has rank {rank}, its configuration's rank_pattern says {said}:"
            " they do not belong together; download both again",
        )


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

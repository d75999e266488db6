"""What a tensor of an adapter is, told from its name alone: the one rule by which LoRAs are told and matched.

=================  =====================================================================================
PEFT, official     ``base_model.model.PATH.lora_A[.ADAPTER].weight``, ADAPTER mostly ``default``
diffusers          ``transformer.PATH.lora_A.weight``, of old ``transformer.PATH.lora.down.weight``
kohya, musubi      ``lora_unet_PATH_WITH_UNDERSCORES.lora_down.weight`` and ``….alpha``
=================  =====================================================================================

Paths are matched against the names a model has, never taken apart: which underscore was a dot cannot be told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Layer = TypeVar("Layer")

DOWN, UP, ALPHA = "down", "up", "alpha"
PEFT_PREFIX = "base_model.model."
DORA, LOCON_MIDDLE = "DoRA", "LoCon with a middle part"
CHANGES_THE_PAIR = frozenset({DORA, LOCON_MIDDLE})
"""Kinds beside which up·down means something else."""

_PREFIXES = (
    PEFT_PREFIX,
    "transformer.",
    "model.diffusion_model.",
    "diffusion_model.",
    "_orig_mod.",
)
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
_FLAT_INNER = tuple(prefix.replace(".", "_") for prefix in _PREFIXES)
_ROLES = {"A": DOWN, "down": DOWN, "B": UP, "up": UP}
_PAIR = re.compile(
    r"(?P<path>.+)\.(?:lora_(?P<letter>[AB])(?:\.(?P<adapter>[^.]+))?"
    r"|lora(?P<mark>[_.])(?P<word>down|up))\.(?P<what>weight|bias)"
)
_ALPHA = re.compile(r"(?P<path>.+)\.alpha")
_OTHERS = tuple(
    (kind, re.compile(rf"(?P<path>.+)\.(?:{pattern})"))
    for kind, pattern in (
        (DORA, r"lora_magnitude_vector(?:\..+)?|dora_scale"),
        (LOCON_MIDDLE, r"lora_mid\.weight"),
        ("LoKr", r"lokr_(?:w[12](?:_[ab])?|t2)(?:\.[^.]+)?"),
        ("LoHa", r"hada_(?:w[12]_[ab]|t[12])(?:\.[^.]+)?"),
        ("OFT", r"oft_(?:blocks|diag|R)(?:\..+)?"),
        ("diff (whole weights)", "diff"),
        ("diff_b (biases)", "diff_b"),
        ("norm", "[wb]_norm"),
    )
)


@dataclass(frozen=True)
class AdapterName:
    """What one tensor of an adapter is.

    Attributes:
        path: the layer's, as the file has it, with what stands before it.
        role: ``down``, ``up`` or ``alpha``; empty for what this program does not run.
        kind: of what it does not run.
        adapter: the name PEFT gave the adapter; empty without one.
        variant: the program's way of naming: ``peft``, ``diffusers``, ``kohya``; empty where that is open.
    """

    path: str
    role: str = ""
    kind: str = ""
    adapter: str = ""
    variant: str = ""


def adapter_name(key: str) -> AdapterName | None:
    """What a tensor of this name is; None where no adapter has such a one."""
    if found := _PAIR.fullmatch(key):
        path, adapter = found["path"], found["adapter"] or ""
        role = _ROLES[found["letter"] or found["word"]] if found["what"] == "weight" else ""
        return AdapterName(path, role, "" if role else "bias", adapter, _variant(found))
    if found := _ALPHA.fullmatch(key):
        return AdapterName(found["path"], ALPHA)
    for kind, pattern in _OTHERS:
        if found := pattern.fullmatch(key):
            return AdapterName(found["path"], kind=kind)
    return None


def is_adapter(keys: Iterable[str]) -> bool:
    """Whether tensors of these names make up an adapter that goes beside a model."""
    names = map(adapter_name, keys)
    return any(name is not None and name.role != ALPHA for name in names)


def adapter_variant(keys: Iterable[str]) -> str | None:
    """Which program's names an adapter has, the first that tells; None where these are no adapter's.

    Returns:
        ``kohya``, ``peft``, ``diffusers``; ``unknown``, or the kind of a file without any LoRA in it.
    """
    names = [name for key in keys if (name := adapter_name(key)) and name.role != ALPHA]
    if not names:
        return None
    told = next((name.variant for name in names if name.variant), "")
    kinds = [name.kind for name in names]
    return told or (kinds[0].lower() if all(kinds) else "unknown")


def why_not_run(keys: Iterable[str]) -> str | None:
    """Why an adapter of these names is not run, whatever the model; None where it may be."""
    names = [name for key in keys if (name := adapter_name(key)) and name.role != ALPHA]
    kinds = Counter(name.kind for name in names)
    said = next((f"a {kind}" for kind in kinds if kind in CHANGES_THE_PAIR), "")
    if not said and names and "" not in kinds:
        said = f"nothing but {kinds.most_common(1)[0][0]}"
    return f"{said}, which this program does not run; give a LoRA" if said else None


def layer_of(path: str, layers: Mapping[str, Layer], flat: Mapping[str, str]) -> str | None:
    """The layer of a model that a path in a file means, or None.

    Args:
        path: as :attr:`AdapterName.path`.
        layers: by the model's names.
        flat: the model's names with underscores for dots → these names.
    """
    for start in _FLAT_PREFIXES:
        if path.startswith(start):
            return flat.get(_without(_FLAT_INNER, path.removeprefix(start), flat))
    bare = _without(_PREFIXES, path, layers)
    return bare if bare in layers else None


def _without(prefixes: tuple[str, ...], name: str, known: Mapping[str, object]) -> str:
    """A name without what programs put before it, unless that makes it a known one."""
    while name not in known and (found := [p for p in prefixes if name.startswith(p)]):
        name = name.removeprefix(found[0])
    return name


def _variant(found: re.Match[str]) -> str:
    path = found["path"]
    if path.startswith(_FLAT_PREFIXES):
        return "kohya"
    if found["adapter"] or path.startswith(PEFT_PREFIX):
        return "peft"
    if path.startswith("transformer.") or found["mark"] == ".":
        return "diffusers"
    return "peft" if found["letter"] else ""

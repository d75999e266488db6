"""By what a LoRA's layers are multiplied: alpha and rank as PEFT's configuration gives them to every module.

A pattern's key is a module's name, the end of one from a dot on, or a regular expression for either; of the
keys that fit a module the first one counts, and where none fits, the number given for all of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from kandinsky5.errors import CheckpointError
from kandinsky5.model.safetensors_file import shown

MAX_CONFIG_BYTES = 1_000_000
MAX_KEY_CHARACTERS, MAX_REPEATS, MAX_GROUPS = 300, 3, 3
"""Of one expression: each repeat, and each group with a choice, multiplies the time that a misfit takes."""
GREATEST_NUMBER = 1e9
_CONFIG_NAMES = ("adapter_config.json", "lora_config.json", "config.json")
_HEADER_CONFIG = "lora_adapter_metadata"
_REPEATS = re.compile(r"(?<!\\)[*+{]|(?<![\\(])[?]")
_GROUPS = re.compile(r"(?<!\\)[(]")
_REPEATED_GROUP = re.compile(r"(?<!\\)[)][*+{]")

Number = TypeVar("Number", int, float)
Patterns = tuple[tuple[re.Pattern[str], Number], ...]


@dataclass(frozen=True)
class LoraScaling:
    """What multiplies up·down besides the strength.

    Attributes:
        alpha: for modules without one of their own; None takes the rank.
        use_rslora: divide by the rank's root (arXiv 2312.03732) instead of the rank.
        alphas, ranks: expression for a module's whole name → its alpha, its rank; the first that fits counts.
    """

    alpha: float | None = None
    use_rslora: bool = False
    alphas: Patterns[float] = ()
    ranks: Patterns[int] = ()

    def of(self, names: Sequence[str], rank: int, stored: float | None = None) -> float:
        """Of one layer.

        Args:
            names: under which the configuration may know it.
            rank: its tensors'.
            stored: alpha, where the file holds it as a tensor.
        """
        alpha = stored
        if alpha is None:
            alpha = _first(self.alphas, names)
        if alpha is None:
            alpha = rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank_of(self, names: Sequence[str]) -> int | None:
        """What ``rank_pattern`` says of a layer; None where it says nothing."""
        return _first(self.ranks, names)


def scaling_of(path: Path, metadata: Mapping[str, str]) -> LoraScaling:
    """As the header or a JSON file beside a LoRA tells it: the first of these that names rank and alpha.

    Raises:
        CheckpointError: it has a pattern that cannot be followed.
    """
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
        if isinstance(values, dict) and (found := _scaling(path, values)):
            return found
    return LoraScaling()


def _scaling(path: Path, values: Mapping[str, Any]) -> LoraScaling | None:
    """Of a PEFT config; diffusers puts ``transformer.`` before its keys."""
    named = {str(key).removeprefix("transformer."): value for key, value in values.items()}
    rank = named.get("r", named.get("rank"))
    alpha = named.get("lora_alpha", named.get("alpha"))
    if not (_is_number(rank) and _is_number(alpha)):
        return None
    return LoraScaling(
        alpha=float(alpha),
        use_rslora=named.get("use_rslora") is True,
        alphas=tuple(_patterns(path, "alpha_pattern", named)),
        ranks=tuple((key, round(value)) for key, value in _patterns(path, "rank_pattern", named)),
    )


def _patterns(
    path: Path, name: str, values: Mapping[str, Any]
) -> Iterable[tuple[re.Pattern[str], float]]:
    entries = values.get(name) or {}
    if not isinstance(entries, dict):
        raise CheckpointError(path, f"the {name} in its configuration is no table of numbers")
    for key, value in entries.items():
        if not _is_number(value):
            raise CheckpointError(
                path, f"the {name} in its configuration has no number for {shown(key)}"
            )
        yield _expression(path, name, key), value


def _expression(path: Path, name: str, key: str) -> re.Pattern[str]:
    """For whole names of modules.

    Raises:
        CheckpointError: it is none, or one that could search for hours.
    """
    wrong = f"the key {shown(key)} of the {name} in its configuration"
    if (
        len(key) > MAX_KEY_CHARACTERS
        or len(_REPEATS.findall(key)) > MAX_REPEATS
        or len(_GROUPS.findall(key)) > MAX_GROUPS
        or _REPEATED_GROUP.search(key)
    ):
        raise CheckpointError(
            path,
            f"{wrong} is too involved: at most {MAX_KEY_CHARACTERS} characters, {MAX_REPEATS}"
            f" repetitions and {MAX_GROUPS} groups, none of them repeated",
        )
    try:
        return re.compile(rf"(.*\.)?({key})")
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(path, f"{wrong} is no regular expression ({error})") from error


def _first(patterns: Patterns[Number], names: Sequence[str]) -> Number | None:
    for expression, value in patterns:
        if any(expression.fullmatch(name) for name in names):
            return value
    return None


def _is_number(value: object) -> TypeGuard[float]:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) < GREATEST_NUMBER
    )

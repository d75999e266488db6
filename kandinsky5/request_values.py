"""What a field of a request may hold: its type, its choices or its range."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from kandinsky5.errors import UserError
from kandinsky5.presets import (
    FRAMES_PER_SECOND,
    MAX_SIDE_PX,
    MAX_VIDEO_S,
    PRESETS,
    TEMPORAL_COMPRESSION,
)

MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_PROMPT_CHARACTERS = 100_000
VAE_TILE_STEP_PX = 16
"""Of a tile's side: a token's, so that half of it is still a multiple of a latent cell."""
LATENT_FRAMES_PER_SECOND = FRAMES_PER_SECOND // TEMPORAL_COMPRESSION

CHOICES: dict[str, tuple[str, ...]] = {
    "weights": ("auto", "bf16", "int8", "fp8"),
    "text_weights": ("auto", "bf16", "nf4"),
    "attention": ("auto", "sdpa", "flash2", "flash3", "sage", "nabla"),
    "cache": ("none", "magcache"),
    "dtype": ("auto", "bf16", "fp32"),
    "vae_tiling": ("auto", "rolling", "whole", "published"),
    "source": ("auto", "resident", "pinned", "disk"),
}
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, MAX_SEED),
    "width": (64, MAX_SIDE_PX),
    "height": (64, MAX_SIDE_PX),
    "seconds": (1 / LATENT_FRAMES_PER_SECOND, MAX_VIDEO_S),
    "steps": (1, MAX_STEPS),
    "guidance": (1.0, 30.0),
    "shift": (0.1, 100.0),
    "guidance_start": (0.0, 1.0),
    "guidance_end": (0.0, 1.0),
    "cache_threshold": (0.0, 10.0),
    "cache_retention": (0.0, 1.0),
    "nabla_p": (0.01, 1.0),
    "nabla_wt": (1, 255),
    "nabla_wh": (1, 31),
    "nabla_ww": (1, 31),
    "vram": (0.5, 1024.0),
    "ram": (0.5, 4096.0),
    "crf": (0, 51),
    "vae_tile": (64, MAX_SIDE_PX),
    "resident_blocks": (0, 1000),
    "slots": (2, 1000),
    "chunk_tokens": (16, 10_000_000),
    "chunk_heads": (1, 1000),
}


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA file and how strongly it acts (1.0 as trained, negative to act against)."""

    path: str
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            raise UserError("loras", self.path, "the path of a file")
        if not _is_number(self.strength) or abs(self.strength) > 10:
            raise UserError("loras", self.strength, "a strength is a number from -10 to 10")


def checked(name: str, value: Any, kinds: Collection[type]) -> Any:
    """The value of a field in its type and within its limits; whole floats pass as integers, NaN nowhere.

    Args:
        name: of a field of :class:`~kandinsky5.request.GenerationRequest`.
        value: given for it.
        kinds: types that the field is declared with.

    Raises:
        UserError: naming the field and what is allowed.
    """
    value = _typed(name, value, kinds)
    if name == "expanded_prompt" and not (value or "").strip():
        return None
    if name == "preset" and value not in PRESETS:
        raise UserError(name, value, f"one of {', '.join(PRESETS)}")
    if name in CHOICES and value not in CHOICES[name]:
        raise UserError(name, value, f"one of {', '.join(CHOICES[name])}")
    if name in RANGES and value is not None:
        low, high = RANGES[name]
        if not low <= value <= high:
            raise UserError(name, value, _range_text(name))
    if name == "vae_tile" and value is not None and value % VAE_TILE_STEP_PX:
        raise UserError(name, value, f"a multiple of {VAE_TILE_STEP_PX} px")
    if name == "prompt" and not value.strip():
        raise UserError(name, value, "describe what should be made")
    if name in ("prompt", "negative_prompt", "clip_prompt", "expanded_prompt"):
        if "\0" in (value or ""):
            raise UserError(name, value, "text without NUL characters")
        if len(value or "") > MAX_PROMPT_CHARACTERS:
            raise UserError(name, value, f"at most {MAX_PROMPT_CHARACTERS} characters")
    if name == "device":
        _check_device(value)
    return value


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdigit())):
        raise UserError("device", device, "one of auto, cpu, cuda, cuda:0, cuda:1, …")


def _typed(name: str, value: Any, kinds: Collection[type]) -> Any:
    if name == "loras":
        return _loras(value)
    if value is None and type(None) in kinds:
        return None
    if bool in kinds:
        if isinstance(value, bool):
            return value
        raise UserError(name, value, "true or false")
    if int in kinds or float in kinds:
        if not _is_number(value):
            raise UserError(name, value, _range_text(name))
        if int in kinds and value != int(value):
            raise UserError(name, value, f"{_range_text(name)}, without a fraction")
        return int(value) if int in kinds else float(value)
    if not isinstance(value, str):
        raise UserError(name, value, "text")
    return value


def _is_number(value: Any) -> bool:
    """A finite number that a float can hold; true and false are none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _range_text(name: str) -> str:
    low, high = (str(bound) if isinstance(bound, int) else f"{bound:g}" for bound in RANGES[name])
    return f"a number from {low} to {high}"


def _loras(value: Any) -> tuple[LoraChoice, ...]:
    if not isinstance(value, (list, tuple)):
        raise UserError("loras", value, "a list of {path, strength}")
    choices = []
    for item in value:
        if isinstance(item, LoraChoice):
            choices.append(item)
        elif isinstance(item, Mapping) and set(item) <= {"path", "strength"} and "path" in item:
            choices.append(LoraChoice(item["path"], item.get("strength", 1.0)))
        else:
            raise UserError("loras", item, "{path, strength}")
    return tuple(choices)

"""What can be chosen: modes, presets, sizes, and the values a preset brings along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kandinsky5.model.files import parts_at_hand
from kandinsky5.presets import PRESETS, Preset

FROM_IMAGE = "From the image"
CUSTOM_SIZE = "Custom"
NOT_HERE = " — weights not here yet"
"""Ends a preset's label; the style sheet greys choices by it."""


def preset_values(preset: Preset) -> dict[str, Any]:
    """Values of the controls a preset decides: size, length and sampling."""
    width, height = preset.sizes_px[0]
    if preset.takes_image:
        return {
            **_sampling(preset),
            "size": FROM_IMAGE,
            "width": None,
            "height": None,
        }
    return {
        **_sampling(preset),
        "size": _size_text(width, height),
        "width": width,
        "height": height,
    }


def _sampling(preset: Preset) -> dict[str, Any]:
    return {
        "seconds": preset.seconds,
        "steps": preset.steps,
        "guidance": preset.guidance,
        "shift": preset.shift,
    }


def _size_text(width: int, height: int) -> str:
    return f"{width} × {height}"


def size_choices(preset: Preset) -> list[str]:
    """Names of the trained sizes, "from the image" where there is one, and "custom"."""
    trained = [_size_text(width, height) for width, height in preset.sizes_px]
    return [*([FROM_IMAGE] if preset.takes_image else []), *trained, CUSTOM_SIZE]


def size_of(name: str, width: Any, height: Any) -> tuple[Any, Any]:
    """(width, height) for a name of :func:`size_choices`; "custom" keeps what stands there."""
    if name == FROM_IMAGE:
        return None, None
    if name == CUSTOM_SIZE:
        return width, height
    first, second = name.split(" × ")
    return int(first), int(second)


def size_name(preset: Preset, width: Any, height: Any) -> str:
    """The name of a size among the preset's choices."""
    if preset.takes_image and not width and not height:
        return FROM_IMAGE
    if (width, height) in preset.sizes_px:
        return _size_text(int(width), int(height))
    return CUSTOM_SIZE


def preset_choices(mode: str, is_here: Callable[[Preset], bool]) -> list[tuple[str, str]]:
    """(label, name) of the presets of a mode: built in first, then those whose weights are here.

    The others are marked as such.
    """
    rows = [preset for preset in PRESETS.values() if preset.mode == mode]
    here = {preset.name: preset.is_builtin or is_here(preset) for preset in rows}
    rows.sort(key=lambda preset: (not preset.is_builtin, not here[preset.name]))
    return [
        (preset.title + ("" if here[preset.name] else NOT_HERE), preset.name) for preset in rows
    ]


def weights_in(models_dirs: Callable[[], Sequence[Path]]) -> Callable[[Preset], bool]:
    """Whether a preset's weights are on this machine, looked for where the worker looks; nothing is read."""

    def is_here(preset: Preset) -> bool:
        return "transformer" in parts_at_hand(preset, models_dirs())

    return is_here

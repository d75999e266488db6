"""The form as the browser keeps it over a reload, read without trusting it.

``page.js`` writes it into the browser's own storage as ``{"version": 1, "values": {field: value}}``; it is
sent nowhere but back to this studio. The picture is not kept: its upload belongs to the page that made it.
"""

from __future__ import annotations

import json
import math
from typing import Any

from kandinsky5.presets import PRESETS, Preset
from kandinsky5.request import MAX_PROMPT_CHARACTERS
from kandinsky5.ui.choices import preset_values, size_name
from kandinsky5.ui.fields import BY_NAME, FIELDS, Field

VERSION = 1
UNKEPT_KINDS = ("picture", "pictures", "slider")
KEPT_NAMES = tuple(field.name for field in FIELDS if field.kind not in UNKEPT_KINDS)


def values_from(text: str | None) -> dict[str, Any] | None:
    """Value of each kept control; what is missing, of another kind or out of date takes its default.

    Args:
        text: what the browser kept; anything at all.

    Returns:
        None when nothing was kept or nothing of it can be read.
    """
    kept = _read(text)
    if kept is None:
        return None
    preset = _preset(kept.get("preset"))
    known = preset is not None
    preset = preset or PRESETS[BY_NAME["preset"].default]
    values = {**preset_values(preset), "mode": preset.mode, "preset": preset.name}
    for name in KEPT_NAMES:
        field = BY_NAME[name]
        values.setdefault(name, field.default)
        # numbers without their preset would be another model's
        if name in kept and (known or field.kind != "number") and _fits(field, kept[name]):
            values[name] = kept[name]
    values["size"] = size_name(preset, values["width"], values["height"])
    return values


def _read(text: str | None) -> dict[str, Any] | None:
    try:
        kept = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    if not isinstance(kept, dict) or kept.get("version") != VERSION:
        return None
    values = kept.get("values")
    return values if isinstance(values, dict) else None


def _preset(name: Any) -> Preset | None:
    return PRESETS.get(name) if isinstance(name, str) else None


def _fits(field: Field, value: Any) -> bool:
    """Whether a control of this kind could have held the value, be it allowed or not."""
    if field.kind == "number":
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value is None or (number and abs(value) <= 1e15 and math.isfinite(value))
    if field.kind == "tick":
        return isinstance(value, bool)
    if field.options:
        return value in [option for _, option in field.options]
    if field.kind in ("choice", "switch"):
        return False  # they follow from the preset and the numbers
    return isinstance(value, str) and len(value) <= MAX_PROMPT_CHARACTERS

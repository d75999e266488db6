"""The form: built from the table of fields, filled from a request, and read back into one."""

from __future__ import annotations

import dataclasses
from abc import ABCMeta
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.component_meta import ComponentMeta

from kandinsky5.errors import UserError
from kandinsky5.presets import MODES, PRESETS, Preset
from kandinsky5.request import GenerationRequest, LoraChoice, settle
from kandinsky5.ui import sizes
from kandinsky5.ui.choices import preset_values, size_choices, size_name
from kandinsky5.ui.fields import (
    BY_NAME,
    FIELDS,
    FIRST_PRESET,
    LORA_FIELDS,
    LORA_ROWS,
    Field,
    fixed_defaults,
    is_shown,
    placeholder_of,
)
from kandinsky5.ui.pictures import check_picture
from kandinsky5.ui.typed import amount_of, existing_path, lora_of, seed_of

DEFAULTS = {item.name: item.default for item in dataclasses.fields(GenerationRequest)}


class _UnwrittenMeta(ComponentMeta):
    """gradio's metaclass without its habit of writing a .pyi file beside the source of a component."""

    def __new__(
        cls, name: str, bases: tuple[type, ...], attributes: dict[str, Any]
    ) -> _UnwrittenMeta:
        return ABCMeta.__new__(cls, name, bases, attributes)


class PictureInput(gr.Image, metaclass=_UnwrittenMeta):
    """gradio's image control that hands over the uploaded file as it is.

    Its own way is to decode the file before any handler runs, so that a broken one could not be answered
    at its field.
    """

    is_template = True

    def preprocess(self, payload: Any) -> str | None:
        return payload.path if payload else None


class PresetChoice(gr.Dropdown, metaclass=_UnwrittenMeta):
    """gradio's drop-down without its check against the choices, which change with the mode.

    A look at the form that was on its way meanwhile still names the old mode's preset, and is no error.
    """

    is_template = True

    def preprocess(self, payload: Any) -> Any:
        return payload


class FileInput(gr.File, metaclass=_UnwrittenMeta):
    """gradio's file control, without a stub written beside this source."""

    is_template = True


def component(
    field: Field, presets: Callable[[str], list[tuple[str, str]]]
) -> gr.components.Component:
    """The control of a field, holding the values of the first preset.

    Args:
        presets: choices of presets (label, name) for a mode.
    """
    first = FIRST_PRESET
    value = {**fixed_defaults(), **preset_values(first)}[field.name]
    common: dict[str, Any] = {
        "label": field.label,
        "info": field.info,
        "elem_id": field.elem_id,
        "elem_classes": ["k1-field"],
        "visible": is_shown(field, first, {}),
        "interactive": True,
    }
    if field.kind == "switch":
        options: list[Any] = [(title, mode) for mode, title in MODES.items()]
        if field.name == "size":
            options = list(size_choices(first))
        return gr.Radio(options, value=value, **common)
    if field.kind == "tick":
        return gr.Checkbox(value=value, **common)
    if field.kind == "choice":
        options = list(field.options) or presets(first.mode)
        made = PresetChoice if field.name == "preset" else gr.Dropdown
        return made(options, value=value, min_width=field.least_px, filterable=False, **common)
    if field.kind == "number":
        return gr.Number(
            value=value, placeholder=field.placeholder, min_width=field.least_px, **common
        )
    if field.kind == "slider":
        del common["info"]
        return gr.Slider(
            minimum=sizes.LEAST_PERCENT,
            maximum=sizes.MOST_PERCENT,
            value=value,
            step=1,
            buttons=[],
            min_width=field.least_px,
            **common,
        )
    if field.kind == "picture":
        del common["info"]
        return PictureInput(
            type="filepath",
            sources=["upload", "clipboard"],
            buttons=[],
            height=220,
            placeholder="Drop a picture here or click to choose one",
            **common,
        )
    if field.kind == "pictures":
        del common["info"]
        return FileInput(
            file_count="multiple",
            file_types=["image"],
            type="filepath",
            height=120,
            **common,
        )
    return gr.Textbox(
        value=value,
        placeholder=placeholder_of(field, first),
        min_width=field.least_px,
        lines=field.lines,
        max_lines=max(field.lines, 12) if field.kind == "text" else 1,
        autofocus=field.name == "prompt",
        **common,
    )


def settings_of(values: Mapping[str, Any], preset: Preset) -> dict[str, Any]:
    """Fields of a request from values of controls, their numbers read; what is not shown takes its default.

    Args:
        values: of some controls or all, by their fields' names.

    Raises:
        UserError: naming the field that cannot be used.
    """
    given: dict[str, Any] = {}
    for name, value in values.items():
        field = BY_NAME[name]
        if not field.is_setting:
            continue
        if not is_shown(field, preset, values):
            given[name] = DEFAULTS[name]
        elif field.kind == "amount":
            amount = amount_of(field, value)
            given[name] = DEFAULTS[name] if amount is None else amount
        else:
            given[name] = value
    return given


def request_from(values: Mapping[str, Any]) -> GenerationRequest:
    """The request that a filled form stands for.

    Args:
        values: value of each control by its field's name.

    Raises:
        UserError: naming the field that cannot be used.
    """
    request = draft_request(values)
    settle(request)
    if request.image:
        check_picture(request.image)
    return request


def draft_request(values: Mapping[str, Any]) -> GenerationRequest:
    """The request of a form whose picture may still be missing; otherwise as :func:`request_from`."""
    preset = PRESETS.get(values["preset"])
    if preset is None:
        raise UserError("preset", values["preset"], "one of the list")
    given = settings_of(values, preset)
    for field in FIELDS:
        if field.kind in ("file", "folder"):
            given[field.name] = existing_path(field, given[field.name])
    given["seed"] = seed_of(given["seed"])
    given["clip_prompt"] = given["clip_prompt"] or None
    given["loras"] = _loras(values)
    if str(given["expanded_prompt"] or "").strip():
        given["expand"] = False  # what is written there is what is encoded
    return GenerationRequest(**given)


def _loras(values: Mapping[str, Any]) -> tuple[LoraChoice, ...]:
    rows = (
        lora_of(path, strength, values[path.name], values[strength.name])
        for path, strength in LORA_FIELDS
    )
    return tuple(choice for choice in rows if choice is not None)


def values_of(request: GenerationRequest) -> dict[str, Any]:
    """Value of each control that stands for this request; the reverse of :func:`request_from`.

    Raises:
        UserError: it has more LoRAs than the form has rows.
    """
    preset = PRESETS[request.preset]
    values = {**fixed_defaults(), **preset_values(preset), "mode": preset.mode}
    for field in FIELDS:
        if field.is_setting and (value := getattr(request, field.name)) is not None:
            values[field.name] = value
            if field.kind == "amount":
                values[field.name] = "" if value == DEFAULTS[field.name] else f"{value:g}"
    if len(request.loras) > LORA_ROWS:
        raise UserError("loras", len(request.loras), f"at most {LORA_ROWS} in the form")
    for (path, strength), choice in zip(LORA_FIELDS, request.loras, strict=False):
        values[path.name], values[strength.name] = choice.path, f"{choice.strength:g}"
    if request.expanded_prompt:
        values["expand"] = True
    values["seed"] = "" if request.seed is None else str(request.seed)
    values["size"] = size_name(preset, values["width"], values["height"])
    if values["image"] and not Path(values["image"]).is_file():
        values["image"] = None
    return values


def problem_text(error: UserError) -> str:
    """One line for the person: the field's label, what was given, what is allowed."""
    label = BY_NAME[error.field].label if error.field in BY_NAME else error.field.replace("_", " ")
    if error.given is None or error.given == "" or not str(error.given).strip():
        return f"{label}: {error.allowed}."
    shown = str(error.given)
    shown = shown if len(shown) <= 80 else f"{shown[:79]}…"
    return f"{label}: got “{shown}”; {error.allowed}."

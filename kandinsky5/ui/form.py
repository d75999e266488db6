"""One table of fields: from it the form is built, filled from a request, and read back into one."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.component_meta import ComponentMeta
from PIL import Image, UnidentifiedImageError

from kandinsky5.errors import UserError
from kandinsky5.presets import MODES, PRESETS
from kandinsky5.request import MAX_SEED, RANGES, GenerationRequest, settle
from kandinsky5.ui.choices import preset_values, size_choices, size_name


@dataclass(frozen=True)
class Field:
    """One control of the form.

    Attributes:
        name: of the request's field; ``mode`` and ``size`` only steer other controls.
        label: as shown.
        kind: ``choice``, ``switch``, ``tick``, ``text``, ``number``, ``seed``, ``budget``, ``picture``,
            ``file`` or ``folder``.
        options: (label, value) of a choice that is always the same.
        info: one line under the label.
        placeholder: shown while empty.
        lines: height of a text in lines.
        modes: modes in which it is shown.
        default: value at the start when no preset decides it.
        least_px: width below which it takes a line of its own.
    """

    name: str
    label: str
    kind: str
    options: tuple[tuple[str, str], ...] = ()
    info: str | None = None
    placeholder: str | None = None
    lines: int = 1
    modes: tuple[str, ...] = tuple(MODES)
    default: Any = None
    least_px: int = 84

    @property
    def elem_id(self) -> str:
        return f"k1-f-{self.name}"

    @property
    def is_setting(self) -> bool:
        """Whether its value goes into the request as it stands."""
        return self.name not in ("mode", "size")


WEIGHT_FORMATS = (
    ("auto", "auto"),
    ("bf16: as published", "bf16"),
    ("int8: half of bf16", "int8"),
    ("fp8: half of bf16", "fp8"),
)
TEXT_WEIGHT_FORMATS = (("auto", "auto"), ("bf16: as published", "bf16"))
"""Without NF4, which the pipeline of this version refuses."""

FIELDS: tuple[Field, ...] = (
    Field("mode", "Mode", "switch", default="t2v"),
    Field("preset", "Preset", "choice", default="demo-t2v"),
    Field(
        "prompt",
        "Prompt",
        "text",
        placeholder="a red circle moves right on a dark background",
        lines=4,
        default="",
    ),
    Field(
        "negative_prompt",
        "Negative prompt",
        "text",
        placeholder="blurry, distorted, text",
        lines=1,
        default="",
    ),
    Field(
        "expand",
        "Expand the prompt",
        "tick",
        info="The text encoder first rewrites it in more detail; the demo's does not write.",
        default=True,
    ),
    Field("image", "Input image", "picture", modes=("i2v", "i2i")),
    Field("size", "Size", "choice", least_px=150),
    Field("width", "Width", "number"),
    Field("height", "Height", "number"),
    Field("seconds", "Seconds", "number", modes=("t2v", "i2v")),
    Field("steps", "Steps", "number"),
    Field("guidance", "Guidance", "number"),
    Field("shift", "Shift", "number"),
    Field("seed", "Seed", "seed", placeholder="random", default=""),
    Field(
        "dit",
        "DiT checkpoint",
        "file",
        placeholder="~/models/kandinsky5lite_t2v_sft_5s.safetensors",
        default="",
    ),
    Field(
        "model_dir",
        "Model folder",
        "folder",
        placeholder="folder with transformer, vae and text encoders",
        default="",
    ),
    Field("weights", "Weights format", "choice", WEIGHT_FORMATS, default="auto", least_px=150),
    Field(
        "text_weights",
        "Text encoder format",
        "choice",
        TEXT_WEIGHT_FORMATS,
        default="auto",
        least_px=150,
    ),
    Field(
        "vram", "VRAM budget, GB", "budget", placeholder="what is free", default="", least_px=150
    ),
    Field("ram", "RAM budget, GB", "budget", placeholder="what is free", default="", least_px=150),
)
BY_NAME = {field.name: field for field in FIELDS}


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


def component(
    field: Field, presets: Callable[[str], list[tuple[str, str]]]
) -> gr.components.Component:
    """The control of a field, holding the values of the first preset.

    Args:
        presets: choices of presets (label, name) for a mode.
    """
    first = PRESETS[BY_NAME["preset"].default]
    value = {**_fixed_defaults(), **preset_values(first)}[field.name]
    common: dict[str, Any] = {
        "label": field.label,
        "info": field.info,
        "elem_id": field.elem_id,
        "elem_classes": ["k1-field"],
        "visible": first.mode in field.modes,
        "interactive": True,
    }
    if field.kind == "switch":
        modes = [(title, mode) for mode, title in MODES.items()]
        return gr.Radio(modes, value=value, **common)
    if field.kind == "tick":
        return gr.Checkbox(value=value, **common)
    if field.kind == "choice":
        options: list[Any] = list(field.options)
        if not options:
            options = presets(first.mode) if field.name == "preset" else size_choices(first)
        return gr.Dropdown(
            options, value=value, min_width=field.least_px, filterable=False, **common
        )
    if field.kind == "number":
        return gr.Number(
            value=value, placeholder=field.placeholder, min_width=field.least_px, **common
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
    return gr.Textbox(
        value=value,
        placeholder=field.placeholder,
        lines=field.lines,
        max_lines=max(field.lines, 12) if field.kind == "text" else 1,
        autofocus=field.name == "prompt",
        **common,
    )


def _fixed_defaults() -> dict[str, Any]:
    return {field.name: field.default for field in FIELDS}


def request_from(values: Mapping[str, Any]) -> GenerationRequest:
    """The request that a filled form stands for.

    Args:
        values: value of each control by its field's name.

    Raises:
        UserError: naming the field that cannot be used.
    """
    given = {name: value for name, value in values.items() if BY_NAME[name].is_setting}
    preset = PRESETS.get(given["preset"])
    if preset is None:
        raise UserError("preset", given["preset"], "one of the list")
    for field in FIELDS:
        if field.kind in ("file", "folder"):
            given[field.name] = existing_path(field, given.get(field.name))
        elif field.kind == "budget":
            given[field.name] = budget_of(field, given.get(field.name))
        elif field.name in given and preset.mode not in field.modes:
            given[field.name] = None
    given["seed"] = seed_of(given.get("seed"))
    request = GenerationRequest(**given)
    settle(request)
    if request.image:
        check_picture(request.image)
    return request


def values_of(request: GenerationRequest) -> dict[str, Any]:
    """Value of each control that stands for this request; the reverse of :func:`request_from`."""
    preset = PRESETS[request.preset]
    values = {**_fixed_defaults(), **preset_values(preset), "mode": preset.mode}
    for field in FIELDS:
        if field.is_setting and (value := getattr(request, field.name)) is not None:
            values[field.name] = f"{value:g}" if field.kind == "budget" else value
    values["seed"] = "" if request.seed is None else str(request.seed)
    values["size"] = size_name(preset, values["width"], values["height"])
    if values["image"] and not Path(values["image"]).is_file():
        values["image"] = None
    return values


def seed_of(text: Any) -> int | None:
    """The seed from its text; empty draws one.

    A text because a browser's numbers lose digits above 2⁵³.
    """
    written = str(text or "").strip()
    if not written:
        return None
    if not written.isdecimal() or int(written) > MAX_SEED:
        raise UserError(
            "seed", written, f"a whole number from 0 to {MAX_SEED}, or nothing for a random one"
        )
    return int(written)


def budget_of(field: Field, text: Any) -> float | None:
    """Gigabytes from their text, with or without the unit; None when empty: what is free.

    A text because an empty number of gradio's becomes 0 when its part of the page is opened.
    """
    written = str("" if text is None else text).strip()
    if not written:
        return None
    try:
        return float(written.lower().removesuffix("gb").strip().replace(",", "."))
    except ValueError as error:
        low, high = RANGES[field.name]
        allowed = f"a number of GB from {low:g} to {high:g}, or nothing for what is free"
        raise UserError(field.name, written, allowed) from error


def existing_path(field: Field, text: Any) -> str | None:
    """The path a person typed, without quotes and with ``~`` expanded; None when empty.

    Raises:
        UserError: nothing is there, or not what the field asks for.
    """
    written = str(text or "").strip().strip("'\"").strip()
    if not written:
        return None
    try:
        path = Path(written).expanduser()
        fits = path.is_file() if field.kind == "file" else path.is_dir()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            field.name, written, f"the path of a {field.kind} on this machine"
        ) from error
    if not exists:
        raise UserError(field.name, written, f"nothing is there; give the path of a {field.kind}")
    if not fits:
        raise UserError(field.name, written, f"that is not a {field.kind}")
    return str(path)


def check_picture(path: str) -> None:
    """Refuse a file that is not a picture.

    Raises:
        UserError: for the field ``image``.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
    except (
        UnidentifiedImageError,
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:
        raise UserError(
            "image", Path(path).name, "not a readable image; use PNG, JPEG or WebP"
        ) from error


def problem_text(error: UserError) -> str:
    """One line for the person: the field's label, what was given, what is allowed."""
    label = BY_NAME[error.field].label if error.field in BY_NAME else error.field.replace("_", " ")
    if error.given is None or error.given == "" or not str(error.given).strip():
        return f"{label}: {error.allowed}."
    shown = str(error.given)
    shown = shown if len(shown) <= 80 else f"{shown[:79]}…"
    return f"{label}: got “{shown}”; {error.allowed}."

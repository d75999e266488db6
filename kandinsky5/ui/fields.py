"""The table of the form's fields: all that the page can ask for stands here once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kandinsky5.presets import MODES, PRESETS, NablaSettings, Preset

VIDEO_MODES = ("t2v", "i2v")
IMAGE_MODES = ("i2v", "i2i")
UNASKED = ("mode", "size", "scale", "count", "per_line", "images")
"""Fields that no request has: what they say becomes other values, or several requests."""
LORA_ROWS = 6
"""LoRAs that the form can hold; the next row shows once the one before it is filled."""


@dataclass(frozen=True)
class Field:
    """One control of the form.

    Attributes:
        name: of the request's field; those of :data:`UNASKED` steer other controls or make several jobs of
            one form, and the rows of LoRAs make up ``loras`` together.
        label: as shown.
        kind: ``choice``, ``switch`` (a choice as buttons), ``tick``, ``text``, ``number``, ``slider``,
            ``seed``, ``amount`` (a number as text, empty for the request's default), ``picture``,
            ``pictures``, ``file``, ``folder``, ``lora`` or ``strength``.
        options: (label, value) of a choice that is always the same.
        info: one line under the label.
        placeholder: shown while empty.
        unit: that may stand behind an amount.
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
    unit: str = ""
    lines: int = 1
    modes: tuple[str, ...] = tuple(MODES)
    default: Any = None
    least_px: int = 84

    @property
    def elem_id(self) -> str:
        return f"k1-f-{self.name}"

    @property
    def is_setting(self) -> bool:
        """Whether its value goes into the request under its own name."""
        return self.name not in UNASKED and self.kind not in ("lora", "strength")

    @property
    def request_field(self) -> str:
        """Name of the request's field that it belongs to."""
        return "loras" if self.kind in ("lora", "strength") else self.name


def _amount(name: str, label: str, placeholder: str, **more: Any) -> Field:
    values: dict[str, Any] = {"default": "", "least_px": 110, **more}
    return Field(name, label, "amount", placeholder=placeholder, **values)


def _choice(
    name: str, label: str, *options: tuple[str, str], modes: tuple[str, ...] = tuple(MODES)
) -> Field:
    first = options[0][1]
    return Field(name, label, "choice", options, default=first, least_px=150, modes=modes)


def _lora_row(number: int) -> tuple[Field, Field]:
    return (
        Field(
            f"lora_{number}",
            f"LoRA {number}" if number > 1 else "LoRA",
            "lora",
            placeholder="~/models/loras/style.safetensors",
            default="",
            least_px=180,
        ),
        Field(f"lora_{number}_strength", "Strength", "strength", default="1", least_px=76),
    )


LORA_FIELDS = tuple(_lora_row(number) for number in range(1, LORA_ROWS + 1))
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
    Field("expand", "Expand the prompt", "tick", default=True),
    Field(
        "expanded_prompt",
        "Expanded prompt",
        "text",
        placeholder="Empty: the text encoder writes it when the job runs.",
        lines=3,
        default="",
    ),
    Field("image", "Input image", "picture", modes=IMAGE_MODES),
    Field(
        "negative_prompt",
        "Negative prompt",
        "text",
        placeholder="blurry, distorted, text",
        default="",
        least_px=220,
    ),
    Field(
        "clip_prompt",
        "CLIP prompt",
        "text",
        placeholder="empty: the prompt",
        default="",
        least_px=220,
    ),
    Field("size", "Size", "switch"),
    Field("width", "Width", "number"),
    Field("height", "Height", "number"),
    Field("scale", "Scale, %", "slider", default=100, least_px=200),
    Field("seconds", "Seconds", "number", modes=VIDEO_MODES),
    Field("steps", "Steps", "number"),
    Field("guidance", "Guidance", "number"),
    Field("shift", "Shift", "number"),
    Field("seed", "Seed", "seed", placeholder="random", default="", least_px=130),
    Field("count", "Jobs, each with the next seed", "number", default=1, least_px=150),
    Field("per_line", "One job per line of the prompt", "tick", default=False, least_px=150),
    Field("images", "More images, one job each", "pictures", modes=IMAGE_MODES),
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
    *(field for row in LORA_FIELDS for field in row),
    _choice(
        "weights",
        "Weights format",
        ("auto", "auto"),
        ("bf16: as published", "bf16"),
        ("int8: half of bf16", "int8"),
        ("fp8: half of bf16", "fp8"),
    ),
    _choice(
        "text_weights",
        "Text encoder format",
        ("auto", "auto"),
        ("bf16: as published", "bf16"),
        ("nf4: a quarter of bf16", "nf4"),
    ),
    _choice(
        "dtype",
        "Computed in",
        ("auto", "auto"),
        ("bf16", "bf16"),
        ("fp32: slow, exact", "fp32"),
    ),
    _amount("vram", "VRAM budget, GB", "what is free", unit="gb", least_px=150),
    _amount("ram", "RAM budget, GB", "what is free", unit="gb", least_px=150),
    _choice(
        "attention",
        "Attention",
        ("auto", "auto"),
        ("PyTorch (sdpa)", "sdpa"),
        ("FlashAttention 2", "flash2"),
        ("FlashAttention 3", "flash3"),
        ("SageAttention 2", "sage"),
        ("NABLA: sparse", "nabla"),
    ),
    _choice("cache", "Step cache", ("none", "none"), ("MagCache", "magcache")),
    _choice(
        "vae_tiling",
        "VAE decoding",
        ("auto", "auto"),
        ("frame by frame", "rolling"),
        ("all at once: much memory", "whole"),
        ("published tiles", "published"),
        modes=VIDEO_MODES,
    ),
    _amount("vae_tile", "VAE tile, px", "by memory", least_px=150),
    _amount("nabla_p", "NABLA P", "0.9"),
    _amount("nabla_wt", "Window, time", "11"),
    _amount("nabla_wh", "Window, height", "3"),
    _amount("nabla_ww", "Window, width", "3"),
    _amount("cache_threshold", "MagCache threshold", "0.12", least_px=150),
    _amount("cache_retention", "MagCache retention", "0.2", least_px=150),
    _amount("guidance_start", "Guidance from", "0: the first step", least_px=110),
    _amount("guidance_end", "Guidance until", "1: the last step", least_px=110),
    _amount("crf", "Video CRF", "16", modes=VIDEO_MODES),
    _choice(
        "source",
        "Blocks",
        ("auto", "auto"),
        ("all on the card", "resident"),
        ("streamed from RAM", "pinned"),
        ("streamed from disk", "disk"),
    ),
    _amount("resident_blocks", "Stay on the card", "by memory"),
    _amount("slots", "Buffers", "2"),
    _amount("chunk_tokens", "Tokens at once", "by memory"),
    _amount("chunk_heads", "Heads at once", "by memory"),
    Field("preview", "Live preview", "tick", default=True, least_px=150),
)
BY_NAME = {field.name: field for field in FIELDS}


def fixed_defaults() -> dict[str, Any]:
    """Value of each control at the start, as far as no preset decides it."""
    return {field.name: field.default for field in FIELDS}


def is_shown(field: Field, preset: Preset, values: Mapping[str, Any]) -> bool:
    """Whether a control takes part, given those it depends on.

    Args:
        values: of ``attention``, ``cache``, ``expand`` and the LoRAs; what is missing counts as its default.
    """

    def given(name: str) -> Any:
        return values.get(name, BY_NAME[name].default)

    if preset.mode not in field.modes:
        return False
    if field.name.startswith("nabla_"):
        own = given("attention") == "auto" and preset.nabla is not None
        return own or given("attention") == "nabla"
    if field.name.startswith("cache_"):
        return bool(given("cache") == "magcache")
    if field.name == "expanded_prompt":
        return bool(given("expand")) and not preset.is_builtin  # the demo's encoder does not write
    return True


def shown_lora_rows(values: Mapping[str, Any]) -> int:
    """How many rows of LoRAs are shown: all up to the last filled one, and one to fill."""
    filled = [
        number
        for number, (path, _) in enumerate(LORA_FIELDS, start=1)
        if str(values.get(path.name) or "").strip()
    ]
    return min(LORA_ROWS, (filled[-1] if filled else 0) + 1)


def placeholder_of(field: Field, preset: Preset) -> str | None:
    """What an empty control comes to with this preset."""
    nabla = preset.nabla or NablaSettings()
    own = {"nabla_p": nabla.P, "nabla_wt": nabla.wT, "nabla_wh": nabla.wH, "nabla_ww": nabla.wW}
    return f"{own[field.name]:g}" if field.name in own else field.placeholder


STEERING = ("preset", "attention", "cache", "expand")
"""Fields on which it depends whether others are shown."""
FIRST_PRESET = PRESETS[BY_NAME["preset"].default]

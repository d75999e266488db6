"""One request for a picture or a video: the same object for page, command line, queue and file metadata.

A :class:`GenerationRequest` is validated when it is made; :func:`settle` fills in what its preset decides
and snaps sizes to what the model can do, telling what it changed. Only the standard library is needed.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kandinsky5.errors import UserError
from kandinsky5.presets import (
    FRAMES_PER_SECOND,
    MAX_SIDE_PX,
    MAX_VIDEO_S,
    PRESETS,
    SPATIAL_COMPRESSION,
    TEMPORAL_COMPRESSION,
    Preset,
)

REQUEST_VERSION = 1
MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_PROMPT_CHARACTERS = 100_000
LATENT_FRAMES_PER_SECOND = FRAMES_PER_SECOND // TEMPORAL_COMPRESSION

CHOICES: dict[str, tuple[str, ...]] = {
    "weights": ("auto", "bf16", "int8", "fp8"),
    "text_weights": ("auto", "bf16", "nf4"),
    "attention": ("auto", "sdpa", "flash2", "flash3", "sage", "nabla"),
    "cache": ("none", "magcache"),
    "dtype": ("auto", "bf16", "fp32"),
}
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, MAX_SEED),
    "width": (64, MAX_SIDE_PX),
    "height": (64, MAX_SIDE_PX),
    "seconds": (1 / LATENT_FRAMES_PER_SECOND, MAX_VIDEO_S),
    "steps": (1, MAX_STEPS),
    "guidance": (1.0, 30.0),
    "shift": (0.1, 100.0),
    "vram": (0.5, 1024.0),
    "ram": (0.5, 4096.0),
    "crf": (0, 51),
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


@dataclass(frozen=True)
class GenerationRequest:
    """Everything that decides a result. ``None`` leaves a choice to the preset or to the program.

    Attributes:
        preset: a name of :data:`kandinsky5.presets.PRESETS`.
        prompt: what to make; not empty.
        negative_prompt: what to keep away from; used when guidance is not 1.
        clip_prompt: a prompt of its own for CLIP, or None to use ``prompt``.
        image: path of the input picture, for modes that take one.
        seed: 0 … 2⁶³−1; None draws one.
        width, height: pixels, 64 … 2048.
        seconds: length of a video, 1/6 … 21.
        steps: steps of the schedule, 1 … 1000.
        guidance: classifier-free guidance, 1 (off) … 30.
        shift: schedule shift, 0.1 … 100.
        dit: path of the user's own transformer checkpoint.
        model_dir: folder that holds the whole model in either published layout.
        weights, text_weights, attention, cache, dtype: one of :data:`CHOICES`.
        vram, ram: memory budgets in GB.
        loras: adapters with their strengths.
        expand: let the text encoder rewrite the prompt first.
        init_latents: file with the starting noise instead of the seed's.
        save_latents: file for the final latents.
        out: file for the result.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        crf: quality of H.264, 0 (lossless) … 51.

    Raises:
        UserError: naming the first field that cannot be used and what is allowed.
    """

    preset: str = "demo-t2v"
    prompt: str = ""
    negative_prompt: str = ""
    clip_prompt: str | None = None
    image: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    seconds: float | None = None
    steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    dit: str | None = None
    model_dir: str | None = None
    weights: str = "auto"
    text_weights: str = "auto"
    vram: float | None = None
    ram: float | None = None
    attention: str = "auto"
    cache: str = "none"
    loras: tuple[LoraChoice, ...] = field(default=())
    expand: bool = True
    init_latents: str | None = None
    save_latents: str | None = None
    out: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    crf: int = 16

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = _typed(item.name, getattr(self, item.name))
            object.__setattr__(self, item.name, value)
        if self.preset not in PRESETS:
            raise UserError("preset", self.preset, f"one of {', '.join(PRESETS)}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(name, getattr(self, name), f"one of {', '.join(allowed)}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(name, value, _range_text(name))
        if not self.prompt.strip():
            raise UserError("prompt", self.prompt, "describe what should be made")
        for name in ("prompt", "negative_prompt", "clip_prompt"):
            text = getattr(self, name) or ""
            if "\0" in text:
                raise UserError(name, text, "text without NUL characters")
            if len(text) > MAX_PROMPT_CHARACTERS:
                raise UserError(name, text, f"at most {MAX_PROMPT_CHARACTERS} characters")
        kind, _, index = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (
            index and (kind != "cuda" or not index.isdigit())
        ):
            raise UserError("device", self.device, "one of auto, cpu, cuda, cuda:0, cuda:1, …")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary of all fields, with the version of the format."""
        return {"version": REQUEST_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationRequest:
        """Read what :meth:`to_dict` wrote; missing fields take their defaults.

        Raises:
            UserError: unknown fields (each named), a newer version, or a value that cannot be used.
        """
        if not isinstance(values, Mapping):
            raise UserError("request", values, "a JSON object")
        version = values.get("version", REQUEST_VERSION)
        if not isinstance(version, int) or not 1 <= version <= REQUEST_VERSION:
            raise UserError("version", version, f"version {REQUEST_VERSION} or older; update K1")
        given = {key: value for key, value in values.items() if key != "version"}
        known = {item.name for item in dataclasses.fields(cls)}
        if unknown := [key for key in given if key not in known]:
            raise UserError(
                "request", unknown, f"unknown keys; the known ones are {', '.join(known)}"
            )
        return cls(**given)


def _typed(name: str, value: Any) -> Any:
    """The value in its field's type, or a UserError; whole floats pass as integers, NaN passes nowhere."""
    if name == "loras":
        return _loras(value)
    kinds = _field_kinds()[name]
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


def _field_kinds() -> dict[str, tuple[type, ...]]:
    if not _KINDS:
        for name, hint in typing.get_type_hints(GenerationRequest).items():
            union = isinstance(hint, types.UnionType)
            _KINDS[name] = typing.get_args(hint) if union else (hint,)
    return _KINDS


_KINDS: dict[str, tuple[type, ...]] = {}


def frames_of(seconds: float) -> int:
    """Pixel frames of a video: 4·(6·seconds)+1 at 24 frames a second; 1 for a picture."""
    return TEMPORAL_COMPRESSION * (latent_frames_of(seconds) - 1) + 1


def latent_frames_of(seconds: float) -> int:
    """Latent frames of a video of that length: 6·seconds+1."""
    return round(seconds * LATENT_FRAMES_PER_SECOND) + 1


def latent_shape(request: GenerationRequest) -> tuple[int, int, int]:
    """(frames, height, width) of the latent of a settled request."""
    assert request.height and request.width
    return (
        latent_frames_of(request.seconds or 0.0),
        request.height // SPATIAL_COMPRESSION,
        request.width // SPATIAL_COMPRESSION,
    )


def settle(request: GenerationRequest) -> tuple[GenerationRequest, tuple[str, ...]]:
    """Fill in what the preset decides and snap sizes; the seed stays None if it was.

    Returns:
        The request with width, height, seconds (of a video), steps, guidance and shift set, and a notice for
        each value that had to be changed. When an input image is given and no size, the size stays None: it
        follows from the image.

    Raises:
        UserError: an image is missing, or given where none is used.
    """
    preset = PRESETS[request.preset]
    if preset.takes_image and not request.image:
        raise UserError("image", request.image, f"{preset.name} needs an input image")
    if request.image and not preset.takes_image:
        raise UserError(
            "image", request.image, f"{preset.name} takes no image; use an i2v or i2i preset"
        )
    notices: list[str] = []
    changes: dict[str, Any] = {
        "seconds": _settled_seconds(request, preset, notices),
        "steps": request.steps or preset.steps,
        "guidance": preset.guidance if request.guidance is None else request.guidance,
        "shift": preset.shift if request.shift is None else request.shift,
    }
    if request.width or request.height or not request.image:
        default_width, default_height = preset.sizes_px[0]
        changes["width"] = _snapped(
            "width", request.width or default_width, preset.multiple_px, notices
        )
        changes["height"] = _snapped(
            "height", request.height or default_height, preset.multiple_px, notices
        )
    return dataclasses.replace(request, **changes), tuple(notices)


def _settled_seconds(
    request: GenerationRequest, preset: Preset, notices: list[str]
) -> float | None:
    if not preset.is_video:
        return None
    wanted = preset.seconds if request.seconds is None else request.seconds
    seconds = (latent_frames_of(wanted) - 1) / LATENT_FRAMES_PER_SECOND
    seconds = max(seconds, 1 / LATENT_FRAMES_PER_SECOND)
    if abs(seconds - wanted) > 1e-6:
        notices.append(f"seconds set to {seconds:.3f}: lengths come in sixths of a second")
    return seconds


def _snapped(name: str, value: int, multiple: int, notices: list[str]) -> int:
    low = -(-64 // multiple) * multiple
    snapped = max(low, round(value / multiple) * multiple)
    if snapped != value:
        notices.append(f"{name} {value} set to {snapped}: sides are multiples of {multiple}")
    return snapped


@dataclass(frozen=True)
class GenerationResult:
    """What a finished job made and what it took.

    Attributes:
        output: path of the file.
        frames, width, height: of the result, in frames and pixels.
        seed: the seed used, also when none was given.
        steps_run: steps of the schedule.
        evaluations_run, evaluations_skipped: of the transformer; a guided step has two.
        seconds: wall time of each stage, plus "total".
        peak_vram_bytes, peak_rss_bytes: most device and main memory in use.
        h2d_bytes, d2h_bytes: copied to and from the device in the denoise stage.
        notices: what the user should know.
    """

    output: str
    frames: int
    width: int
    height: int
    seed: int
    steps_run: int
    evaluations_run: int
    evaluations_skipped: int
    seconds: dict[str, float]
    peak_vram_bytes: int
    peak_rss_bytes: int
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    notices: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

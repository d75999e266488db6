"""One request for a picture or a video: the same object for page, command line, queue and file metadata.

A :class:`GenerationRequest` is validated when it is made; :func:`settle` fills in what its preset decides
and snaps sizes to what the model can do, telling what it changed. Only the standard library is needed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kandinsky5.errors import UserError
from kandinsky5.presets import (
    NABLA_MULTIPLE_PX,
    PRESETS,
    SPATIAL_COMPRESSION,
    TEMPORAL_COMPRESSION,
    NablaSettings,
    Preset,
)
from kandinsky5.request_values import (
    CHOICES,
    LATENT_FRAMES_PER_SECOND,
    MAX_PROMPT_CHARACTERS,
    MAX_SEED,
    MAX_STEPS,
    RANGES,
    LoraChoice,
    checked,
)

__all__ = [
    "CHOICES",
    "LATENT_FRAMES_PER_SECOND",
    "MAX_PROMPT_CHARACTERS",
    "MAX_SEED",
    "MAX_STEPS",
    "RANGES",
    "REQUEST_VERSION",
    "GenerationRequest",
    "GenerationResult",
    "LoraChoice",
    "frames_of",
    "latent_frames_of",
    "latent_shape",
    "multiple_px_of",
    "nabla_of",
    "settle",
]

REQUEST_VERSION = 1
MAX_NAMED_KEYS = 100


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
        guidance_start, guidance_end: the part of the schedule that is guided, as shares of its steps, 0 … 1;
            the steps outside have one evaluation.
        dit: path of the user's own transformer checkpoint.
        model_dir: folder that holds the whole model in either published layout.
        weights, text_weights, attention, cache, dtype: one of :data:`CHOICES`.
        nabla_p: share of each row's block probability that NABLA attention keeps, 0.01 … 1 (all).
        nabla_wt, nabla_wh, nabla_ww: its window in latent frames, and in tiles of 128 pixels.
        cache_threshold: how much deviation a step cache lets add up, 0 (none) … 10.
        cache_retention: share of the steps, from the first on, in which nothing is cached, 0 … 1.
        vram, ram: memory budgets in GB.
        loras: adapters with their strengths.
        expand: let the text encoder rewrite the prompt first.
        expanded_prompt: a prompt that is rewritten already: encoded in the place of ``prompt``; nothing is
            expanded then.
        init_latents: file with the starting noise instead of the seed's.
        save_latents: file for the final latents.
        out: file for the result.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        crf: quality of H.264, 0 (lossless) … 51.
        vae_tiling: how the VAE decodes a video, one of :data:`CHOICES`: frame by frame (``rolling``), all
            frames at once (``whole``: exact, much memory) or in the published tiles of 17 frames.
        vae_tile: side of its tiles in pixels, 64 … 2048 in steps of 16; sides no longer are not cut.
        source: where the transformer's blocks are while it denoises, of :data:`CHOICES`: on the device, in
            page-locked main memory, or in the file. As with the four below, ``auto`` or None is the plan's
            business.
        resident_blocks: how many of them stay on the device all the same, 0 … all.
        slots: buffers on the device for the others, 2 or more.
        chunk_tokens, chunk_heads: how many tokens and heads of a block are computed at once.
        preview: show the unfinished video while it is painted, where somebody looks.

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
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    dit: str | None = None
    model_dir: str | None = None
    weights: str = "auto"
    text_weights: str = "auto"
    vram: float | None = None
    ram: float | None = None
    attention: str = "auto"
    nabla_p: float | None = None
    nabla_wt: int | None = None
    nabla_wh: int | None = None
    nabla_ww: int | None = None
    cache: str = "none"
    cache_threshold: float = 0.12
    cache_retention: float = 0.2
    loras: tuple[LoraChoice, ...] = field(default=())
    expand: bool = True
    expanded_prompt: str | None = None
    init_latents: str | None = None
    save_latents: str | None = None
    out: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    crf: int = 16
    vae_tiling: str = "auto"
    vae_tile: int | None = None
    source: str = "auto"
    resident_blocks: int | None = None
    slots: int | None = None
    chunk_tokens: int | None = None
    chunk_heads: int | None = None
    preview: bool = True

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = checked(item.name, getattr(self, item.name), _kinds()[item.name])
            object.__setattr__(self, item.name, value)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary of all fields, with the version of the format."""
        return {"version": REQUEST_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationRequest:
        """Read what :meth:`to_dict` wrote; missing fields take their defaults.

        Raises:
            UserError: unknown keys, a newer version, or values that cannot be used. One wrong value is told
                as its own field's error; several, and unknown keys, as one of field ``request`` that names
                each of them.
        """
        if not isinstance(values, Mapping):
            raise UserError("request", values, "a JSON object")
        problems = [_problem_of_version(values.get("version", REQUEST_VERSION))]
        for item in dataclasses.fields(cls):
            problems.append(_problem_of(item.name, values.get(item.name, item.default)))
        known = ["version", *(item.name for item in dataclasses.fields(cls))]
        unknown = [str(key) for key in values if key not in known]
        if error := _joined([problem for problem in problems if problem], unknown, values):
            raise error
        return cls(**{key: value for key, value in values.items() if key != "version"})


@functools.cache
def _kinds() -> dict[str, tuple[type, ...]]:
    """Types with which each field is declared."""
    hints = typing.get_type_hints(GenerationRequest).items()
    return {
        name: typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for name, hint in hints
    }


def _problem_of(name: str, value: Any) -> UserError | None:
    try:
        checked(name, value, _kinds()[name])
    except UserError as error:
        return error
    return None


def _problem_of_version(version: Any) -> UserError | None:
    whole = isinstance(version, int) and not isinstance(version, bool)
    if whole and 1 <= version <= REQUEST_VERSION:
        return None
    return UserError("version", version, f"version {REQUEST_VERSION} or older; update K1")


def _joined(
    problems: Sequence[UserError], unknown: Sequence[str], values: Mapping[str, Any]
) -> UserError | None:
    """One error for all that is wrong with a request's values: None, the only one, or their list."""
    if not unknown and len(problems) < 2:
        return problems[0] if problems else None
    wrong = {*(problem.field for problem in problems), *unknown}
    given = {key: value for key, value in values.items() if str(key) in wrong}
    parts = [f"{problem.field}: {problem.allowed}" for problem in problems]
    if unknown:
        named = [repr(key if len(key) <= 40 else f"{key[:39]}…") for key in unknown]
        named, more = named[:MAX_NAMED_KEYS], len(named[MAX_NAMED_KEYS:])
        known = ", ".join(item.name for item in dataclasses.fields(GenerationRequest))
        parts.append(
            f"unknown keys: {', '.join(named)}{f' and {more} more' if more else ''}"
            f" (the known ones are {known})"
        )
    return UserError("request", given, "; ".join(parts))


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


def nabla_of(request: GenerationRequest) -> NablaSettings | None:
    """NABLA attention as the request has it, from its preset and its own settings; None is full attention."""
    preset = PRESETS[request.preset]
    if request.attention != "nabla" and (request.attention != "auto" or preset.nabla is None):
        return None
    given = {
        "P": request.nabla_p,
        "wT": request.nabla_wt,
        "wH": request.nabla_wh,
        "wW": request.nabla_ww,
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(preset.nabla or NablaSettings(), **chosen)


def multiple_px_of(request: GenerationRequest) -> int:
    """Both sides of the result are multiples of this: what the preset asks for, or NABLA's 128."""
    multiple = PRESETS[request.preset].multiple_px
    return multiple if nabla_of(request) is None else math.lcm(multiple, NABLA_MULTIPLE_PX)


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
        multiple = multiple_px_of(request)
        changes["width"] = _snapped("width", request.width or default_width, multiple, notices)
        changes["height"] = _snapped("height", request.height or default_height, multiple, notices)
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
        stage_peaks: stage → {vram_bytes, rss_bytes, h2d_bytes, d2h_bytes, stall_s}.
        notices: what the user should know.
        expanded_prompt: the prompt as the text encoder rewrote it; None where it did not.
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
    stage_peaks: dict[str, dict[str, float]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    expanded_prompt: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

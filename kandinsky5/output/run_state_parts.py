"""A run that is not finished, as a value: everything that decides how it goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kandinsky5.errors import UserError
from kandinsky5.request import MAX_STEPS, GenerationRequest, latent_shape

CACHE_PREFIX = "cache."
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""Of tensors that a state may hold: the name in a safetensors file, and back."""


@dataclass(frozen=True)
class SavedText:
    """A prompt's conditioning: text [L, D] and pooled [P], both float32."""

    text: torch.Tensor
    pooled: torch.Tensor


@dataclass(frozen=True)
class RunState:
    """A run after ``step`` of its steps.

    Attributes:
        request: settled, with its seed, width and height.
        step: steps done, 0 … total.
        times: of the schedule, float32 [total+1], falling from 1 or less to 0.
        latent: x at ``times[step]``, float32 [T, H, W, C], finite.
        positive, negative: conditionings; negative is None just when the guidance is 1.
        first_frame: [1, H, W, C] float32 of a video that begins with a given picture.
        checkpoints: part of the model ("transformer", "vae", …) → SHA-256 of its header.
        cache_tensors, cache_values: what the step cache carries along; the values are JSON.
        facts: JSON that the result is to tell or that the machine settled: dtype, seconds of each stage,
            evaluations, the expanded prompt.
        saved_at: unix seconds; k1_version: of the program that saved. Both are set when saving.

    Raises:
        ValueError: the parts do not fit together; one line says which.
    """

    request: GenerationRequest
    step: int
    times: torch.Tensor
    latent: torch.Tensor
    positive: SavedText
    negative: SavedText | None = None
    first_frame: torch.Tensor | None = None
    checkpoints: Mapping[str, str | None] = field(default_factory=dict)
    cache_tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    cache_values: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    saved_at: float = 0.0
    k1_version: str = ""

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise ValueError(problem)

    @property
    def total(self) -> int:
        """Steps of the schedule."""
        return len(self.times) - 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by their names in the file; those of the step cache begin with ``cache.``."""
        named = {
            "latent": self.latent,
            "times": self.times,
            "positive.text": self.positive.text,
            "positive.pooled": self.positive.pooled,
        }
        if self.negative is not None:
            named["negative.text"] = self.negative.text
            named["negative.pooled"] = self.negative.pooled
        if self.first_frame is not None:
            named["first_frame"] = self.first_frame
        cache = {CACHE_PREFIX + name: tensor for name, tensor in self.cache_tensors.items()}
        return {**named, **cache}

    def written_to(self, save_latents: str | Path | None) -> RunState:
        """The same run with files only where the caller has them, not where its request does."""
        latents = None if save_latents is None else str(save_latents)
        request = replace(self.request, out=None, save_latents=latents)
        return replace(self, request=request)

    def computed_in(self, otherwise: Mapping[str, str]) -> RunState:
        """The same run, to be gone on with in another way.

        Args:
            otherwise: ``attention``, ``weights`` or ``dtype``, as a request has them.

        Raises:
            UserError: a value that a request does not take.
        """
        request = GenerationRequest.from_dict({**self.request.to_dict(), **otherwise})
        facts = {name: fact for name, fact in self.facts.items() if name not in otherwise}
        settings = facts.get("settings")
        if isinstance(settings, dict):
            facts["settings"] = {n: value for n, value in settings.items() if n not in otherwise}
        return replace(self, request=request, facts=facts)

    def check_checkpoints(self, found: Mapping[str, str | None]) -> None:
        """Refuse to go on with other weights than the run began with.

        Args:
            found: as :attr:`checkpoints`, of the files at hand; parts that only one side names pass.

        Raises:
            UserError: naming the first part that differs.
        """
        for part, digest in self.checkpoints.items():
            if part in found and found[part] != digest:
                raise UserError(
                    part,
                    (found[part] or "no header")[:12],
                    f"the run began with another file ({(digest or 'no header')[:12]}): "
                    "give that one, or start anew",
                )


def _problems(state: RunState) -> Iterator[str]:
    request, latent, times = state.request, state.latent, state.times
    if request.seed is None or not request.width or not request.height:
        yield "its request has no seed or no size"
    if latent.ndim != 4 or latent.dtype != torch.float32 or not latent.numel():
        yield f"its latent is {latent.dtype} {list(latent.shape)}, not float32 [T, H, W, C]"
    if tuple(latent.shape[:3]) != latent_shape(request):
        wanted = list(latent_shape(request))
        yield f"its latent is {list(latent.shape[:3])} where its request means {wanted}"
    yield from _problems_of_times(times, state.step, request.steps)
    yield from _problems_of_text(state.positive, state.negative)
    guided = request.guidance is not None and abs(request.guidance - 1.0) > 1e-6
    if guided != (state.negative is not None):
        yield f"guidance {request.guidance} does not fit its conditionings"
    first, wanted = state.first_frame, [1, *latent.shape[1:]]
    if first is not None and (list(first.shape) != wanted or first.dtype != torch.float32):
        yield f"its first frame is {first.dtype} {list(first.shape)}, not float32 {wanted}"
    for name, tensor in state.tensors().items():
        if tensor.dtype not in DTYPE_NAMES or tensor.ndim > 8 or not tensor.numel():
            yield f"its tensor {name} is {tensor.dtype} {list(tensor.shape)}"
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            yield f"its tensor {name} holds NaN or infinite values"
    for part, digest in state.checkpoints.items():
        if not isinstance(part, str) or not isinstance(digest, (str, type(None))):
            yield f"its checkpoint {part!r} has no hash as text"


def _problems_of_times(times: torch.Tensor, step: int, steps: int | None) -> Iterator[str]:
    if times.ndim != 1 or times.dtype != torch.float32 or not 2 <= len(times) <= MAX_STEPS + 1:
        yield f"its schedule is {times.dtype} {list(times.shape)}, not float32 [steps+1]"
    total = len(times) - 1
    falling = bool((times[1:] < times[:-1]).all())
    if not falling or not 0 < float(times[0]) <= 1 or float(times[-1]) != 0:
        yield "its schedule does not fall from 1 to 0"
    if type(step) is not int or not 0 <= step <= total:
        yield f"step {step} of a schedule of {total}"
    if steps is not None and steps != total:
        yield f"{steps} steps in its request, {total} in its schedule"


def _problems_of_text(positive: SavedText, negative: SavedText | None) -> Iterator[str]:
    for text in (positive, negative):
        if text is None:
            continue
        shapes = text.text.shape, text.pooled.shape
        if len(shapes[0]) != 2 or len(shapes[1]) != 1 or text.text.dtype != torch.float32:
            yield f"its conditioning is {list(shapes[0])} and {list(shapes[1])}, not [L, D] and [P]"
        alike = (shapes[0][-1:], shapes[1]) == (positive.text.shape[-1:], positive.pooled.shape)
        if not alike:
            yield "its two conditionings have other widths"

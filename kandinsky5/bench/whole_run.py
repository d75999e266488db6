"""Whole jobs through the real pipeline, weights random in the true shapes, under a memory cap (B7, B10).

Files are written, read, streamed and computed with as those of a user; only the picture means nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kandinsky5.bench.random_model import models_of, write_random_model
from kandinsky5.circumstances import circumstances
from kandinsky5.errors import UserError
from kandinsky5.events import PipelineEvent, StageStarted, StepDone
from kandinsky5.memory.budget import DEVICE_RESERVE_BYTES, GB
from kandinsky5.model.text import Conditioning
from kandinsky5.pipeline.embedding_cache import EmbeddingCache, EncodedPrompts
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.presets import PRESETS, Preset
from kandinsky5.request import GenerationRequest, GenerationResult

TEXTS = ("random", "given")
PUBLISHED_S = {
    "pro-t2v-5s-sd": 560,
    "pro-t2v-5s-hd": 1241,
    "pro-t2v-10s-sd": 1158,
    "lite-t2v-5s-sft": 139,
    "lite-t2v-5s-nocfg": 77,
    "lite-t2v-5s-distilled": 35,
    "lite-t2v-10s-sft": 224,
    "lite-t2v-10s-nocfg": 124,
    "lite-t2v-10s-distilled": 61,
    "image-t2i": 13,
}
"""Whole runs on an H100, as kandinskylab's table has them."""
WITH_MAGCACHE = 1.9
"""By how much a run with the cache shall be faster than those."""
CAPPED_PRESET, CAP_LIMIT_GB = "pro-t2v-5s-sd", 8.0
HOPPER = ("H100", "H200")
TOLD_OF_STAGES = ("rss_bytes", "h2d_bytes", "d2h_bytes", "stall_s")


@dataclass(frozen=True)
class Measured:
    """One job.

    Attributes:
        result: as the pipeline gave it.
        allocated_bytes: stage → most device memory in tensors.
        steps: of the loop, as they were told.
    """

    result: GenerationResult
    allocated_bytes: dict[str, int]
    steps: list[StepDone]

    @property
    def step_s(self) -> float:
        """Mean of the steps."""
        return self.steps[-1].seconds_per_step


def whole_run(
    *,
    preset: str = "pro-t2v-5s-sd",
    weights: str = "int8",
    vram: float | None = None,
    ram: float | None = None,
    seconds: float | None = None,
    steps: int | None = None,
    cache: str = "none",
    text: str = "random",
    compare: str | None = None,
    folder: str | None = None,
) -> dict[str, Any]:
    """Write a model of random weights, make what a preset makes with it, and delete it.

    Args:
        preset: whose models and settings; without a GPU only the demo's.
        weights: of the transformer, ``int8`` or ``bf16``.
        vram: GB the job may take: its plan's budget, and the cap under which torch's allocator is put.
        ram: GB of main memory it may take; None for what is free.
        seconds: of video; None for the preset's.
        steps: None for the preset's.
        cache: ``none`` or ``magcache``.
        text: ``random`` text encoders in their true shapes, or ``given`` embeddings in their place, for a
            disk without room for 15 GB more.
        compare: ``resident`` runs the job again without a cap.
        folder: where there is room for the files; None for the system's temporary one.

    Returns:
        JSON-ready: seconds, reserved and allocated bytes of each stage, bytes both ways, ``reached`` for
        those of B7 and B10 that this run can tell of, the circumstances.

    Raises:
        UserError: no CUDA device for this preset, a value that cannot be used, or a disk without room.
        OutOfMemory: the job does not fit under the cap.
    """
    row = _checked(preset, text, compare)
    request = GenerationRequest(
        prompt="a red circle moves right",
        preset=preset,
        seed=1,
        seconds=seconds,
        steps=steps,
        weights=weights,
        vram=vram,
        ram=ram,
        cache=cache,
        expand=False,
    )
    if folder is not None and not Path(folder).is_dir():
        raise UserError("folder", folder, "a folder that exists")
    with tempfile.TemporaryDirectory(dir=folder, prefix="k1-whole-") as name:
        model = Path(name)
        began = time.monotonic()
        file_bytes = write_random_model(model, preset, weights, with_text=text == "random")
        write_s = time.monotonic() - began
        request = replace(request, model_dir=name, image=_picture(model, row))
        embeddings = _Given(row) if text == "given" else None
        with _capped(vram):
            measured = _measured(request, model, embeddings)
        other = None
        if compare is not None:
            other = _measured(replace(request, vram=None), model, embeddings)
    return {
        "benchmark": "whole-run",
        "preset": preset,
        "weights": weights,
        "vram_gb": vram,
        "steps": measured.result.steps_run,
        "cache": cache,
        "text_encoders": _text_in_words(row, text),
        "file_bytes": file_bytes,
        "write_s": round(write_s, 1),
        **_told(measured),
        **({} if other is None else {"resident": _told(other), "ratio": _ratio(measured, other)}),
        "reached": reached(request, measured),
        **circumstances(),
    }


def reached(request: GenerationRequest, measured: Measured) -> dict[str, bool]:
    """The targets that this run can tell of, and whether they are met."""
    met = {}
    name, result = request.preset, measured.result
    if name == CAPPED_PRESET and request.vram is not None and request.vram <= CAP_LIMIT_GB:
        met["B7"] = result.peak_vram_bytes + DEVICE_RESERVE_BYTES <= request.vram * GB
    whole = result.steps_run == PRESETS[name].steps and request.vram is request.seconds is None
    if whole and name in PUBLISHED_S and _is_hopper():
        share = WITH_MAGCACHE if request.cache == "magcache" else 1.0
        met["B10"] = result.seconds["total"] <= PUBLISHED_S[name] / share
    return met


class _Given(EmbeddingCache):
    """Has an answer to every prompt: random numbers of a prompt's greatest length."""

    def __init__(self, preset: Preset) -> None:
        super().__init__(None)
        shape = models_of(preset).transformer
        generator = torch.Generator().manual_seed(2)

        def drawn() -> Conditioning:
            text = torch.randn(preset.text_tokens, shape.text_dim, generator=generator)
            return Conditioning(text, torch.randn(shape.pooled_dim, generator=generator))

        self._drawn = EncodedPrompts(drawn(), None if preset.guidance == 1.0 else drawn())

    def encoded(self, key: str | None) -> EncodedPrompts:
        return self._drawn


@dataclass
class _Listener:
    """Notes the steps, and what each stage had in tensors."""

    allocated_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    steps: list[StepDone] = field(default_factory=list)
    stage: str | None = None

    def __call__(self, event: PipelineEvent) -> None:
        if isinstance(event, StageStarted):  # told before the peaks are forgotten
            self.note()
            self.stage = event.stage
        elif isinstance(event, StepDone):
            self.steps.append(event)

    def note(self) -> None:
        """The stage that has run until now."""
        if self.stage is not None and torch.cuda.is_available():
            now = torch.cuda.max_memory_allocated()
            self.allocated_bytes[self.stage] = max(self.allocated_bytes[self.stage], now)


def _measured(
    request: GenerationRequest, folder: Path, embeddings: EmbeddingCache | None
) -> Measured:
    listener, pipeline = _Listener(), Pipeline(embeddings=embeddings)
    suffix = "mp4" if PRESETS[request.preset].is_video else "png"
    result = pipeline.run(request, out=folder / f"out.{suffix}", emit=listener)
    listener.note()
    pipeline.release()
    return Measured(result, dict(listener.allocated_bytes), listener.steps)


@contextmanager
def _capped(vram: float | None) -> Iterator[None]:
    """Let torch's allocator have no more than a budget leaves it beside the context."""
    if vram is None or not torch.cuda.is_available():
        yield
        return
    total = torch.cuda.get_device_properties(0).total_memory
    share = (vram * GB - DEVICE_RESERVE_BYTES) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), 0)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


def _checked(preset: str, text: str, compare: str | None) -> Preset:
    if preset not in PRESETS:
        raise UserError("preset", preset, f"one of {', '.join(PRESETS)}")
    if text not in TEXTS:
        raise UserError("text", text, f"one of {', '.join(TEXTS)}")
    if compare not in (None, "resident"):
        raise UserError("compare", compare, "resident")
    if not torch.cuda.is_available() and not PRESETS[preset].is_builtin:
        raise UserError("bench", f"whole-run {preset}", "a machine with a CUDA device, or the demo")
    return PRESETS[preset]


def _told(measured: Measured) -> dict[str, Any]:
    result = measured.result
    stages = {
        name: {
            "seconds": seconds,
            "reserved_bytes": result.stage_peaks[name]["vram_bytes"],
            "allocated_bytes": measured.allocated_bytes.get(name, 0),
            **{key: result.stage_peaks[name][key] for key in TOLD_OF_STAGES},
        }
        for name, seconds in result.seconds.items()
        if name in result.stage_peaks
    }
    return {
        "video": f"{result.width}x{result.height}, {result.frames} frames",
        "stages": stages,
        "total_s": result.seconds["total"],
        "step_s": round(measured.step_s, 4),
        "stall_s": round(sum(step.stall_s for step in measured.steps), 4),
        "evaluations_run": result.evaluations_run,
        "evaluations_skipped": result.evaluations_skipped,
        "peak_reserved_bytes": result.peak_vram_bytes,
        "peak_allocated_bytes": max(measured.allocated_bytes.values(), default=0),
        "peak_rss_bytes": result.peak_rss_bytes,
        "h2d_bytes": result.h2d_bytes,
        "d2h_bytes": result.d2h_bytes,
        "notices": list(result.notices),
    }


def _ratio(capped: Measured, resident: Measured) -> float:
    """Of the steps."""
    return round(capped.step_s / resident.step_s, 4)


def _text_in_words(preset: Preset, text: str) -> str:
    if text == "given":
        return "none: random embeddings were given in their place"
    if preset.is_builtin:
        return "the demo's own"
    return "random weights in the published shapes, with the demo's tokenizers"


def _picture(folder: Path, preset: Preset) -> str | None:
    """A picture to begin with, for presets that take one."""
    if not preset.takes_image:
        return None
    width, height = preset.sizes_px[0]
    path = folder / "picture.ppm"
    shades = bytes(place * 255 // width for place in range(width) for _ in "RGB")
    path.write_bytes(b"P6 %d %d 255\n" % (width, height) + shades * height)
    return str(path)


def _is_hopper() -> bool:
    return torch.cuda.is_available() and any(h in torch.cuda.get_device_name(0) for h in HOPPER)

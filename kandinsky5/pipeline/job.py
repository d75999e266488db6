"""A job as the pipeline carries it out: accepted, with everything checked that can be before work begins."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from kandinsky5.errors import OutOfMemory, UserError
from kandinsky5.events import EventSink, Notice, StageStarted
from kandinsky5.memory.device import choose_device, choose_dtype
from kandinsky5.memory.residency import MEMORY_ERRORS, is_out_of_memory
from kandinsky5.model.loading import ModelFiles, find_model_files
from kandinsky5.output.media import prepare_output
from kandinsky5.pipeline.image import fitted_size, read_image
from kandinsky5.presets import PRESETS, Preset
from kandinsky5.request import GenerationRequest, settle

MAX_DRAWN_SEED = 2**31 - 1


@dataclass
class Job:
    """A job under way: its settled request, its listeners and what it has taken so far."""

    request: GenerationRequest
    preset: Preset
    files: ModelFiles
    picture: Image.Image | None
    out: Path
    device: torch.device
    dtype: torch.dtype
    emit: EventSink
    should_stop: Callable[[], bool]
    notices: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    evaluations: int = 0
    place: str = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce the stage, time it, and say where memory ran out if it does."""
        self.place = name
        self.emit(StageStarted(name))
        started = time.monotonic()
        try:
            yield
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            kind = "GPU memory" if self.device.type == "cuda" else "memory"
            raise OutOfMemory(f"out of {kind} during {self.place}") from error
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def notice(self, text: str) -> None:
        self.notices.append(text)
        self.emit(Notice(text))


def accept(
    request: GenerationRequest,
    *,
    out: Path | None,
    emit: EventSink,
    should_stop: Callable[[], bool],
    models_dirs: Sequence[Path],
) -> Job:
    """Settle the request and refuse what cannot work, before anything is loaded.

    Raises:
        UserError: a value, the picture or a place to write cannot be used.
        CheckpointError: a file of the model is missing or unusable.
    """
    settled, notices = settle(request)
    if settled.seed is None:
        drawn = random.SystemRandom().randrange(MAX_DRAWN_SEED)
        settled = dataclasses.replace(settled, seed=drawn)
    preset = PRESETS[settled.preset]
    _refuse_what_is_missing(settled, preset)
    target = prepare_output(out or Path(settled.out or f"{preset.name}_{settled.seed}.mp4"))
    if settled.save_latents:
        latents = str(prepare_output(settled.save_latents))
        settled = dataclasses.replace(settled, save_latents=latents)
    picture = read_image(settled.image) if settled.image else None
    if picture is not None and not settled.width:
        width, height = fitted_size(picture.width, picture.height, preset)
        settled = dataclasses.replace(settled, width=width, height=height)
    device = choose_device(settled.device)
    job = Job(
        request=settled,
        preset=preset,
        files=find_model_files(settled, models_dirs),
        picture=picture,
        out=target,
        device=device,
        dtype=choose_dtype(settled.dtype, device),
        emit=emit,
        should_stop=should_stop,
    )
    for text in (*notices, *_what_is_done_otherwise(settled, preset)):
        job.notice(text)
    return job


def _what_is_done_otherwise(request: GenerationRequest, preset: Preset) -> Iterator[str]:
    """Say what this version does instead of what the preset or the request means."""
    if preset.nabla:
        yield "sparse attention (NABLA) is not available yet: full attention is used, slower"
    if request.expand and not preset.is_builtin:
        yield "prompt expansion is not available yet: the prompt is used as it is"


def _refuse_what_is_missing(request: GenerationRequest, preset: Preset) -> None:
    """Say plainly what this version cannot do, before anything is loaded."""
    later = {
        "preset": not preset.is_video,
        "weights": request.weights not in ("auto", "bf16"),
        "text_weights": request.text_weights == "nf4",
        "attention": request.attention not in ("auto", "sdpa"),
        "cache": request.cache != "none",
        "loras": bool(request.loras),
    }
    for name, missing in later.items():
        if missing:
            raise UserError(name, getattr(request, name), "not available in this version yet")

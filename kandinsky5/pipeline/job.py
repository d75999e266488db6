"""A job as the pipeline carries it out: accepted, with everything checked that can be before work begins."""

from __future__ import annotations

import dataclasses
import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from kandinsky5.errors import OutOfMemory, UserError
from kandinsky5.events import EventSink, Notice, StageStarted
from kandinsky5.memory import meter
from kandinsky5.memory.device import choose_device, choose_dtype
from kandinsky5.memory.plan import MemoryPlan, lowered
from kandinsky5.memory.residency import MEMORY_ERRORS, is_out_of_memory
from kandinsky5.model.dit import DiTConfig
from kandinsky5.model.files import ModelFiles, locate_vae
from kandinsky5.model.inspect import inspect_file
from kandinsky5.model.loading import check_transformer, check_video_vae, find_model_files
from kandinsky5.output.autosave import StateKeeper
from kandinsky5.output.media import prepare_output
from kandinsky5.output.run_state import RunState
from kandinsky5.pipeline.image import fitted_size, read_image
from kandinsky5.pipeline.planning import changes, plan_of, planned
from kandinsky5.pipeline.preview_pace import PreviewEvery
from kandinsky5.presets import PRESETS, Preset
from kandinsky5.request import GenerationRequest, settle

MAX_DRAWN_SEED = 2**31 - 1
TRIES = 3
"""How often a stage is begun before a job gives up for want of memory."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Listeners:
    """Who is told of a job, and who may end it.

    Attributes:
        emit: gets its events.
        should_stop: asked between steps.
        previews: how often pictures of what is being painted are made; None makes none.
        states: keeps the unfinished run on disk; None keeps nothing.
    """

    emit: EventSink
    should_stop: Callable[[], bool]
    previews: PreviewEvery | None = None
    states: StateKeeper | None = None


@dataclass(kw_only=True)
class Job:
    """A job under way: its settled request, its plan, its listeners and what it has taken so far.

    Attributes:
        vae: the folder of its VAE.
        checkpoint: the transformer's file, named in the result; None where none takes part.
        out: the final path.
        device, dtype: where and in what is computed.
        to: its listeners.
    """

    request: GenerationRequest
    preset: Preset
    plan: MemoryPlan
    vae: Path
    checkpoint: Path | None = None
    out: Path
    device: torch.device
    dtype: torch.dtype
    to: Listeners
    notices: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, meter.Peaks] = field(default_factory=dict)
    evaluations: int = 0
    h2d_bytes: int = 0
    place: str = ""

    @property
    def emit(self) -> EventSink:
        return self.to.emit

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce the stage, measure it, and say where memory ran out if it does."""
        self.place = name
        self.emit(StageStarted(name))
        meter.start_measuring()
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
            self.peaks[name] = meter.peaks().max(self.peaks.get(name))

    def notice(self, text: str) -> None:
        self.notices.append(text)
        self.emit(Notice(text))

    def with_less(self, stage: str, work: Callable[[], Result]) -> Result:
        """Do the work of a stage; when memory runs out, again with the next smaller plan.

        Raises:
            OutOfMemory: it ran out every time, or there is no smaller plan.
        """
        for left in reversed(range(TRIES)):
            try:
                return work()
            except OutOfMemory as error:
                smaller = lowered(self.plan, stage) if left else None
                if smaller is None:
                    raise
                # What failed still holds tensors through the frames of its traceback.
                cause: BaseException | None = error
                while cause is not None:
                    traceback.clear_frames(cause.__traceback__)
                    cause = cause.__cause__ or cause.__context__
                self.notice(f"{error}: going on with less ({changes(self.plan, smaller)})")
                self.plan = smaller
        raise AssertionError("the last try returns or raises")


@dataclass(kw_only=True)
class PaintingJob(Job):
    """A job that begins with noise, or goes on from a saved state.

    Attributes:
        files: the parts of its model.
        config: the transformer's dimensions.
        picture: given to begin with.
    """

    files: ModelFiles
    config: DiTConfig
    picture: Image.Image | None = None


def accept(
    request: GenerationRequest, to: Listeners, *, out: Path | None, models_dirs: Sequence[Path]
) -> PaintingJob:
    """Settle the request and refuse what cannot work, before anything is loaded.

    Raises:
        UserError: a value, the picture or a place to write cannot be used.
        CheckpointError: a file of the model is missing or unusable.
        OutOfMemory: no plan fits into the memory given.
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
    job = _job(settled, to, target, models_dirs)
    job.picture = picture
    for text in (*notices, *_what_is_done_otherwise(settled, preset)):
        job.notice(text)
    return job


def accept_saved(
    state: RunState, to: Listeners, *, out: Path | None, models_dirs: Sequence[Path]
) -> PaintingJob:
    """A job that goes on from a saved state, under the settings it was begun with.

    Raises:
        UserError, CheckpointError, OutOfMemory: as :func:`accept`; or the files are not those of the run.
    """
    request = state.request
    _refuse_what_is_missing(request, PRESETS[request.preset])
    name = f"{request.preset}_{request.seed}.mp4"
    target = prepare_output(out or Path(request.out or name))
    return _job(request, to, target, models_dirs, state)


def accept_latents(
    request: GenerationRequest, to: Listeners, *, out: Path | None, models_dirs: Sequence[Path]
) -> Job:
    """A job that only decodes; of the model nothing but the VAE need be there.

    Raises:
        UserError, CheckpointError: as :func:`accept`.
    """
    preset = PRESETS[request.preset]
    if not preset.is_video:
        raise UserError("preset", request.preset, "not available in this version yet")
    target = prepare_output(out or Path(request.out or f"{preset.name}_{request.seed}.mp4"))
    vae = locate_vae(request, models_dirs)
    check_video_vae(vae)
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    plan = plan_of(request, None, "bf16", device=device, dtype=dtype)
    return Job(
        request=request,
        preset=preset,
        plan=plan,
        vae=vae,
        out=target,
        device=device,
        dtype=dtype,
        to=to,
    )


def _job(
    request: GenerationRequest,
    to: Listeners,
    out: Path,
    models_dirs: Sequence[Path],
    state: RunState | None = None,
) -> PaintingJob:
    preset = PRESETS[request.preset]
    device = choose_device(request.device)
    facts = {} if state is None else dict(state.facts)
    wanted = str(facts.get("dtype", request.dtype))
    dtype = choose_dtype(wanted if wanted in ("bf16", "fp32") else request.dtype, device)
    files = find_model_files(request, models_dirs)
    config = check_transformer(files.transformer)
    stored_as = inspect_file(files.transformer).quantization
    before = facts.get("settings")
    plan = planned(
        request,
        config,
        stored_as,
        device=device,
        dtype=dtype,
        before=before if isinstance(before, dict) else None,
    )
    job = PaintingJob(
        request=request,
        preset=preset,
        plan=plan,
        vae=files.vae,
        checkpoint=files.transformer,
        out=out,
        device=device,
        dtype=dtype,
        to=to,
        files=files,
        config=config,
    )
    for text in (*files.notices, *plan.notices):
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
        "text_weights": request.text_weights == "nf4",
        "attention": request.attention not in ("auto", "sdpa"),
        "cache": request.cache != "none",
        "loras": bool(request.loras),
    }
    for name, missing in later.items():
        if missing:
            raise UserError(name, getattr(request, name), "not available in this version yet")

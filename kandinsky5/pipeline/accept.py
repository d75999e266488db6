"""Accepting a job: its request settled, its model found, its memory planned; what cannot work is refused."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kandinsky5.errors import UserError
from kandinsky5.events import STAGES, reading
from kandinsky5.memory.device import choose_device, choose_dtype
from kandinsky5.model.facts import fingerprint, text_encoder_facts, transformer_facts
from kandinsky5.model.files import locate_vae
from kandinsky5.model.loading import check_vae, find_model_files
from kandinsky5.model.text_generation import can_write
from kandinsky5.output.media import prepare_output, video_bytes
from kandinsky5.output.run_state import RunState
from kandinsky5.picture_sizes import size_for_picture
from kandinsky5.pipeline.adapters import chosen_loras
from kandinsky5.pipeline.attending import attending_of
from kandinsky5.pipeline.cache import measured_ratios
from kandinsky5.pipeline.image import read_image
from kandinsky5.pipeline.job import Job, Listeners, PaintingJob
from kandinsky5.pipeline.model_inputs import config_for
from kandinsky5.pipeline.planning import plan_of, planned, was_lowered
from kandinsky5.presets import PRESETS
from kandinsky5.request import (
    MAX_PROMPT_CHARACTERS,
    MAX_STEPS,
    GenerationRequest,
    frames_of,
    settle,
)

MAX_DRAWN_SEED = 2**31 - 1
MAX_COUNT = 2 * MAX_STEPS
BYTES_PER_PIXEL = 3

NO_OUTPUT_LAYER = "the text encoder has no output layer (lm_head): the prompt is used as it is"


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
    _refuse_unmeasured_cache(settled)
    picture = None
    if settled.image:
        with reading(to.emit, settled.image):
            picture = read_image(settled.image)
    if picture is not None and not settled.width:
        width, height = size_for_picture(picture.width, picture.height, settled)
        settled = dataclasses.replace(settled, width=width, height=height)
    target = _target(settled, out)
    if settled.save_latents:
        latents = str(prepare_output(settled.save_latents))
        settled = dataclasses.replace(settled, save_latents=latents)
    job = _job(settled, to, target, models_dirs)
    job.picture = picture
    for text in notices:
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
    _refuse_unmeasured_cache(request)
    target = _target(request, out)
    if request.save_latents:
        prepare_output(request.save_latents)
    return _job(request, to, target, models_dirs, state)


def accept_latents(
    request: GenerationRequest, to: Listeners, *, out: Path | None, models_dirs: Sequence[Path]
) -> Job:
    """A job that only decodes; of the model nothing but the VAE need be there.

    Raises:
        UserError, CheckpointError: as :func:`accept`.
    """
    preset = PRESETS[request.preset]
    target = _target(request, out)
    vae = locate_vae(request, models_dirs)
    check_vae(vae, preset.vae)
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    # Choices for models that take no part must not keep the VAE from its work.
    alone = dataclasses.replace(request, weights="auto", text_weights="auto", expand=False)
    plan = plan_of(alone, None, "bf16", device=device, dtype=dtype)
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


def _target(request: GenerationRequest, out: Path | None) -> Path:
    """Where the result goes, with room for it."""
    assert request.width and request.height
    is_video = PRESETS[request.preset].is_video
    name = f"{request.preset}_{request.seed}.{'mp4' if is_video else 'png'}"
    target = out or Path(request.out or name)
    if not is_video and target.suffix.lower() != ".png":
        raise UserError(
            "out", str(target), f"a name that ends in .png: {request.preset} paints one"
        )
    if is_video:
        frames = frames_of(request.seconds or 0.0)
        room = video_bytes(request.width, request.height, frames, crf=request.crf)
    else:
        room = request.width * request.height * BYTES_PER_PIXEL
    return prepare_output(target, needed_bytes=room)


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
    found = transformer_facts(files.transformer)
    loras = chosen_loras(request, found.config, models_dirs)
    settings = facts.get("settings")
    before = settings if isinstance(settings, dict) else None
    attention = facts.get("attention")
    attending = attending_of(
        request,
        device=device,
        dtype=dtype,
        head_dim=found.config.head_dim,
        before=attention if isinstance(attention, dict) else None,
    )
    given = request.expanded_prompt
    expands = state is None and request.expand and given is None and not preset.is_builtin
    mute = expands and not can_write(files.text_encoder)
    to_plan = dataclasses.replace(attending.planned(request), expand=expands and not mute)
    if state is not None:  # its prompt is encoded: nothing need work that encodes
        to_plan = dataclasses.replace(to_plan, text_weights="auto")
    plan = plan_of(
        to_plan,
        found.config,
        found.stored_as,
        device=device,
        dtype=dtype,
        before=before,
        adapter_bytes=sum(lora.nbytes(dtype) for lora in loras),
        text_encoder=None if preset.is_builtin else text_encoder_facts(files.text_encoder),
    )
    plan = planned(plan, device, before)
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
        config=config_for(found.config, preset),
        attending=attending,
        loras=loras,
        digests={
            "transformer": fingerprint(files.transformer),
            "vae": fingerprint(files.vae),
            **{f"lora {n}": fingerprint(lora.file.path) for n, lora in enumerate(loras, start=1)},
        },
        seconds=_seconds(facts),
        expanded_prompt=_expanded(facts) or given,
        is_lowered=was_lowered(before),
        evaluations=_count(facts, "evaluations"),
        evaluations_skipped=_count(facts, "evaluations_skipped"),
    )
    adapted = [lora.notice for lora in loras]
    unsaid = [NO_OUTPUT_LAYER] if mute else []
    for text in (*files.notices, *adapted, *attending.notices, *unsaid, *plan.notices):
        job.notice(text)
    return job


def _seconds(facts: Mapping[str, Any]) -> dict[str, float]:
    """What the stages of a saved run had taken; nothing where it does not tell."""
    values = facts.get("seconds")
    taken = values if isinstance(values, dict) else {}
    return {
        name: float(taken[name])
        for name in STAGES
        if type(taken.get(name)) in (int, float) and 0 <= taken[name] < math.inf
    }


def _expanded(facts: Mapping[str, Any]) -> str | None:
    """The rewritten prompt of a saved run."""
    text = facts.get("expanded_prompt")
    return text[:MAX_PROMPT_CHARACTERS] if isinstance(text, str) and text else None


def _count(facts: Mapping[str, Any], name: str) -> int:
    """A number a saved run tells; 0 where it tells none."""
    value = facts.get(name)
    return value if type(value) is int and 0 <= value <= MAX_COUNT else 0


def _refuse_unmeasured_cache(request: GenerationRequest) -> None:
    """Say that a step cache has no ratios for this model, before anything is loaded."""
    if request.cache != "none":
        measured_ratios(request)

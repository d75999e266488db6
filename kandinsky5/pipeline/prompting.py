"""From a job's prompt to what steers the loop: expand it, encode it, or take both from the cache."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from kandinsky5.events import PromptExpanded
from kandinsky5.memory.whole import to_host
from kandinsky5.model.text import Conditioning, TextEncoders
from kandinsky5.pipeline.adapters import with_triggers
from kandinsky5.pipeline.denoise import Guidance
from kandinsky5.pipeline.embedding_cache import (
    EmbeddingCache,
    EncodedPrompts,
    encoding_key,
    expansion_key,
)
from kandinsky5.pipeline.expand import expand_prompt
from kandinsky5.pipeline.image import as_seen
from kandinsky5.pipeline.job import PaintingJob
from kandinsky5.pipeline.models import Models, ready
from kandinsky5.pipeline.prompt import prompt_notices
from kandinsky5.pipeline.run import interval_of
from kandinsky5.templates import PROMPT_TEMPLATES


def expand_text(job: PaintingJob, models: Models, cache: EmbeddingCache) -> None:
    """Have the prompt rewritten, if the plan says so; :attr:`PaintingJob.expanded_prompt` is set then."""
    if job.plan.text.expand is None or job.expanded_prompt is not None:
        return
    picture = _picture(job)
    key = expansion_key(job, picture)
    if (kept := cache.expanded(key)) is not None:
        with job.stage("expand"):
            job.expanded_prompt = kept
            job.emit(PromptExpanded(kept, done=True))
        return
    with (
        ready(job, models.text_encoders(job, job.plan.text.expand)) as encoders,
        ready(job, models.voice(job)) as voice,
        job.stage("expand"),
    ):
        found = expand_prompt(
            encoders.writer(voice.layer, voice.sight),
            job.request,
            job.preset,
            picture,
            emit=job.emit,
            should_stop=job.to.should_stop,
        )
    if found.fault:
        job.notice(found.notice)
        return
    job.expanded_prompt = found.text
    cache.keep_expanded(key, found.text)


def encode_text(job: PaintingJob, models: Models, cache: EmbeddingCache) -> Guidance:
    """The conditionings of a job's prompts, in main memory."""
    assert job.request.guidance is not None
    written = job.request.prompt if job.expanded_prompt is None else job.expanded_prompt
    prompt = with_triggers(written, job.loras)
    clip_prompt = job.request.clip_prompt or prompt
    seen = _picture(job) if job.plan.job.encoder_sees else None
    key = encoding_key(job, prompt, clip_prompt, seen)
    found = cache.encoded(key)
    if found is None:
        with ready(job, models.text_encoders(job)) as encoders, job.stage("encode text"):
            found = _encoded(job, encoders, (prompt, clip_prompt), written, seen)
        cache.keep_encoded(key, found)
    else:
        with job.stage("encode text"):
            pass  # a stage that takes no time is one all the same
    for text in found.notices:
        job.notice(text)
    return found.guidance(job.request.guidance, interval_of(job.request))


def _encoded(
    job: PaintingJob,
    encoders: TextEncoders,
    prompts: tuple[str, str],
    written: str,
    seen: NDArray[np.uint8] | None,
) -> EncodedPrompts:
    """Encode (prompt for Qwen, for CLIP), and the negative one where it takes part."""
    request, preset = job.request, job.preset

    def encode(prompt: str, clip_prompt: str) -> Conditioning:
        made = encoders.encode(
            prompt,
            clip_prompt,
            template=PROMPT_TEMPLATES[preset.template],
            max_tokens=preset.text_tokens,
            clip_tokens=preset.clip_tokens,
            picture=seen,
        )
        return Conditioning(to_host(made.text), to_host(made.pooled))

    as_written = dataclasses.replace(request, prompt=written)
    notices = tuple(prompt_notices(encoders, as_written, preset))
    positive = encode(*prompts)
    assert request.guidance is not None
    if abs(request.guidance - 1.0) <= 1e-6:
        return EncodedPrompts(positive, None, notices)
    negative = encode(request.negative_prompt, request.negative_prompt)
    return EncodedPrompts(positive, negative, notices)


def _picture(job: PaintingJob) -> NDArray[np.uint8] | None:
    """The given picture as the text encoder sees it."""
    if job.picture is None:
        return None
    assert job.request.width and job.request.height
    return as_seen(job.picture, job.request.width, job.request.height)

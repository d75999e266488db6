"""How far a job has come, and its way to disk and back."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kandinsky5.errors import K1Error
from kandinsky5.events import StateSaved
from kandinsky5.memory.whole import to_device
from kandinsky5.model.dit import DiTConfig
from kandinsky5.model.positions import TokenOrder
from kandinsky5.model.text import Conditioning
from kandinsky5.output.run_state import RunState, SavedText
from kandinsky5.pipeline.cache import MagCache, check_tensors, skip_plan
from kandinsky5.pipeline.denoise import Guidance
from kandinsky5.pipeline.job import PaintingJob
from kandinsky5.pipeline.model_inputs import ModelInputs, inputs_for
from kandinsky5.pipeline.planning import settings_to_go_on
from kandinsky5.request import GenerationRequest


@dataclass
class Run:
    """A run between its first step and its last.

    Attributes:
        guidance: prompts, encoded.
        times: of the schedule, float32 [total+1].
        latent: at ``times[step]``, float32 [T, H, W, C].
        picture: the given picture's latent [1, H, W, C], or None.
        step: steps done.
        cache: its step cache, once it has one.
        cache_tensors: what the cache of a saved run carried along, its tokens in raster order.
        estimate: x₀ [T, H, W, C] at its last step, in main memory, once the user wants no further one.
    """

    guidance: Guidance
    times: torch.Tensor
    latent: torch.Tensor
    picture: torch.Tensor | None = None
    step: int = 0
    cache: MagCache | None = None
    cache_tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    estimate: torch.Tensor | None = None

    @property
    def total(self) -> int:
        return len(self.times) - 1

    def inputs(self, config: DiTConfig, device: torch.device) -> ModelInputs:
        """How its latent goes into a transformer on a device."""
        picture = None if self.picture is None else to_device(self.picture, device)
        return inputs_for(config, picture)

    @classmethod
    def of_state(cls, state: RunState) -> Run:
        """As it was when it was saved, in main memory."""
        negative = None if state.negative is None else _conditioning(state.negative)
        scale = state.request.guidance or 1.0
        guidance = Guidance(
            _conditioning(state.positive),
            negative,
            scale if negative else 1.0,
            interval=interval_of(state.request),
        )
        return cls(
            guidance,
            state.times,
            state.latent,
            state.first_frame,
            state.step,
            cache_tensors=state.cache_tensors,
        )

    def step_cache(self, job: PaintingJob) -> MagCache | None:
        """Its step cache, the same one for every try at it; None where the job has none.

        Raises:
            UserError: what a saved run carried along does not fit.
        """
        plan = skip_plan(job.request, self.guidance.branches(self.total))
        if plan is not None and self.cache is None:
            order, tensors = self._order(job), self.cache_tensors
            shape = (math.prod(order.grid), job.config.model_dim)
            check_tensors(plan, self.step, tensors, shape)
            arranged = {name: order.arranged_tokens(tensor) for name, tensor in tensors.items()}
            self.cache = MagCache(plan, device=job.device, tensors=arranged)
        return self.cache

    def state(self, job: PaintingJob) -> RunState:
        """As it is now, for :func:`kandinsky5.output.run_state.save_run_state`."""
        negative = self.guidance.negative
        facts: dict[str, Any] = {
            "dtype": "fp32" if job.dtype == torch.float32 else "bf16",
            "settings": settings_to_go_on(job.plan, is_lowered=job.is_lowered),
            "attention": job.attending.facts,
            "seconds": job.seconds,
            "evaluations": job.evaluations,
            "evaluations_skipped": job.evaluations_skipped,
        }
        if job.expanded_prompt is not None:
            facts["expanded_prompt"] = job.expanded_prompt
        return RunState(
            request=job.request,
            step=self.step,
            times=self.times,
            latent=self.latent,
            positive=_saved(self.guidance.positive),
            negative=None if negative is None else _saved(negative),
            first_frame=self.picture,
            checkpoints=job.digests,
            cache_tensors=self._carried_along(job),
            facts=facts,
        )

    def _carried_along(self, job: PaintingJob) -> Mapping[str, torch.Tensor]:
        """What its cache needs to go on, in main memory; in raster order, whatever attention had it in."""
        if self.cache is None:
            return self.cache_tensors
        order, tensors = self._order(job), self.cache.tensors(self.step)
        for name in tensors:  # one after the other: they are the largest that a run holds
            tensors[name] = order.restored_tokens(tensors[name])
        return tensors

    def _order(self, job: PaintingJob) -> TokenOrder:
        """In which its tokens go through the transformer."""
        return TokenOrder.of(self.latent, job.config.patch_size, job.attending.sparse)

    def save(self, job: PaintingJob) -> str | None:
        """Write the state where the job keeps such; its path, or None where it keeps none or cannot.

        A disk that is full costs the saved state, never the run: it is said and the run goes on.
        """
        states = job.to.states
        if states is None:
            return None
        try:
            path = str(states.save(self.state(job)))
        except K1Error as error:
            job.notice(f"the unfinished run could not be saved: {error}")
            return None
        job.emit(StateSaved(self.step, self.total, path, time.time()))
        return path


def interval_of(request: GenerationRequest) -> tuple[float, float]:
    """The part of the schedule that is guided."""
    return (request.guidance_start, request.guidance_end)


def _conditioning(text: SavedText) -> Conditioning:
    return Conditioning(text.text, text.pooled)


def _saved(conditioning: Conditioning) -> SavedText:
    return SavedText(conditioning.text, conditioning.pooled)

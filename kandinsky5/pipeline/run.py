"""How far a job has come, and its way to disk and back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from kandinsky5.errors import UserError
from kandinsky5.events import StateSaved
from kandinsky5.model.text import Conditioning
from kandinsky5.output.atomic import DiskFull
from kandinsky5.output.metadata import header_sha256
from kandinsky5.output.run_state import RunState, SavedText
from kandinsky5.pipeline.denoise import Guidance
from kandinsky5.pipeline.job import PaintingJob
from kandinsky5.pipeline.planning import settings_of


@dataclass
class Run:
    """A run between its first step and its last.

    Attributes:
        guidance: prompts, encoded.
        times: of the schedule, float32 [total+1].
        latent: at ``times[step]``, float32 [T, H, W, C].
        first_frame: the given picture's latent [1, H, W, C], or None.
        step: steps done.
    """

    guidance: Guidance
    times: torch.Tensor
    latent: torch.Tensor
    first_frame: torch.Tensor | None = None
    step: int = 0

    @property
    def total(self) -> int:
        return len(self.times) - 1

    @classmethod
    def of_state(cls, state: RunState) -> Run:
        """As it was when it was saved, in main memory."""
        negative = None if state.negative is None else _conditioning(state.negative)
        scale = state.request.guidance or 1.0
        guidance = Guidance(_conditioning(state.positive), negative, scale if negative else 1.0)
        return cls(guidance, state.times, state.latent, state.first_frame, state.step)

    def state(self, job: PaintingJob) -> RunState:
        """As it is now, for :func:`kandinsky5.output.run_state.save_run_state`."""
        negative = self.guidance.negative
        facts: dict[str, Any] = {
            "dtype": "fp32" if job.dtype == torch.float32 else "bf16",
            "settings": settings_of(job.plan),
            "seconds": job.seconds,
            "evaluations": job.evaluations,
        }
        return RunState(
            request=job.request,
            step=self.step,
            times=self.times,
            latent=self.latent,
            positive=_saved(self.guidance.positive),
            negative=None if negative is None else _saved(negative),
            first_frame=self.first_frame,
            checkpoints=digests(job),
            facts=facts,
        )

    def save(self, job: PaintingJob) -> str | None:
        """Write the state where the job keeps such; its path, or None where it keeps none or cannot.

        A disk that is full costs the saved state, never the run: it is said and the run goes on.
        """
        states = job.to.states
        if states is None:
            return None
        try:
            path = str(states.save(self.state(job)))
        except (UserError, DiskFull) as error:
            job.notice(f"the unfinished run could not be saved: {error}")
            return None
        job.emit(StateSaved(self.step, self.total, path, time.time()))
        return path


def digests(job: PaintingJob) -> dict[str, str | None]:
    """Of the headers of the files whose weights shape the result from here on."""
    files = {"transformer": job.files.transformer, "vae": job.files.vae}
    return {part: header_sha256(path) for part, path in files.items()}


def _conditioning(text: SavedText) -> Conditioning:
    return Conditioning(text.text, text.pooled)


def _saved(conditioning: Conditioning) -> SavedText:
    return SavedText(conditioning.text, conditioning.pooled)

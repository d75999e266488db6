"""What happens after each step: the run is brought up to date, listeners are told, the state is kept."""

from __future__ import annotations

import time

import torch

from kandinsky5.events import StepDone
from kandinsky5.memory import meter
from kandinsky5.memory.whole import to_device, to_host
from kandinsky5.pipeline.denoise import StepState
from kandinsky5.pipeline.job import PaintingJob
from kandinsky5.pipeline.preview import PreviewFeed, clean_estimate
from kandinsky5.pipeline.run import Run
from kandinsky5.pipeline.transformer import RunningTransformer


class Steps:
    """Follows one run through the denoising loop."""

    def __init__(
        self, job: PaintingJob, run: Run, transformer: RunningTransformer, feed: PreviewFeed | None
    ) -> None:
        self._job, self._run, self._transformer, self._feed = job, run, transformer, feed
        self._began, self._first = time.monotonic(), run.step
        self._before, self._returned_bytes = transformer.traffic, 0
        self._last: StepState | None = None
        self._comes(run.step + 1)

    def should_stop(self) -> bool:
        """Whether the loop ends here: at once, or because what there is by now is enough for the user."""
        to = self._job.to
        if to.should_stop():
            return True
        if self._last is None or not to.should_finish():
            return False  # before its first step there is nothing to decode
        self._run.estimate = to_host(self._clean(self._last))
        return True

    def step_done(self, state: StepState) -> None:
        job, run = self._job, self._run
        run.step, run.latent, self._last = state.step, to_host(state.latent), state
        job.evaluations += state.evaluations_run
        job.evaluations_skipped += state.evaluations_skipped
        self._comes(state.step + 1)
        traffic = self._transformer.traffic
        moved, self._before = traffic - self._before, traffic
        taken = meter.peaks()  # since the stage began
        returned, self._returned_bytes = taken.d2h_bytes - self._returned_bytes, taken.d2h_bytes
        each = (time.monotonic() - self._began) / (state.step - self._first)
        job.emit(
            StepDone(
                state.step,
                state.total,
                each,
                each * (state.total - state.step),
                h2d_bytes=moved.h2d_bytes,
                d2h_bytes=returned,
                peak_vram_bytes=taken.vram_bytes,
                stall_s=moved.stall_s,
                evaluations_run=state.evaluations_run,
                evaluations_skipped=state.evaluations_skipped,
            )
        )
        if self._feed is not None:
            self._feed.step_done(state.step, state.total, lambda: self._clean(state))
        states = job.to.states
        if states is not None and state.step < state.total and states.is_due(state.step):
            run.save(job)

    def _comes(self, step: int) -> None:
        if self._transformer.notice is not None:
            self._job.notice(self._transformer.notice)
        if step <= self._run.total:
            self._job.place = f"denoise, step {step} of {self._run.total}"

    def _clean(self, state: StepState) -> torch.Tensor:
        first = self._run.picture if self._job.preset.is_video else None
        if first is not None:
            first = to_device(first, state.latent.device)
        return clean_estimate(state.latent, state.velocity, state.next_time, first)

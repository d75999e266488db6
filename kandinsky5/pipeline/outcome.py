"""What is told of a job when it is done: to its caller, and in the file it made."""

from __future__ import annotations

import time
from typing import Any

from kandinsky5.memory.meter import Peaks
from kandinsky5.output.metadata import describe
from kandinsky5.pipeline.job import Job, PaintingJob
from kandinsky5.pipeline.painting import Painted
from kandinsky5.request import GenerationResult


def metadata_of(job: Job) -> dict[str, Any]:
    """What stands in the job's file as far as it is known by now: see ``output.metadata.describe``."""
    assert job.request.seed is not None
    peaks = _highest(job)
    return describe(
        job.request,
        checkpoint=job.checkpoint,
        seed=job.request.seed,
        seconds=job.seconds,
        peak_vram_bytes=peaks.vram_bytes,
        peak_rss_bytes=peaks.rss_bytes,
        expanded_prompt=job.expanded_prompt,
        early_step=job.early_step,
        attention=job.attending.facts if isinstance(job, PaintingJob) else None,
    )


def result_of(job: Job, painted: Painted, started: float, *, steps: int) -> GenerationResult:
    """The result of a job whose file is written.

    Args:
        started: when it began, by the monotonic clock, s.
        steps: done of its schedule.
    """
    assert job.request.seed is not None
    job.seconds["total"] = time.monotonic() - started
    peaks, in_loop = _highest(job), job.peaks.get("denoise", Peaks())
    return GenerationResult(
        output=str(job.out),
        frames=painted.frames,
        width=painted.width,
        height=painted.height,
        seed=job.request.seed,
        steps_run=steps,
        evaluations_run=job.evaluations,
        evaluations_skipped=job.evaluations_skipped,
        seconds={name: round(value, 3) for name, value in job.seconds.items()},
        peak_vram_bytes=peaks.vram_bytes,
        peak_rss_bytes=peaks.rss_bytes,
        h2d_bytes=in_loop.h2d_bytes,
        d2h_bytes=in_loop.d2h_bytes,
        stage_peaks={name: vars(peak) for name, peak in job.peaks.items()},
        notices=tuple(job.notices),
        expanded_prompt=job.expanded_prompt,
    )


def _highest(job: Job) -> Peaks:
    highest = Peaks()
    for peak in job.peaks.values():
        highest = highest.joined(peak)
    return highest

"""MagCache on the built-in model: its ratios measured, and what skipping costs in adherence."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from kandinsky5.circumstances import circumstances
from kandinsky5.demo.bench import MODES, ClipMaker, demo_adherence, planned_pairs, request_for
from kandinsky5.errors import UserError
from kandinsky5.pipeline.cache_ratios import RatioMeter
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.request import GenerationRequest, GenerationResult

_WORDS = ("colour", "direction", "shape")


def magcache_ratios(
    *, mode: str = "t2v", pairs: int = 8, seed: int = 90_000, guidance: float | None = None
) -> dict[str, Any]:
    """Measure the demo's ratios over some clips, at its preset's steps.

    Args:
        mode: "t2v" or "i2v".
        pairs: how many clips.
        seed: of the questions; others than those adherence is judged by.
        guidance: above 1; None takes the preset's.

    Returns:
        JSON-ready: ``ratios`` as in ``kandinsky5/magcache_ratios.json``, means over the clips, and
        ``spread``, the largest difference between two clips' ratios of one step.
    """
    _check_mode(mode)
    meters: list[RatioMeter] = []

    def meter(run: Any, job: Any) -> RatioMeter:
        meters.append(RatioMeter(run.guidance.branches(run.total)))
        return meters[-1]

    pipeline = Pipeline(step_cache=meter)
    with tempfile.TemporaryDirectory(prefix="k1-ratios-") as scratch:
        for pair in planned_pairs(pairs, seed):
            fields = {"preset": f"demo-{mode}", "guidance": guidance}
            request, _ = request_for(pair, fields, Path(scratch))
            pipeline.run(request, out=Path(scratch) / "clip.mp4")
    flat = [[ratio for step in meter.ratios() for ratio in step] for meter in meters]
    columns = list(zip(*flat, strict=True))
    return {
        "benchmark": "magcache-ratios",
        "preset": f"demo-{mode}",
        "pairs": pairs,
        "ratios": [round(fmean(column), 5) for column in columns],
        "spread": round(max(max(column) - min(column) for column in columns), 5),
        **circumstances(),
    }


def magcache_demo(
    *,
    mode: str = "t2v",
    pairs: int = 30,
    seed: int = 20_000,
    steps: int | None = None,
    pipeline: ClipMaker | None = None,
) -> dict[str, Any]:
    """The same questions with and without the cache: rates of adherence, and evaluations.

    Args:
        mode: "t2v" or "i2v".
        pairs: clips each way.
        seed: of the questions.
        steps: of a clip; None for the preset's.
        pipeline: makes the clips; None for a new one.

    Returns:
        JSON-ready: for ``none`` and ``magcache`` the rates, ``all_right``, evaluations of a clip and seconds
        of a clip; ``fewer_evaluations`` as a factor; ``points_lost``, the largest loss among the rates in
        percentage points.
    """
    _check_mode(mode)
    counted = _Counting(pipeline or Pipeline())
    report: dict[str, Any] = {"benchmark": "magcache-demo", "mode": mode, "pairs": pairs}
    for cache in ("none", "magcache"):
        counted.clear()
        made = demo_adherence(
            pairs=pairs, seed=seed, mode=mode, steps=steps, pipeline=counted, cache=cache
        )
        report[cache] = {
            **{word: made[word] for word in (*_WORDS, "all_right", "failures")},
            "evaluations_run": counted.run_count / pairs,
            "evaluations_skipped": counted.skipped_count / pairs,
            "seconds_per_clip": made["seconds_per_clip"]["mean"],
        }
    plain, cached = report["none"], report["magcache"]
    report["fewer_evaluations"] = round(plain["evaluations_run"] / cached["evaluations_run"], 3)
    report["points_lost"] = round(max(100 * (plain[word] - cached[word]) for word in _WORDS), 2)
    return {**report, **circumstances()}


class _Counting:
    """Makes clips and adds up their evaluations."""

    def __init__(self, maker: ClipMaker) -> None:
        self._maker = maker
        self.clear()

    def clear(self) -> None:
        self.run_count = self.skipped_count = 0

    def run(self, request: GenerationRequest, *, out: Path) -> GenerationResult:
        result = self._maker.run(request, out=out)
        self.run_count += result.evaluations_run
        self.skipped_count += result.evaluations_skipped
        return result


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise UserError("mode", mode, f"one of {', '.join(MODES)}")

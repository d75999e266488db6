"""What the cache costs the demo: how it is counted, and the numbers that were measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from kandinsky5.demo.bench import planned_pairs
from kandinsky5.demo.magcache import magcache_demo
from kandinsky5.demo.scenes import Scene, render
from kandinsky5.errors import UserError
from kandinsky5.magcache import SkipRule, ratios_of, skips_of
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, GenerationResult
from tests.demo.test_bench import write_mp4

SEED = 500
PAIRS = 4


class CarelessWhenCached:
    """Paints what is asked; with the cache on, the first clip in another colour and 20 of 48 evaluations."""

    def __init__(self) -> None:
        self.scenes = [pair.scene for pair in planned_pairs(PAIRS, SEED)]

    def run(self, request: GenerationRequest, *, out: Path) -> GenerationResult:
        assert request.seed is not None
        index, cached = request.seed - SEED, request.cache == "magcache"
        scene: Scene = self.scenes[index]
        if cached and index == 0:
            other = "blue" if scene.colour != "blue" else "red"
            scene = dataclasses.replace(scene, colour=other)
        write_mp4(out, render(scene, 25, 64))
        done = (20, 28) if cached else (48, 0)
        return GenerationResult(str(out), 25, 64, 64, request.seed, 24, *done, {}, 0, 1)


def test_rates_and_evaluations_with_and_without_the_cache_stand_side_by_side() -> None:
    report = magcache_demo(pairs=PAIRS, seed=SEED, pipeline=CarelessWhenCached())
    assert (report["none"]["colour"], report["magcache"]["colour"]) == (1.0, 0.75)
    assert report["points_lost"] == 25.0
    assert report["magcache"]["evaluations_skipped"] == 28
    assert report["fewer_evaluations"] == 2.4
    json.dumps(report, allow_nan=False)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UserError, match="mode"):
        magcache_demo(mode="t2i", pipeline=CarelessWhenCached())


@pytest.mark.parametrize("preset", ["demo-t2v", "demo-i2v"])
def test_the_demo_needs_far_fewer_evaluations(preset) -> None:
    ratios, steps = ratios_of(preset), PRESETS[preset].steps
    assert ratios is not None
    run = 2 * steps - sum(map(sum, skips_of(ratios, [2] * steps, SkipRule())))
    assert 2 * steps / run >= 1.6


def test_the_measured_cost_is_at_most_two_points(repository) -> None:
    *_, newest = sorted((repository / "benchmarks" / "results").glob("magcache-demo-t2v-*.json"))
    report = json.loads(newest.read_text())
    assert report["pairs"] >= 30
    assert report["points_lost"] <= 2.0
    assert report["fewer_evaluations"] >= 1.6

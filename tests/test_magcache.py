"""Which evaluations MagCache skips: the published figures, and a reference of its own."""

from __future__ import annotations

import json

import pytest

from kandinsky5.magcache import RATIOS_FILE, SkipRule, presets_with_ratios, ratios_of, skips_of
from kandinsky5.presets import PRESETS

RULE = SkipRule()
GUIDED = sorted(
    name
    for name in presets_with_ratios()
    if PRESETS[name].guidance > 1 and PRESETS[name].steps == 50
)


def published_loop(ratios: list[float], steps: int, branches: int) -> list[list[bool]]:
    """One counter over all evaluations, state in lists by branch, as kandinskylab's code has it."""
    by_branch = []
    for branch in range(branches):
        source = [1.0, 1.0, *ratios][branch::2]
        scale = (len(source) - 1) / (steps - 1)
        by_branch.append([source[round(i * scale)] for i in range(steps)])
    ratio, error, row = [1.0, 1.0], [0.0, 0.0], [0, 0]
    skipped: list[list[bool]] = [[] for _ in range(steps)]
    for count in range(steps * branches):
        step, branch = divmod(count, branches)
        skip = False
        if count >= max(int(steps * branches * 0.2), 1):
            ratio[branch] *= by_branch[branch][step]
            row[branch] += 1
            error[branch] += abs(1 - ratio[branch])
            skip = error[branch] < 0.12 and row[branch] <= 2
            if not skip:
                ratio[branch], error[branch], row[branch] = 1.0, 0.0, 0
        skipped[step].append(skip)
    return skipped


def count(preset: str, steps: int, branches: int, rule: SkipRule = RULE) -> int:
    ratios = ratios_of(preset)
    assert ratios is not None
    return sum(map(sum, skips_of(ratios, [branches] * steps, rule)))


def test_the_table_holds_the_figures_given(shared) -> None:
    given = json.loads((shared / "data" / "magcache_ratios.json").read_text())
    own = json.loads(RATIOS_FILE.read_text())
    assert {name: own[name] for name in given} == given
    assert set(own) - set(given) == {"demo-t2v", "demo-i2v"}
    assert set(own) <= set(PRESETS)


@pytest.mark.parametrize("preset", GUIDED)
def test_fifty_guided_steps_skip_as_many_evaluations_as_published(preset) -> None:
    expected = {"pro-i2v-5s-hd": 50, "image-t2i": 54}.get(preset, 52)
    assert count(preset, 50, 2) == expected


@pytest.mark.parametrize("preset", ["demo-t2v", "demo-i2v"])
def test_the_demo_needs_fewer_evaluations_by_more_than_1_6(preset) -> None:
    """What it costs in adherence is measured by ``k1.py bench magcache-demo``."""
    steps = PRESETS[preset].steps
    assert 2 * steps / (2 * steps - count(preset, steps, 2)) >= 1.6


@pytest.mark.parametrize("preset", ["lite-t2v-5s-nocfg", "lite-t2v-10s-nocfg"])
def test_models_without_guidance_skip_half(preset) -> None:
    assert count(preset, 50, 1) == 26
    assert count(preset, 50, 2) == 26  # what was not measured always runs


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("steps", [13, 30, 33, 40, 49, 50, 100])
@pytest.mark.parametrize("preset", presets_with_ratios())
def test_steps_and_guidance_of_the_user_are_followed(preset, steps, branches) -> None:
    ratios = ratios_of(preset)
    assert ratios is not None
    found = [list(step) for step in skips_of(ratios, [branches] * steps, RULE)]
    assert found == published_loop(list(ratios), steps, branches)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 24])
def test_any_number_of_steps_begins_with_an_evaluation(steps) -> None:
    found = skips_of(ratios_of("lite-t2v-5s-sft") or (), [2] * steps, SkipRule(9.0, 0.0, 99))
    assert found[0] == (False, False)
    assert all(step == (True, True) for step in found[1:])


def test_threshold_retention_and_row_are_obeyed() -> None:
    steady = [1.01] * 98
    assert not any(map(any, skips_of(steady, [1] * 50, SkipRule(threshold=0.0))))
    kept = skips_of(steady, [1] * 50, SkipRule(retention=0.5))
    assert not any(map(any, kept[:25])) and kept[25] == (True,)
    assert not any(map(any, skips_of(steady, [1] * 50, SkipRule(retention=1.0))))
    row = [step[0] for step in skips_of(steady, [1] * 50, SkipRule(retention=0.0, max_skips=3))]
    assert row[:9] == [False, True, True, True, False, True, True, True, False]


def test_a_branch_that_sat_out_runs_when_it_comes_back() -> None:
    steady = [1.0] * 98
    branches = [2, 2, 2, 1, 1, 2, 2, 2, 1, 1]
    found = skips_of(steady, branches, SkipRule(retention=0.0, max_skips=99))
    assert [len(step) for step in found] == branches
    assert [step[1] for step in found if len(step) == 2] == [False, True, True, False, True, True]
    assert all(step[0] for step in found[1:])

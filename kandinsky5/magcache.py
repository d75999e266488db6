"""MagCache (arXiv 2506.09045): which evaluations of a run need not go through the transformer's blocks.

From one step to the next the blocks add nearly the same to a latent; how much longer it becomes has been
measured for each published preset. While those ratios say that little would change, what the blocks added
last is added again. Arithmetic only, standard library only; the tensors are
:mod:`kandinsky5.pipeline.cache`'s business.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

RATIOS_FILE = Path(__file__).with_name("magcache_ratios.json")
"""Preset → ratios from the second step on, prompt and negative prompt in turn; kandinskylab's
configuration files, and of the demo ``k1.py bench magcache-ratios``. 0 where nothing was measured."""
MAX_SKIPS = 2
"""Most evaluations of one branch in a row that are skipped (published)."""

Skips = tuple[tuple[bool, ...], ...]
"""For each step, for each branch that is evaluated in it: whether its blocks are skipped."""


@dataclass(frozen=True)
class SkipRule:
    """How daring the cache is.

    Attributes:
        threshold: skipped as long as the deviations |1 − product of ratios| add up to less.
        retention: share of the run's evaluations, from its beginning, of which none is skipped.
        max_skips: in a row.
    """

    threshold: float = 0.12
    retention: float = 0.2
    max_skips: int = MAX_SKIPS


@cache
def _table() -> dict[str, tuple[float, ...]]:
    rows = json.loads(RATIOS_FILE.read_text(encoding="utf-8"))
    return {name: tuple(ratios) for name, ratios in rows.items()}


def presets_with_ratios() -> tuple[str, ...]:
    """Names of the presets that can be cached."""
    return tuple(_table())


def ratios_of(preset: str) -> tuple[float, ...] | None:
    """A preset's ratios, or None where none have been measured."""
    return _table().get(preset)


def skips_of(ratios: Sequence[float], branches: Sequence[int], rule: SkipRule) -> Skips:
    """What is skipped in a run.

    Args:
        ratios: as in the table, of any number of steps; they are resampled by nearest index.
        branches: for each step of the run how many branches it evaluates: 1, or 2 with guidance.
        rule: threshold, retention and how many in a row.

    A branch that was not evaluated in one step runs in the next.
    """
    steps, before = len(branches), [0, *accumulate(branches)]
    kept = int(before[-1] * rule.retention + 1e-9)
    columns = []
    for branch in range(max(branches, default=0)):
        measured = [1.0, *ratios[branch::2]]
        evaluated = [count > branch for count in branches]
        first = next((i for i in range(1, steps) if before[i] + branch >= kept), steps)
        columns.append(_skips(_resampled(measured, steps), evaluated, first, rule))
    return tuple(
        tuple(columns[branch][step] for branch in range(count))
        for step, count in enumerate(branches)
    )


def _skips(
    ratios: Sequence[float], evaluated: Sequence[bool], first: int, rule: SkipRule
) -> list[bool]:
    """Of one branch."""
    skipped = []
    product, deviation, row = 1.0, 0.0, 0
    for step, ratio in enumerate(ratios):
        skip = False
        if step >= first and evaluated[step] and evaluated[step - 1]:
            product *= ratio
            deviation += abs(1.0 - product)
            row += 1
            skip = deviation < rule.threshold and row <= rule.max_skips
        if not skip:
            product, deviation, row = 1.0, 0.0, 0
        skipped.append(skip)
    return skipped


def _resampled(values: Sequence[float], length: int) -> list[float]:
    if length == 1:
        return [values[-1]]
    last = len(values) - 1
    return [values[round(index * last / (length - 1))] for index in range(length)]

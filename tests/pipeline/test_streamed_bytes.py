"""A job moves each streamed byte once for each step that runs blocks, and none beyond the last one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import pytest
import torch
from demo_runs import QUICK, Ran, ran

from kandinsky5.events import StepDone
from kandinsky5.magcache import SkipRule, ratios_of, skips_of
from kandinsky5.memory.layout import BlockLayout, spread
from kandinsky5.model.reader import TransformerReader
from kandinsky5.pipeline import models, transformer
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.pipeline.transformer import MODULATION, Placement
from kandinsky5.presets import DEMO_FOLDER
from kandinsky5.request import GenerationRequest

STEPS = 6
THRESHOLD, RETENTION = 5.0, 0.25


@pytest.fixture(scope="module")
def block_bytes() -> list[int]:
    """Of each visual block of the demo, as it is streamed."""
    with TransformerReader(DEMO_FOLDER / "transformer", dtype=torch.float32) as reader:
        blocks = reader.model.visual_transformer_blocks
        return [BlockLayout.of(block, skip=(MODULATION,)).nbytes for block in blocks]


@pytest.fixture
def fills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The visual blocks that are read from the file, in their order."""
    read: list[int] = []
    fill = transformer._Fill.__call__

    def noting(self: transformer._Fill, index: int, slab: torch.Tensor) -> None:
        if self.prefix == transformer.BLOCKS and not self.inner:
            read.append(index)
        fill(self, index, slab)

    monkeypatch.setattr(transformer._Fill, "__call__", noting)
    return read


def request_of(**values: object) -> GenerationRequest:
    return GenerationRequest(**{**QUICK, "steps": STEPS, **values})


def steps_of(run: Ran) -> list[StepDone]:
    return [event for event in run.events if isinstance(event, StepDone)]


def streamed_of(block_bytes: Sequence[int], resident: int) -> list[int]:
    return sorted(set(range(len(block_bytes))) - set(spread(resident, len(block_bytes))))


@pytest.mark.parametrize("resident", [0, 2])
def test_a_whole_schedule_moves_steps_times_the_blocks_that_do_not_stay(
    tmp_path, monkeypatch, block_bytes, fills, resident
) -> None:
    placement = Placement(resident=resident, slots=2, source="disk", ring=2)
    monkeypatch.setattr(models, "placement_of", lambda plan: placement)
    run = ran(tmp_path, request_of())
    streamed = streamed_of(block_bytes, resident)
    expected = STEPS * sum(block_bytes[index] for index in streamed)
    assert run.result is not None
    assert run.result.h2d_bytes == expected == sum(step.h2d_bytes for step in steps_of(run))
    assert run.result.d2h_bytes == 0
    assert sorted(fills) == sorted(streamed * STEPS + list(spread(resident, len(block_bytes))))


def test_a_streamer_that_stays_moves_as_much_for_the_second_job(
    tmp_path, monkeypatch, block_bytes
) -> None:
    placement = Placement(resident=1, slots=2, source="disk", ring=2, stays=True)
    monkeypatch.setattr(models, "placement_of", lambda plan: placement)
    pipeline = Pipeline()
    moved = [
        ran(tmp_path / str(n), request_of(), pipeline=pipeline).result.h2d_bytes for n in range(2)
    ]
    pipeline._models.release()
    streamed = streamed_of(block_bytes, 1)
    assert moved == [STEPS * sum(block_bytes[index] for index in streamed)] * 2


def test_a_skipped_step_moves_nothing_but_what_the_next_one_begins_with(
    tmp_path, monkeypatch, block_bytes, fills
) -> None:
    """A11."""
    placement = Placement(resident=0, slots=2, source="disk", ring=2)
    monkeypatch.setattr(models, "placement_of", lambda plan: placement)
    cached = {"cache": "magcache", "cache_threshold": THRESHOLD, "cache_retention": RETENTION}
    run = ran(tmp_path, request_of(**cached))
    plan = skips_of(ratios_of("demo-t2v") or (), [2] * STEPS, SkipRule(THRESHOLD, RETENTION))
    passes = sum(not all(skips) for skips in plan)
    assert 1 < passes < STEPS
    assert run.result is not None
    assert run.result.h2d_bytes == passes * sum(block_bytes)
    assert len(fills) == passes * len(block_bytes)
    ahead = placement.slots * max(block_bytes)
    moved = zip(plan, steps_of(run), strict=True)
    for is_skipped, stretch in groupby(moved, key=lambda both: all(both[0])):
        if is_skipped:  # however many steps in a row
            assert sum(step.h2d_bytes for _, step in stretch) <= ahead

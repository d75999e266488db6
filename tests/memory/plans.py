"""Jobs for the tests of plans."""

from __future__ import annotations

from typing import Any

from kandinsky5.memory.budget import Budget
from kandinsky5.memory.demand import PlanChoices, PlanRequest
from kandinsky5.memory.plan import MemoryPlan, make_plan
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, settle

NO_CHOICES = PlanChoices()


def job_of(preset: str, choices: PlanChoices = NO_CHOICES, **values: Any) -> PlanRequest:
    """A preset's job, in its first size unless told otherwise."""
    row = PRESETS[preset]
    width, height = values.pop("size", row.sizes_px[0])
    request = GenerationRequest(
        preset=preset,
        prompt="a red circle",
        image="circle.png" if row.takes_image else None,
        width=width,
        height=height,
        **values,
    )
    return PlanRequest.of(settle(request)[0], choices=choices)


def plan_of(preset: str, vram: float | None, ram: float, **values: Any) -> MemoryPlan:
    """The plan of a preset's job for budgets in GB."""
    return make_plan(job_of(preset, **values), Budget.of_gb(vram, ram))

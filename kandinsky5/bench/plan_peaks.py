"""What memory plans predict for the device, stage by stage, against what the stages allocate."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kandinsky5.bench.stage_counts import COUNTS
from kandinsky5.circumstances import circumstances
from kandinsky5.errors import UserError
from kandinsky5.memory.budget import ALLOCATOR_SLACK, DEVICE_RESERVE_BYTES, Budget
from kandinsky5.memory.demand import PlanChoices, PlanRequest
from kandinsky5.memory.plan import MemoryPlan, make_plan
from kandinsky5.memory.stage import StagePlan
from kandinsky5.memory.text_stages import EncoderUse
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, settle

WITHIN = 0.10
AUTO = PlanChoices()
WAITING = ", waiting"
"""How a plan names another stage's model that stays on the device meanwhile."""


@dataclass(frozen=True)
class PeakCase:
    """A job and a budget.

    Attributes:
        name: by which it is chosen.
        preset, width_px, height_px: the job; its size is the preset's where None.
        vram_gb, ram_gb: the budget.
        weights: of the transformer; ``auto`` leaves them to the plan.
        choices: what else is not left to the plan.
    """

    name: str
    preset: str
    vram_gb: float
    ram_gb: float
    weights: str = "auto"
    choices: PlanChoices = AUTO
    width_px: int | None = None
    height_px: int | None = None


CASES = (
    PeakCase("pro-sd-8gb", "pro-t2v-5s-sd", 8, 32, "int8"),
    PeakCase("pro-hd-24gb", "pro-t2v-10s-hd", 24, 32),
    PeakCase("lite-6gb", "lite-i2v-5s", 6, 32),
    PeakCase("image-4gb", "image-t2i", 4, 32),
    PeakCase("edit-4gb", "image-i2i", 4, 32),
    PeakCase("edit-6gb", "image-i2i", 6, 32),
    PeakCase("pro-sd-24gb", "pro-i2v-5s-sd", 24, 64),
)
"""The plans that have to fit, and others whose ways are not among those."""


def plan_peaks(*, case: str = "all") -> dict[str, Any]:
    """Predicted and counted peaks of several jobs and budgets.

    Args:
        case: the name of one of :data:`CASES`, or ``all``.

    Returns:
        JSON-ready: ``cases``, ``reached`` {fits, within_10_percent}, the circumstances.

    Raises:
        UserError: no such case.
    """
    chosen = [row for row in CASES if case in ("all", row.name)]
    if not chosen:
        raise UserError("case", case, f"all or one of {', '.join(row.name for row in CASES)}")
    rows = [count(row) for row in chosen]
    return {
        "benchmark": "plan-peaks",
        "cases": rows,
        "reached": {
            "fits": all(row["fits"] for row in rows),
            "within_10_percent": all(largest_error(row) <= WITHIN for row in rows),
        },
        **circumstances(),
    }


def count(case: PeakCase, stages: Iterable[str] = tuple(COUNTS)) -> dict[str, Any]:
    """One case: bytes as planned and as counted, and by what share the plan is above the count."""
    began, plan = time.monotonic(), planned(case)
    counted = {
        item.name: _compared(plan, item)
        for item in plan.stages
        if item.name in COUNTS and item.name in stages
    }
    denoise = plan.denoise
    told = ("weights", "source", "resident_blocks", "streamed_blocks", "chunk_tokens")
    return {
        "case": case.name,
        "preset": case.preset,
        "video": f"{plan.job.width_px}x{plan.job.height_px}, {plan.job.frames} frames",
        "vram_gb": case.vram_gb,
        "ram_gb": case.ram_gb,
        "fits": plan.fits,
        "tokens": plan.job.tokens,
        **{name: getattr(denoise, name) for name in told},
        "chunk_heads": denoise.chunk_heads,
        "text_encoder": _told(plan.text.encode),
        "writer": None if plan.text.expand is None else _told(plan.text.expand),
        "tiles": plan.decode_tiles.tiles,
        "stages": counted,
        "seconds": round(time.monotonic() - began, 1),
    }


def largest_error(row: dict[str, Any]) -> float:
    """Of a row's stages, in either direction."""
    return max(abs(stage["error"]) for stage in row["stages"].values())


def planned(case: PeakCase, *, steps: int | None = None) -> MemoryPlan:
    """The plan of a case, as ``k1.py plan`` makes it; of the preset's steps unless told otherwise."""
    preset = PRESETS[case.preset]
    width, height = preset.sizes_px[0]
    request, _ = settle(
        GenerationRequest(
            prompt="x",
            preset=case.preset,
            image="x.png" if preset.takes_image else None,
            width=case.width_px or width,
            height=case.height_px or height,
            weights=case.weights,
            steps=steps,
        )
    )
    job = PlanRequest.of(request, choices=case.choices)
    return make_plan(job, Budget.of_gb(case.vram_gb, case.ram_gb))


def bare_bytes(stage: StagePlan) -> int:
    """A stage's predicted device peak without what no count of its tensors can see."""
    sizes = {p.name: p.size_bytes for p in stage.vram if not p.name.endswith(WAITING)}
    assert sizes.pop("CUDA") == DEVICE_RESERVE_BYTES
    activations = sizes.pop("activations")
    return sum(sizes.values()) + round(activations / (1 + ALLOCATOR_SLACK))


def _told(use: EncoderUse) -> str:
    return f"{use.weights}, {use.source}"


def _compared(plan: MemoryPlan, item: StagePlan) -> dict[str, Any]:
    found = COUNTS[item.name](plan)
    return {
        "planned_bytes": bare_bytes(item),
        "counted_bytes": found,
        "error": round(bare_bytes(item) / found - 1.0, 4),
    }

"""What would make a job fit that does not: more memory, other settings, a smaller result. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from kandinsky5.memory.budget import GB, Budget
from kandinsky5.memory.demand import PlanRequest
from kandinsky5.memory.plan import fits
from kandinsky5.presets import PRESETS
from kandinsky5.request import RANGES, frames_of

TENTH = GB // 10


def remedies(job: PlanRequest, budget: Budget) -> tuple[str, ...]:
    """One line that begins "it would fit", or nothing where nothing helps."""
    ways = [
        *_more_memory(job, budget),
        *_other_settings(job, budget),
        *_smaller_results(job, budget),
    ]
    return (f"it would fit {'; or '.join(ways)}",) if ways else ()


def _more_memory(job: PlanRequest, budget: Budget) -> Iterator[str]:
    """The least of VRAM alone, of RAM alone, or of both."""
    vram = None if budget.on_cpu else _least(job, budget, "vram_bytes")
    ram = _least(job, budget, "ram_bytes")
    if vram is not None:
        yield f"in {vram:.1f} GB of VRAM"
    if ram is not None:
        yield f"in {ram:.1f} GB of RAM"
    if vram is None and ram is None and not budget.on_cpu:
        plenty = dataclasses.replace(budget, ram_bytes=round(RANGES["ram"][1] * GB))
        vram = _least(job, plenty, "vram_bytes")
        if vram is not None:
            enough = dataclasses.replace(budget, vram_bytes=round(vram * GB))
            ram = _least(job, enough, "ram_bytes")
            yield f"in {vram:.1f} GB of VRAM and {ram:.1f} GB of RAM"


def _least(job: PlanRequest, budget: Budget, name: str) -> float | None:
    """GB, to a tenth, of one budget with which the job fits; None where no amount is enough."""
    low = math.ceil(getattr(budget, name) / TENTH)
    high = round(RANGES[name.removesuffix("_bytes")][1] * GB / TENTH)

    def enough(tenths: int) -> bool:
        size_bytes = tenths * TENTH
        if name == "vram_bytes":
            return fits(job, dataclasses.replace(budget, vram_bytes=size_bytes))
        return fits(job, dataclasses.replace(budget, ram_bytes=size_bytes))

    if low >= high or not enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low / 10


def _other_settings(job: PlanRequest, budget: Budget) -> Iterator[str]:
    if job.guided and fits(dataclasses.replace(job, guided=False), budget):
        yield "without guidance"


def _smaller_results(job: PlanRequest, budget: Budget) -> Iterator[str]:
    """The largest of the trained sizes, and the longest whole number of seconds."""
    sizes = {
        size
        for row in PRESETS.values()
        if row.mode == PRESETS[job.preset].mode
        for size in row.sizes_px
    }
    area = job.width_px * job.height_px
    smaller = sorted((s for s in sizes if s[0] * s[1] < area), key=lambda s: (-s[0] * s[1], s))
    for width, height in smaller:
        if fits(dataclasses.replace(job, width_px=width, height_px=height), budget):
            yield f"at {width}×{height}"
            break
    if PRESETS[job.preset].is_video:
        for seconds in range(20, 0, -1):
            frames = frames_of(seconds)
            if frames < job.frames and fits(dataclasses.replace(job, frames=frames), budget):
                yield f"at {seconds} s"
                break

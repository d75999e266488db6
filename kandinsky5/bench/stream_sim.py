"""The streaming schedule on a virtual clock, with the times of real cards and with random ones (A3)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from kandinsky5.circumstances import circumstances
from kandinsky5.errors import UserError
from kandinsky5.family import TRANSFORMERS
from kandinsky5.memory.layout import spread
from kandinsky5.memory.simulate import Schedule, Timeline, simulate

PCIE4_GB_S = 25.0
NVME_GB_S = 6.0
STALL_LIMIT = 0.01
JITTER = 0.2
ROUNDING_S = 1e-6


@dataclass(frozen=True)
class Case:
    """A model on a machine.

    Attributes:
        title: for people.
        model, weights: what is streamed.
        compute_s: of one block, one evaluation.
        link_gb_s: main memory to device, page-locked.
        disk_gb_s: None where the weights wait in main memory.
        jitter: each time is drawn from 1 ± this.
    """

    title: str
    model: str
    weights: str
    compute_s: float
    link_gb_s: float = PCIE4_GB_S
    disk_gb_s: float | None = None
    jitter: float = 0.0


CASES = (
    Case("RTX 4090, 512×768, bf16", "pro", "bf16", 0.45),
    Case("RTX 4090, 512×768, int8", "pro", "int8", 0.14),
    Case("RTX 3090, 512×768, bf16", "pro", "bf16", 1.05),
    Case("RTX 4090, 512×768, bf16, from disk", "pro", "bf16", 0.45, disk_gb_s=NVME_GB_S),
    Case("RTX 4090, 512×768, int8, from disk", "pro", "int8", 0.14, disk_gb_s=NVME_GB_S),
    Case("RTX 4090, 512×768, int8, times ± 20 %", "pro", "int8", 0.14, jitter=JITTER),
    Case("image 1024², int8 on a fast card", "image", "int8", 0.003),
)
"""Times from the arithmetic of the project's targets: they are given, not measured."""


def stream_sim(
    *,
    steps: int = 10,
    slots: int = 2,
    resident: int = 0,
    schedules: int = 100,
    seed: int = 0,
    compute_ms: float | None = None,
    link_gb_s: float = PCIE4_GB_S,
    disk_gb_s: float | None = None,
) -> dict[str, Any]:
    """Run the streamer on a virtual clock.

    Args:
        steps: of each case.
        slots: buffers on the device.
        resident: blocks that stay there.
        schedules: how many of random times, to look for broken invariants.
        seed: of those times.
        compute_ms: measured time of one Pro block in int8; adds a case of its own.
        link_gb_s, disk_gb_s: of that case.

    Returns:
        JSON-ready: ``cases``; ``random`` {schedules, violations}; ``reached`` {A3}; the circumstances.

    Raises:
        UserError: a number that cannot be used.
    """
    if steps < 1 or slots < 1 or resident < 0 or schedules < 0:
        given = {"steps": steps, "slots": slots, "resident": resident, "schedules": schedules}
        raise UserError("bench", given, "at least 1 step and 1 slot, the others 0 or more")
    if not (link_gb_s > 0 and (disk_gb_s is None or disk_gb_s > 0) and (compute_ms or 1) > 0):
        raise UserError("bench", [compute_ms, link_gb_s, disk_gb_s], "times and rates above 0")
    cases = list(CASES)
    if compute_ms is not None:
        own = Case("as given", "pro", "int8", compute_ms / 1e3, link_gb_s, disk_gb_s)
        cases.append(own)
    rows = [case_row(case, steps, slots, resident, seed) for case in cases]
    faults = [fault for n in range(schedules) for fault in random_faults(seed + n)]
    return {
        "benchmark": "stream-sim",
        "slots": slots,
        "resident": resident,
        "steps": steps,
        "cases": rows,
        "random": {"schedules": schedules, "violations": faults},
        "reached": {"A3": not faults and all(row["holds"] for row in rows)},
        **circumstances(),
    }


def case_row(case: Case, steps: int, slots: int, resident: int, seed: int) -> dict[str, Any]:
    """One case and whether it keeps A3: the stall where computing takes longest, and the total."""
    shape = TRANSFORMERS[case.model]
    block_bytes = shape.visual_block_bytes(case.weights)
    copy_s = block_bytes / (case.link_gb_s * 1e9)
    read_s = 0.0 if case.disk_gb_s is None else block_bytes / (case.disk_gb_s * 1e9)
    blocks = shape.visual_blocks
    stay = spread(min(resident, blocks), blocks)
    chance = random.Random(seed)

    def about(seconds: float) -> float:
        return seconds * chance.uniform(1 - case.jitter, 1 + case.jitter)

    line = simulate(
        Schedule(
            compute_s=lambda step, index: about(case.compute_s),
            copy_s=lambda number: about(copy_s),
            read_s=(lambda number: about(read_s)) if case.disk_gb_s else None,
            blocks=blocks,
            steps=steps,
            slots=slots,
            resident=stay,
        )
    )
    slowest_s = max(copy_s, read_s)
    weights_s = (slowest_s if blocks - len(stay) > slots else 0.0) * (blocks - len(stay)) * steps
    limit_s = max(line.compute_s, weights_s * (1 + case.jitter))
    limit_s += max(case.compute_s, copy_s + read_s) * (1 + case.jitter)
    free = case.compute_s * (1 - case.jitter) >= slowest_s * (1 + case.jitter)
    stall = line.stall_s / line.compute_s
    within = line.total_s <= limit_s + ROUNDING_S
    return {
        "case": case.title,
        "model": case.model,
        "weights": case.weights,
        "compute_ms": round(case.compute_s * 1e3, 3),
        "copy_ms": round(copy_s * 1e3, 3),
        "read_ms": round(read_s * 1e3, 3),
        "total_s": round(line.total_s, 4),
        "stall_s": round(line.stall_s, 4),
        "stall_share": round(stall, 5),
        "streamed_over_resident": round(line.total_s / line.compute_s, 5),
        "holds": bool(within and not line.violations() and (stall <= STALL_LIMIT or not free)),
    }


def random_faults(seed: int) -> list[str]:
    """Broken invariants of one schedule whose every time, number and place is drawn."""
    chance = random.Random(seed)
    return random_timeline(chance).violations()


def random_timeline(chance: random.Random) -> Timeline:
    """A schedule of random times: long, short and none at all, in main memory or on a disk."""
    blocks = chance.randint(4, 24)

    def drawn() -> float:
        return chance.choice((0.0, chance.random(), 10 * chance.random()))

    return simulate(
        Schedule(
            compute_s=lambda step, index: drawn(),
            copy_s=lambda number: drawn(),
            read_s=chance.choice((None, lambda number: drawn())),
            blocks=blocks,
            steps=3,
            slots=chance.randint(1, 4),
            ring=chance.randint(1, 3),
            resident=spread(chance.randint(0, blocks), blocks),
            calls=chance.randint(1, 2),
            host_waits=chance.random() < 0.5,
        )
    )

"""What a visual block weighs, and what a guided step moves: counted on the meta device (A1, A2, A4, A11)."""

from __future__ import annotations

import math
from typing import Any

from kandinsky5.bench.blocks import FORMATS, MODULATION, empty_blocks, shape_of
from kandinsky5.circumstances import circumstances
from kandinsky5.errors import UserError
from kandinsky5.magcache import SkipRule, ratios_of, skips_of
from kandinsky5.memory.layout import BlockLayout, spread
from kandinsky5.memory.simulate import Schedule, simulate

PUBLISHED_PARAMETERS = {"pro": 306_254_336, "lite": 59_668_480, "image": 116_698_112}
"""Of one visual block, as counted from the published checkpoints."""
EXPECTED_MB = {
    ("pro", "bf16"): (612.0, 537.0),
    ("pro", "int8"): (344.0, 269.0),
    ("lite", "bf16"): (119.0, 103.0),
    ("lite", "int8"): (68.0, 51.5),
    ("image", "bf16"): (233.0, 210.0),
    ("image", "int8"): (129.0, 105.0),
}
"""One visual block with and without its modulation, with one scale for each row of a quantised weight."""
ROUNDING_MB = 0.6
TARGET_STEP_GB = 16.2
"""A guided step of Pro in int8, both evaluations."""
BRANCHES = 2
CACHED_PRESET, CACHED_STEPS, SKIPPED = "pro-t2v-5s-sd", 50, 52
"""Evaluations that MagCache skips of a guided schedule's hundred."""


def stream_bytes(*, slots: int = 2, resident: int = 0, steps: int = 3) -> dict[str, Any]:
    """Bytes per block from the models' own modules, bytes per guided step from the streamer itself.

    Args:
        slots: buffers on the device.
        resident: blocks that stay there.
        steps: of the schedule; the first one also brings the second one's first blocks, the last one none.

    Returns:
        JSON-ready: ``blocks`` and ``steps`` (a row for each model and format), ``cached`` (a whole schedule
        with MagCache), ``reached`` {A1, A2, A4, A11}, and the circumstances.

    Raises:
        UserError: a number that cannot be used.
    """
    if slots < 1 or resident < 0 or steps < 2:
        given = {"slots": slots, "resident": resident, "steps": steps}
        raise UserError("bench", given, "at least 1 slot, 0 resident blocks and 2 steps")
    blocks = [block_row(model, weights) for model, weights in EXPECTED_MB]
    moved = [
        step_row(model, weights, slots=slots, resident=resident, steps=steps)
        for model in ("pro", "lite", "image")
        for weights in FORMATS
    ]
    pro = next(row for row in moved if (row["model"], row["weights"]) == ("pro", "int8"))
    cached = cached_row("pro", "int8", slots=slots, resident=resident)
    return {
        "benchmark": "stream-bytes",
        "blocks": blocks,
        "steps": moved,
        "cached": cached,
        "reached": {
            "A1": all(row["as_expected"] for row in blocks),
            "A2": pro["h2d_bytes"] <= TARGET_STEP_GB * 1e9 and pro["d2h_bytes"] == 0,
            "A4": all(row["modulation_bytes"] == 0 for row in moved),
            "A11": cached["skipped"] == SKIPPED
            and cached["h2d_bytes"] == cached["steps_computed"] * pro["h2d_bytes"],
        },
        **circumstances(),
    }


def block_row(model: str, weights: str) -> dict[str, Any]:
    """One visual block: parameters and bytes, and whether they are those expected."""
    shape = shape_of(model)
    block = empty_blocks(shape, weights, count=1)[0]
    whole, streamed = BlockLayout.of(block), BlockLayout.of(block, skip=(MODULATION,))
    scales = [entry for entry in whole.entries if entry.name.endswith("_scales")]
    parameters = sum(math.prod(entry.shape) for entry in whole.entries if entry not in scales)
    # The targets count one scale a row; the scales of further groups of inputs come on top.
    grouped_bytes = sum(entry.nbytes - entry.nbytes // entry.shape[-1] for entry in scales)
    found = ((whole.tensor_bytes - grouped_bytes), (streamed.tensor_bytes - grouped_bytes))
    expected = EXPECTED_MB[model, weights]
    near = all(abs(f / 1e6 - e) <= ROUNDING_MB for f, e in zip(found, expected, strict=True))
    return {
        "model": model,
        "weights": weights,
        "parameters": parameters,
        "with_modulation_bytes": whole.tensor_bytes,
        "streamed_bytes": streamed.tensor_bytes,
        "of_which_group_scales_bytes": grouped_bytes,
        "slot_bytes": streamed.nbytes,
        "all_blocks_bytes": shape.visual_blocks * streamed.tensor_bytes,
        "as_expected": near and parameters == PUBLISHED_PARAMETERS[model],
    }


def step_row(model: str, weights: str, *, slots: int, resident: int, steps: int) -> dict[str, Any]:
    """What a guided step moves, told by a streamer that really ran a whole schedule."""
    shape = shape_of(model)
    blocks = empty_blocks(shape, weights)
    layouts = [BlockLayout.of(block, skip=(MODULATION,)) for block in blocks]
    schedule = Schedule(
        compute_s=lambda step, index: 1.0,
        copy_s=lambda number: 0.5,
        blocks=len(blocks),
        steps=steps,
        slots=slots,
        resident=spread(min(resident, len(blocks)), len(blocks)),
        calls=BRANCHES,
    )
    total = simulate(schedule, blocks, layouts).traffic
    names = [entry for layout in layouts for entry in layout.entries]
    return {
        "model": model,
        "weights": weights,
        "slots": slots,
        "resident": len(schedule.resident),
        "evaluations": BRANCHES,
        "loads": total.loads / steps,
        "h2d_bytes": total.h2d_bytes / steps,
        "d2h_bytes": total.d2h_bytes,
        "schedule_h2d_bytes": total.h2d_bytes,
        "modulation_bytes": sum(e.nbytes for e in names if e.name.startswith(MODULATION)),
    }


def cached_row(model: str, weights: str, *, slots: int, resident: int) -> dict[str, Any]:
    """A whole guided schedule with MagCache: a step in which nothing is evaluated calls no block.

    The streamer is told how many passes there are, as the sampler tells it, and moves nothing for others.
    """
    ratios = ratios_of(CACHED_PRESET)
    assert ratios is not None
    plan = skips_of(ratios, [BRANCHES] * CACHED_STEPS, SkipRule())
    computed = sum(not all(skips) for skips in plan)
    row = step_row(model, weights, slots=slots, resident=resident, steps=computed)
    return {
        "preset": CACHED_PRESET,
        "steps": CACHED_STEPS,
        "evaluations": BRANCHES * CACHED_STEPS,
        "skipped": sum(map(sum, plan)),
        "steps_computed": computed,
        "h2d_bytes": row["schedule_h2d_bytes"],
        "d2h_bytes": row["d2h_bytes"],
    }

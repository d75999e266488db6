"""What holds for every plan, whatever the job and the budgets."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from kandinsky5.errors import UserError
from kandinsky5.memory.budget import GB, Budget
from kandinsky5.memory.demand import PlanChoices, PlanRequest
from kandinsky5.memory.plan import MemoryPlan, fits, lowered, make_plan
from kandinsky5.memory.vae_stages import decode_bytes, decode_options
from kandinsky5.presets import PRESETS
from tests.memory.plans import job_of
from vae_tiling import TilePlan

GIGABYTES = st.floats(3, 96, allow_nan=False)
MEMORY = st.tuples(st.one_of(GIGABYTES, st.none()), GIGABYTES)
STAGES = ("expand", "encode text", "encode image", "denoise", "decode")


@st.composite
def jobs(draw: st.DrawFn) -> PlanRequest:
    """Any preset in any of its sizes, with what else matters for memory."""
    preset = draw(st.sampled_from(sorted(PRESETS.values(), key=lambda row: row.name)))
    return job_of(
        preset.name,
        size=draw(st.sampled_from(preset.sizes_px)),
        seconds=draw(st.sampled_from((1, 5, 10, 20))) if preset.is_video else None,
        guidance=draw(st.sampled_from((1.0, 5.0))),
        steps=draw(st.sampled_from((1, 16, 50, 1000))),
        expand=draw(st.booleans()),
        weights=draw(st.sampled_from(("auto", "bf16", "int8", "fp8"))),
    )


@settings(max_examples=100, deadline=None)
@given(jobs(), MEMORY)
def test_a_plan_that_fits_is_within_its_budgets(
    job: PlanRequest, memory: tuple[float | None, float]
) -> None:
    budget = Budget.of_gb(*memory)
    if not fits(job, budget):
        return
    plan = make_plan(job, budget)
    assert plan.fits
    assert plan.peak_vram_bytes <= (budget.vram_bytes or 0)
    assert plan.peak_ram_bytes <= budget.ram_bytes
    blocks = job.models.transformer.visual_blocks
    assert plan.denoise.resident_blocks + plan.denoise.streamed_blocks == blocks
    assert (plan.denoise.slots >= 2) == (plan.denoise.streamed_blocks > 0)
    assert plan == make_plan(job, budget)


@settings(max_examples=200, deadline=None)
@given(jobs(), GIGABYTES, GIGABYTES, st.floats(0, 48), st.floats(0, 48))
def test_more_memory_is_never_slower(
    job: PlanRequest, vram: float, ram: float, more_vram: float, more_ram: float
) -> None:
    small, large = Budget.of_gb(vram, ram), Budget.of_gb(vram + more_vram, ram + more_ram)
    if not fits(job, small):
        return
    assert fits(job, large)
    before, after = make_plan(job, small), make_plan(job, large)
    assert before.text.expand is None or after.text.expand is not None
    # The prompt that a small budget leaves as it is may take its time with a large one.
    stages = {item.name for item in before.stages}
    added = sum(item.seconds for item in after.stages if item.name not in stages)
    assert after.seconds - added <= before.seconds + 1e-3


@st.composite
def choices(draw: st.DrawFn, job: PlanRequest) -> PlanChoices:
    """One or two things that the user decides."""
    blocks, heads = job.models.transformer.visual_blocks, job.models.transformer.heads
    possible = {
        "weights": st.sampled_from(("bf16", "int8")),
        "source": st.sampled_from(("resident", "pinned", "disk")),
        "resident_blocks": st.integers(0, blocks),
        "slots": st.integers(2, blocks),
        "chunk_tokens": st.integers(1, 100_000),
        "chunk_heads": st.integers(1, heads),
    }
    names = draw(st.lists(st.sampled_from(sorted(possible)), min_size=1, max_size=2, unique=True))
    return PlanChoices(**{name: draw(possible[name]) for name in names})


@settings(max_examples=60, deadline=None)
@given(st.data(), jobs(), MEMORY)
def test_a_choice_is_obeyed_or_refused_by_name_with_the_reason(
    data: st.DataObject, job: PlanRequest, memory: tuple[float | None, float]
) -> None:
    budget, chosen = Budget.of_gb(*memory), data.draw(choices(job))
    job = dataclasses.replace(job, choices=dataclasses.replace(job.choices, weights=None))
    wanted = dataclasses.replace(job, choices=chosen)
    try:
        plan = make_plan(wanted, budget)
    except UserError as refusal:
        assert set(refusal.field.split(", ")) <= set(chosen.made)
        assert refusal.allowed
        if "auto fits" in refusal.allowed:
            assert fits(job, budget)
        return
    if not plan.fits:
        assert plan.problems
        return
    found, streams = vars(plan.denoise), plan.denoise.streamed_blocks > 0
    plain = {"fp32": "bf16"}  # what computes in float32 has its bf16 weights so
    for name, value in chosen.made.items():
        if name != "slots" or streams:
            assert plain.get(found[name], found[name]) == value, name


@settings(max_examples=10, deadline=None)
@given(jobs(), st.floats(0.5, 3))
def test_what_does_not_fit_has_problems_that_say_so(job: PlanRequest, vram: float) -> None:
    budget = Budget(round(vram * GB), 3 * GB)
    plan = make_plan(job, budget)
    assert plan.fits == fits(job, budget)
    assert bool(plan.problems) == (not plan.fits)


@settings(max_examples=50, deadline=None)
@given(jobs(), MEMORY, st.sampled_from(STAGES))
def test_every_ladder_goes_down_and_ends(
    job: PlanRequest, memory: tuple[float | None, float], stage: str
) -> None:
    budget = Budget.of_gb(*memory)
    if not fits(job, budget):
        return
    plan = make_plan(job, budget)
    for _ in range(40):
        below = lowered(plan, stage)
        if below is None:
            return
        assert below.peak_vram_bytes <= plan.peak_vram_bytes
        assert below.peak_ram_bytes <= budget.ram_bytes
        plan = below
    raise AssertionError("no end")


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 128).map(lambda n: 16 * n), st.sampled_from((256, 512, 1024)))
def test_tiles_of_any_side_asked_for_share_what_their_seams_need(
    tile_px: int, side_px: int
) -> None:
    """64 px, or half of a smaller tile; ``tests/vae_tiling/test_every_size.py`` decodes with such tiles."""
    job = dataclasses.replace(
        job_of("pro-t2v-5s-sd", PlanChoices(vae_tile=tile_px, vae_tiling="rolling")),
        width_px=side_px,
        height_px=side_px,
    )
    (option,) = decode_options(job, Budget.of_gb(96, 96))
    tiles = option.settings
    assert max(tiles.largest_tile) * 8 == min(tile_px, side_px)
    shared_px = min(64, tile_px // 2 // 8 * 8)
    assert shared_px >= 32
    assert all(span.lead * 8 >= shared_px for span in (*tiles.rows[1:], *tiles.columns[1:]))


def test_a_lower_way_to_decode_takes_less_and_what_waits_meanwhile_is_reckoned() -> None:
    plan: MemoryPlan | None = make_plan(job_of("pro-t2v-5s-sd"), Budget.of_gb(24, 32))
    rungs: list[TilePlan] = []
    while plan is not None:
        if plan.decode_tiles not in rungs:  # at first only what waits on the device leaves
            rungs.append(plan.decode_tiles)
        (stage,) = (item for item in plan.stages if item.name == "decode")
        waiting_bytes = sum(part.size_bytes for part in stage.ram if part.name == "samples")
        assert (waiting_bytes > 1e9) == (plan.decode_tiles.tiles > 1)
        job, plan = plan.job, lowered(plan, "decode")
    peaks = [decode_bytes(job, tiles) for tiles in rungs]
    assert all(below < above for above, below in pairwise(peaks))
    assert rungs[-1].tiles > 2

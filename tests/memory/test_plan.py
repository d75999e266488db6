"""Memory plans: what must fit, what they say, and what they never do."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from typing import Any

import pytest

from kandinsky5.errors import UserError
from kandinsky5.family import TRANSFORMERS, TransformerShape
from kandinsky5.memory.budget import GB, Budget
from kandinsky5.memory.demand import PlanChoices, PlanRequest
from kandinsky5.memory.denoise_stages import evaluation_flops
from kandinsky5.memory.plan import MemoryPlan, lowered, make_plan
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, settle
from tests.memory.plans import job_of, plan_of

LITE = [name for name, preset in PRESETS.items() if preset.model == "lite"]
IMAGE = [name for name, preset in PRESETS.items() if preset.model == "image"]


@pytest.mark.parametrize(
    ("preset", "vram", "ram", "values"),
    [
        ("pro-t2v-5s-sd", 8, 32, {"weights": "int8"}),
        ("pro-t2v-5s-sd", 6, 32, {"weights": "int8"}),
        ("pro-t2v-10s-hd", 24, 32, {}),
        ("pro-t2v-10s-hd", 14, 32, {}),
        ("pro-i2v-5s-hd", 12, 16, {}),
        *((name, 6, 32, {}) for name in LITE),
        *((name, 4, 32, {}) for name in IMAGE),
        ("demo-t2v", 1, 4, {}),
    ],
)
def test_what_must_fit_fits(preset: str, vram: float, ram: float, values: dict[str, Any]) -> None:
    plan = plan_of(preset, vram, ram, **values)
    assert plan.fits, plan.problems
    assert plan.peak_vram_bytes <= vram * GB
    assert plan.peak_ram_bytes <= ram * GB


def test_both_evaluations_of_pro_in_int8_share_one_pass_of_16_gb() -> None:
    """A2, and the figures by which it is reckoned."""
    choices = PlanChoices(resident_blocks=0)
    plan = plan_of("pro-t2v-5s-sd", 8, 32, weights="int8", choices=choices)
    pro = TRANSFORMERS["pro"]
    assert plan.denoise.block_bytes == pytest.approx(269.6e6, rel=0.001)
    assert plan.denoise.streamed_bytes_per_step == 60 * pro.visual_block_bytes("int8")
    assert plan.job.step_table_bytes == 2 * ((9 * 60 + 2) * 4096 * 4 + 256 * 4096 * 2)
    total = plan.denoise.streamed_bytes_per_step + plan.job.step_table_bytes
    assert 16.1e9 < total <= 16.2e9


def test_guidance_costs_no_more_streaming() -> None:
    with_it = plan_of("pro-t2v-5s-sd", 8, 32, choices=PlanChoices(resident_blocks=0))
    without = plan_of("pro-t2v-5s-sd", 8, 32, guidance=1.0, choices=PlanChoices(resident_blocks=0))
    bytes_per_step = without.denoise.streamed_bytes_per_step
    assert with_it.denoise.streamed_bytes_per_step == bytes_per_step


@pytest.mark.parametrize(
    ("preset", "values", "tokens", "teraflops"),
    [
        ("lite-t2v-5s-sft", {}, 47_616, 660),
        ("lite-t2v-10s-sft", {"attention": "sdpa"}, 93_696, 2_289),
        ("pro-t2v-5s-sd", {}, 47_616, 3_584),
        ("pro-t2v-10s-sd", {"attention": "sdpa"}, 93_696, 11_296),
        ("pro-t2v-5s-hd", {"attention": "sdpa"}, 126_976, 19_461),
        ("pro-t2v-5s-hd", {"attention": "sdpa", "size": (1280, 768)}, 119_040, 17_316),
        ("pro-t2v-10s-hd", {"attention": "sdpa"}, 249_856, 68_476),
        ("image-t2i", {}, 4_096, 47),
    ],
)
def test_the_work_is_that_of_the_specifications_table(
    preset: str, values: dict[str, Any], tokens: int, teraflops: float
) -> None:
    job = job_of(preset, **values)
    assert job.tokens == tokens
    assert evaluation_flops(job) / 1e12 == pytest.approx(teraflops, rel=0.02)


def test_auto_is_bf16_where_it_fits_and_int8_where_it_would_come_from_disk() -> None:
    assert plan_of("pro-t2v-5s-sd", 80, 64).denoise.weights == "bf16"
    assert plan_of("pro-t2v-5s-sd", 24, 64).denoise.weights == "bf16"
    small = plan_of("pro-t2v-5s-sd", 8, 24).denoise
    assert (small.weights, small.source) == ("int8", "pinned")


def test_a_file_in_int8_stays_int8() -> None:
    job = dataclasses.replace(job_of("pro-t2v-5s-sd"), file_weights="int8")
    assert make_plan(job, Budget.of_gb(80, 128)).denoise.weights == "int8"


def test_with_room_for_all_nothing_is_streamed_and_everything_stays() -> None:
    plan = plan_of("pro-t2v-5s-sd", 96, 128)
    assert plan.denoise.source == "resident"
    assert (plan.denoise.resident_blocks, plan.denoise.streamed_blocks) == (60, 0)
    assert plan.denoise.streamed_bytes_per_step == plan.denoise.pinned_bytes == 0
    assert set(plan.homes.values()) == {"device"}


def test_too_little_ram_for_the_blocks_means_reading_from_disk_and_saying_so() -> None:
    plan = plan_of("pro-t2v-5s-sd", 8, 8)
    assert plan.fits
    assert (plan.denoise.source, plan.denoise.weights) == ("disk", "bf16")
    assert plan.denoise.pinned_bytes == plan.denoise.ring * plan.denoise.block_bytes < 1.7e9
    assert any("read from disk" in notice for notice in plan.notices)
    assert any("k1.py convert" in notice for notice in plan.notices)
    converted = dataclasses.replace(job_of("pro-t2v-5s-sd"), file_weights="int8")
    quicker = make_plan(converted, Budget.of_gb(8, 8))
    assert (quicker.denoise.source, quicker.denoise.weights) == ("disk", "int8")
    assert quicker.seconds < plan.seconds
    assert not any("k1.py convert" in notice for notice in quicker.notices)


def test_encoding_stays_exact_while_expanding_may_be_nf4() -> None:
    plan = plan_of("pro-t2v-5s-sd", 8, 32)
    assert plan.text.expand is not None
    assert (plan.text.expand.weights, plan.text.encode.weights) == ("nf4", "bf16")
    assert plan.text.encode.source != "resident"
    whole = plan_of("pro-t2v-5s-sd", 24, 32).text
    assert whole.expand is not None
    assert whole.expand.source == whole.encode.source == "resident"


def test_without_expansion_there_is_no_such_stage() -> None:
    names = [item.name for item in plan_of("pro-i2v-5s-sd", 8, 32, expand=False).stages]
    assert names == ["encode text", "encode image", "prepare", "denoise", "decode"]


def test_many_steps_need_a_larger_table_in_ram() -> None:
    few, many = (plan_of("pro-t2v-5s-sd", 8, 64, steps=steps) for steps in (50, 1000))
    vectors = [
        {part.name: part.size_bytes for part in plan.stages[-2].ram}["vectors of all steps"]
        for plan in (few, many)
    ]
    assert vectors[1] == 20 * vectors[0] > 20e9
    assert many.fits


def test_without_a_card_main_memory_is_all_there_is() -> None:
    plan = plan_of("demo-t2v", None, 4)
    assert plan.fits
    assert plan.peak_vram_bytes == 0
    large = plan_of("pro-t2v-5s-sd", None, 16, expand=False)
    assert large.fits
    assert large.denoise.source == "disk"
    assert large.peak_ram_bytes <= 16 * GB


@pytest.mark.parametrize(
    "choices",
    [
        PlanChoices(weights="bf16"),
        PlanChoices(weights="int8"),
        PlanChoices(text_weights="nf4"),
        PlanChoices(source="disk"),
        PlanChoices(source="pinned"),
        PlanChoices(resident_blocks=0),
        PlanChoices(resident_blocks=7),
        PlanChoices(slots=4),
        PlanChoices(chunk_tokens=1000),
        PlanChoices(chunk_heads=5),
        PlanChoices(vae_tile=256),
    ],
    ids=lambda choices: str(choices.made),
)
def test_a_choice_is_obeyed(choices: PlanChoices) -> None:
    plan = plan_of("pro-t2v-5s-sd", 12, 48, choices=choices)
    assert plan.fits
    tile_px = max(plan.to_dict()["vae_tile_px"])
    found = {**vars(plan.denoise), "text_weights": plan.text.encode.weights, "vae_tile": tile_px}
    assert {name: found[name] for name in choices.made} == choices.made


def test_a_request_makes_every_choice_that_a_plan_knows() -> None:
    wanted = PlanChoices(
        weights="int8",
        text_weights="nf4",
        source="disk",
        resident_blocks=7,
        slots=4,
        chunk_tokens=1000,
        chunk_heads=5,
        vae_tile=256,
        vae_tiling="rolling",
    )
    assert set(wanted.made) == set(vars(wanted)), "one is left out here"
    values = {"preset": "pro-t2v-5s-sd", "prompt": "x", **wanted.made}
    request, _ = settle(GenerationRequest.from_dict(values))
    assert PlanRequest.of(request).choices == wanted
    first = PlanRequest.of(request, choices=PlanChoices(weights="bf16", slots=3)).choices
    assert first == dataclasses.replace(wanted, weights="bf16", slots=3)
    untouched, _ = settle(GenerationRequest(preset="pro-t2v-5s-sd", prompt="x"))
    assert PlanRequest.of(untouched).choices == PlanChoices()


@pytest.mark.parametrize(
    ("choices", "vram", "ram", "field"),
    [
        (PlanChoices(resident_blocks=40), 8, 32, "resident_blocks"),
        (PlanChoices(source="resident"), 8, 64, "source"),
        (PlanChoices(source="pinned"), 8, 8, "source"),
        (PlanChoices(weights="bf16", source="pinned"), 8, 24, "weights"),
        (PlanChoices(text_weights="nf4"), 5.5, 5, "text_weights"),
        (PlanChoices(chunk_tokens=47_616), 4, 32, "chunk_tokens"),
        (PlanChoices(slots=30), 8, 32, "slots"),
        (PlanChoices(vae_tile=4096), 3.5, 32, "vae_tile"),
    ],
    ids=lambda value: str(value.made) if isinstance(value, PlanChoices) else None,
)
def test_a_choice_that_cannot_be_met_is_refused_with_the_reason(
    choices: PlanChoices, vram: float, ram: float, field: str
) -> None:
    with pytest.raises(UserError, match="GB of V?RAM, .* GB are given; auto fits") as refusal:
        plan_of("pro-t2v-5s-sd", vram, ram, weights=choices.weights or "int8", choices=choices)
    assert refusal.value.field == field


@pytest.mark.parametrize(
    "choices",
    [
        PlanChoices(weights="int4"),
        PlanChoices(source="cloud"),
        PlanChoices(resident_blocks=61),
        PlanChoices(resident_blocks=-1),
        PlanChoices(slots=1),
        PlanChoices(chunk_tokens=0),
        PlanChoices(chunk_heads=33),
    ],
    ids=lambda choices: str(choices.made),
)
def test_a_choice_that_is_none_is_refused_at_once(choices: PlanChoices) -> None:
    with pytest.raises(UserError):
        job_of("pro-t2v-5s-sd", choices)


@pytest.mark.parametrize(
    ("choices", "vram", "field", "allowed"),
    [
        (
            PlanChoices(resident_blocks=58),
            80,
            "resident_blocks",
            "0 to 57 beside 2 slots, or all 60",
        ),
        (PlanChoices(source="disk", resident_blocks=60), 80, "resident_blocks", "0 to 57 beside"),
        (PlanChoices(source="resident", resident_blocks=3), 80, "resident_blocks", "60 with all"),
        (PlanChoices(source="disk", slots=60), 80, "source", "none is streamed through 60 slots"),
        (PlanChoices(source="pinned"), None, "source", "resident or disk on a CPU"),
    ],
    ids=lambda value: str(value.made) if isinstance(value, PlanChoices) else None,
)
def test_choices_that_contradict_each_other_are_refused_whatever_the_memory(
    choices: PlanChoices, vram: float | None, field: str, allowed: str
) -> None:
    with pytest.raises(UserError) as refusal:
        plan_of("pro-t2v-5s-sd", vram, 512, choices=choices)
    assert (refusal.value.field, allowed in refusal.value.allowed) == (field, True)


@pytest.mark.parametrize(
    ("vram", "ram"),
    [(0, 32), (-8, 32), (0.4, 32), (1025, 32), (8, 0), (8, -1), (8, 5000), (float("nan"), 8)],
)
def test_a_budget_out_of_range_is_refused_with_the_range(vram: float, ram: float) -> None:
    with pytest.raises(UserError, match="from 0.5 to"):
        Budget.of_gb(vram, ram)
    with pytest.raises(UserError, match="from 0.5 to"):
        Budget(vram * GB, ram * GB)  # type: ignore[arg-type]  # what a caller might hand over


def test_a_budget_beyond_the_machine_is_told() -> None:
    budget = Budget(24 * GB, 64 * GB, machine_vram_bytes=12 * GB, machine_ram_bytes=32 * GB)
    notices = make_plan(job_of("demo-t2v"), budget).notices
    assert "VRAM" in notices[0]
    assert "12.0 GB" in notices[0]
    assert "32.0 GB" in notices[1]


def test_what_does_not_fit_is_named_with_what_would() -> None:
    plan = plan_of("pro-t2v-10s-hd", 4, 32)
    assert not plan.fits
    assert any(line.startswith("denoise needs ") for line in plan.problems)
    remedy = plan.problems[-1]
    assert remedy.startswith("it would fit in ")
    needed = float(remedy.removeprefix("it would fit in ").split()[0])
    assert plan_of("pro-t2v-10s-hd", needed, 32).fits
    assert not plan_of("pro-t2v-10s-hd", needed - 0.1, 32).fits
    assert "; or at " in remedy


def test_both_budgets_may_have_to_grow() -> None:
    remedy = plan_of("pro-t2v-5s-sd", 2, 2).problems[-1]
    assert "GB of VRAM and " in remedy


def ladder(plan: MemoryPlan, stage: str) -> list[MemoryPlan]:
    rungs = []
    below = lowered(plan, stage)
    while below is not None:
        rungs.append(below)
        below = lowered(below, stage)
        assert len(rungs) < 40
    return rungs


@pytest.mark.parametrize("stage", ["expand", "encode text", "encode image", "denoise", "decode"])
@pytest.mark.parametrize(("vram", "ram"), [(96, 128), (24, 32), (20, 16)])
def test_each_lower_plan_takes_less_in_the_stage_that_ran_out(
    stage: str, vram: float, ram: float
) -> None:
    plan = plan_of("pro-i2v-5s-sd", vram, ram)

    def peak(rung: MemoryPlan) -> int:
        # the last way to take less for expanding is to leave it out
        return next((item.peak_vram_bytes for item in rung.stages if item.name == stage), 0)

    peaks = [peak(rung) for rung in (plan, *ladder(plan, stage))]
    assert all(low <= high for high, low in pairwise(peaks))
    assert peaks[-1] < peaks[0]


def test_the_ladder_ends_with_no_block_resident_and_small_chunks() -> None:
    plan = plan_of("pro-t2v-5s-sd", 96, 32)
    assert plan.denoise.source == "resident"
    last = ladder(plan, "denoise")[-1]
    assert last.denoise.resident_blocks == 0
    assert (last.denoise.chunk_tokens, last.denoise.chunk_heads) == (1024, 8)
    assert last.denoise.source == "disk"  # bf16 blocks do not fit into 32 GB of RAM
    assert last.denoise.ring == 3


def test_a_stage_that_cannot_shrink_has_no_lower_plan() -> None:
    plan = dataclasses.replace(plan_of("pro-t2v-5s-sd", 8, 32), homes={})
    assert lowered(plan, "prepare") is None


def test_a_model_of_other_dimensions_is_planned_by_its_own() -> None:
    tiny = TransformerShape("custom", 128, 512, 64, 1, 2, (16, 24, 24))
    job = job_of("pro-t2v-5s-sd")
    job = dataclasses.replace(job, models=dataclasses.replace(job.models, transformer=tiny))
    plan = make_plan(job, Budget.of_gb(8, 16))
    assert plan.fits
    assert plan.denoise.source == "resident"
    assert plan.job.models.transformer.name == "custom"
    assert [rung.denoise.resident_blocks for rung in ladder(plan, "denoise")][-1] == 2


def test_the_document_has_the_keys_others_rely_on() -> None:
    document = json.loads(json.dumps(plan_of("pro-t2v-5s-sd", 8, 32).to_dict()))
    assert document["fits"] is True
    assert document["resident_blocks"] + document["streamed_blocks"] == 60
    assert document["tokens"] == 47_616
    assert document["vae_tiles"] >= 1
    assert document["problems"] == []
    streamed = document["streamed_blocks"] * document["block_bytes"]
    assert document["streamed_bytes_per_step"] == streamed
    assert max(s["peak_vram_bytes"] for s in document["stages"]) == document["peak_vram_bytes"]
    assert max(s["peak_ram_bytes"] for s in document["stages"]) == document["peak_ram_bytes"]
    for stage in document["stages"]:
        assert sum(stage["vram"].values()) == stage["peak_vram_bytes"]

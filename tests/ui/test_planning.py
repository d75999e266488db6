"""The page's plan of memory, and what it expects of a job."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from PIL import Image

from kandinsky5.errors import UserError
from kandinsky5.memory.budget import GB, Budget
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest
from kandinsky5.ui import choices, form, planning
from kandinsky5.ui.fields import FIELDS
from kandinsky5.ui.model_files import FilesTold
from kandinsky5.ui.planning import PLAN_FIELDS, Planner, job_for, request_for
from kandinsky5.worker.jobs import JobSnapshot

CARD = {"name": "NVIDIA GeForce RTX 4090", "total_bytes": 25 * GB, "free_bytes": 24 * GB}


class Machine:
    """Stands in for the doctor's report."""

    def __init__(self, *cards: dict[str, Any], known: bool = True) -> None:
        self._report = {"cards": list(cards)} if known else None

    def report(self, timeout_s: float = 0.0) -> Any:
        return self._report


@pytest.fixture(autouse=True)
def a_machine_of_64_gb(monkeypatch):
    monkeypatch.setattr(planning, "memory_bytes", lambda: (64 * GB, 50 * GB))


def values(preset: str = "demo-t2v", **changes: Any) -> dict[str, Any]:
    filled = {field.name: field.default for field in FIELDS}
    filled |= {**choices.preset_values(PRESETS[preset]), "preset": preset}
    named = {name: filled[name] for name in PLAN_FIELDS}
    return {**form.settings_of(named, PRESETS[preset]), **changes}


def outlook(*cards: dict[str, Any], history=(), files=planning.NO_FILES, **changes: Any):
    return Planner(Machine(*cards)).outlook(values(**changes), history, files)


def done(**changes: Any) -> JobSnapshot:
    made = {"seconds": {"denoise": 30.0, "decode": 6.0, "total": 36.0}, "width": 64, "height": 64}
    request = GenerationRequest(prompt="a").to_dict()
    return JobSnapshot(
        **{"id": "a", "state": "done", "request": request, "result": made, **changes}
    )


def test_nothing_is_planned_before_the_machine_is_known():
    assert Planner(Machine(known=False)).outlook(values()) is None


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("cards", [(), (CARD,)])
def test_the_defaults_of_every_preset_have_a_plan(name, cards):
    assert outlook(*cards, preset=name).plan.fits


@pytest.mark.parametrize("vram", [None, 24.0])
@pytest.mark.parametrize("name", ["demo-t2v", "lite-i2v-5s", "pro-t2v-10s-hd", "image-t2i"])
def test_it_is_the_plan_that_the_worker_makes(name, vram, monkeypatch):
    torch = pytest.importorskip("torch")
    from kandinsky5.pipeline import planning as of_worker

    budget = Budget.of_gb(vram, 32)
    monkeypatch.setattr(of_worker, "budget_for", lambda request: (budget, ()))
    request, _ = request_for(values(name))
    device, dtype = ("cpu", torch.float32) if vram is None else ("cuda", torch.bfloat16)
    made = of_worker.plan_of(request, None, "bf16", device=torch.device(device), dtype=dtype)
    assert job_for(request, budget) == made.job
    assert planning.make_plan(made.job, budget) == made


def test_what_is_free_is_the_budget_until_another_is_given():
    budget = outlook(CARD).plan.budget
    assert (budget.vram_bytes, budget.ram_bytes) == (24 * GB, 50 * GB)
    budget = outlook(CARD, vram=8, ram=16).plan.budget
    assert (budget.vram_bytes, budget.ram_bytes) == (8 * GB, 16 * GB)


def test_what_the_worker_holds_is_the_next_jobs_to_use(monkeypatch):
    monkeypatch.setattr(planning, "held_bytes", {77: 9 * GB, 0: 0}.__getitem__)
    planner = Planner(Machine(), worker_pid=lambda: 77)
    assert planner.outlook(values()).plan.budget.ram_bytes == 59 * GB


def test_a_studio_told_to_use_the_cpu_leaves_the_card_out():
    seen = Planner(Machine(CARD), device="cpu").outlook(values())
    assert seen.card is None
    assert seen.plan.budget.on_cpu


def test_without_a_card_a_budget_for_one_is_said_to_be_of_no_use():
    assert planning.NO_CARD in outlook(vram=8).notices
    assert outlook().notices == ()


def test_a_size_that_follows_from_the_image_is_planned_for_the_trained_one():
    seen = outlook(preset="lite-i2v-5s", width=None, height=None)
    assert (seen.plan.job.width_px, seen.plan.job.height_px) == (768, 512)
    assert "768 × 512" in seen.notices[0]


@pytest.mark.parametrize(
    ("preset", "picture", "size"),
    [
        ("lite-i2v-5s", (1600, 900), (832, 464)),
        ("lite-i2v-5s", (900, 1600), (464, 832)),
        ("image-i2i", (1000, 1000), (1024, 1024)),
    ],
)
def test_a_given_picture_decides_the_size_as_it_does_in_the_worker(tmp_path, preset, picture, size):
    from kandinsky5.picture_sizes import size_for_picture

    path = tmp_path / "given.png"
    Image.new("RGB", picture).save(path)
    asked = {"preset": preset, "image": str(path), "width": None, "height": None}
    seen = outlook(**asked)
    assert (seen.plan.job.width_px, seen.plan.job.height_px) == size
    assert planning.OF_THE_GIVEN.format(*size) in seen.notices
    request = GenerationRequest(preset=preset, prompt="a", image=str(path))
    assert size == size_for_picture(*picture, request)
    nabla = outlook(**asked, attention="nabla").plan.job
    assert (nabla.width_px % 128, nabla.height_px % 128, nabla.sparse) == (0, 0, True)


def test_a_checkpoint_of_ones_own_is_planned_with_its_own_dimensions_and_format():
    config = {
        "model_dim": 2560,
        "ff_dim": 10240,
        "time_dim": 512,
        "num_text_blocks": 2,
        "num_visual_blocks": 50,
        "axes_dims": (32, 48, 48),
        "in_visual_dim": 16,
        "out_visual_dim": 16,
        "visual_cond": True,
        "in_text_dim": 3584,
        "in_text_dim2": 768,
    }
    files = FilesTold({"dit": {"config": config, "weights": "int8"}})
    seen = outlook(CARD, dit="/mine.safetensors", files=files)
    assert seen.plan.job.models.transformer.visual_blocks == 50
    assert seen.plan.job.file_weights == "int8"
    assert seen.notices == ()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (FilesTold(pending=True), planning.OF_THE_PRESET),
        (FilesTold({"dit": {"problem": "an LFS pointer"}}), planning.NOT_OF_THE_FILE),
    ],
)
def test_a_checkpoint_that_is_not_known_is_said_not_to_be_planned_with(files, said):
    assert outlook(dit="/models/mine.safetensors", files=files).notices == (said,)


def test_a_prompt_that_is_written_already_needs_no_expanding():
    stages = {True: [], False: []}
    for written in stages:
        text = "A fox." if written else ""
        plan = outlook(CARD, preset="lite-t2v-5s-sft", expanded_prompt=text).plan
        stages[written] = [stage.name for stage in plan.stages]
    assert "expand" in stages[False]
    assert "expand" not in stages[True]


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"ram": 0.1}, {"vram": -1}, {"seconds": float("nan")}, {"preset": "x"}]
)
def test_a_value_that_cannot_be_is_named(wrong):
    with pytest.raises(UserError) as caught:
        Planner(Machine(CARD)).outlook({**values(), **wrong})
    assert caught.value.field in wrong


def test_past_runs_of_this_machine_tell_the_time():
    seen = outlook(history=[done()])
    assert (seen.past_runs, seen.expected_s) == (1, pytest.approx(36.0, rel=0.01))
    twice = outlook(history=[done()], steps=48)
    assert twice.expected_s == pytest.approx(66.0, rel=0.1)


@pytest.mark.parametrize(
    "other",
    [
        {"state": "stopped"},
        {"result": None},
        {"result": {"seconds": {"total": 1.0}}},
        {"result": {"seconds": {"denoise": 1.0}, "evaluations_skipped": 4}},
        {"request": {"preset": "of another version"}},
        {"request": {}},
    ],
)
def test_runs_that_tell_nothing_are_left_out(other):
    seen = outlook(history=[done(**other)])
    assert (seen.past_runs, seen.expected_s) == (0, None)


def test_runs_of_another_model_say_nothing_and_a_card_has_its_rates():
    seen = outlook(CARD, preset="pro-t2v-5s-sd", history=[done()])
    assert seen.past_runs == 0
    assert seen.expected_s == seen.plan.seconds > 60


def test_the_middle_of_the_newest_runs_counts():
    slow = dataclasses.replace(
        done(), id="slow", result={**done().result, "seconds": {"denoise": 900.0}}
    )
    history = [done(id="a"), slow, done(id="b")]
    assert outlook(history=history).expected_s == pytest.approx(36.0, rel=0.01)

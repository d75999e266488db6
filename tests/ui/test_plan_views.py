"""The memory plan as a fragment of the page."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from kandinsky5.memory.budget import GB, Budget
from kandinsky5.memory.plan import make_plan
from kandinsky5.presets import PRESETS
from kandinsky5.ui.plan_views import SYSTEM_PARTS, WEIGHT_PARTS, kind_of, no_plan, plan_view
from kandinsky5.ui.planning import Outlook, job_for, request_for

WORK_PARTS = {
    "activations",
    "frames",
    "key-value cache",
    "latent",
    "latents",
    "narrow features",
    "samples",
    "staging",
    "texts of all steps",
    "unpacked matrix",
    "vectors of all steps",
    "vectors of one step",
}


def planned(preset: str, vram: float | None, ram: float = 64, **changes: Any) -> Outlook:
    given = dict.fromkeys(("width", "height", "seconds", "steps", "guidance", "dit", "vram", "ram"))
    given["expand"] = True
    formats = {"weights": "auto", "text_weights": "auto"}
    request, _ = request_for({"preset": preset, **given, **formats, **changes})
    budget = Budget.of_gb(vram, ram)
    plan = make_plan(job_for(request, budget), budget)
    return Outlook(plan, card=None if vram is None else "a card")


@pytest.mark.parametrize("vram", [None, 8, 24, 96])
@pytest.mark.parametrize("name", ["demo-i2v", "lite-i2v-5s", "pro-t2v-5s-hd", "image-i2i"])
def test_every_part_of_a_plan_has_its_colour(name, vram):
    known = {*WORK_PARTS, *SYSTEM_PARTS, *WEIGHT_PARTS}
    for stage in planned(name, vram).plan.stages:
        for part in (*stage.vram, *stage.ram):
            assert part.name in known or kind_of(part.name) == "waiting", part.name


def test_a_stage_is_as_long_as_it_takes_of_the_card():
    outlook = planned("pro-t2v-5s-sd", 12, 24)
    page = plan_view(outlook)
    rows = re.findall(r'<li title="Paint:.*?</li>', page)
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", rows[0])]
    (paint,) = (item for item in outlook.plan.stages if item.name == "denoise")
    assert sum(widths) == pytest.approx(100 * paint.peak_vram_bytes / (12 * GB), abs=0.1)
    assert len(widths) == len(paint.vram)
    assert 'class="k1-over"' not in page
    assert "47,616 tokens" in page
    assert "int8 weights" in page
    assert re.search(r"\d+ of 60 blocks stay on the GPU, the others come from RAM", page)
    assert re.search(r"[\d.]+ GB moved in a step", page)


def test_a_card_larger_than_the_budget_shows_where_the_budget_ends():
    outlook = planned("pro-t2v-5s-sd", 12)
    budget = replace(outlook.plan.budget, machine_vram_bytes=24 * GB)
    page = plan_view(replace(outlook, plan=replace(outlook.plan, budget=budget)))
    assert '<b style="left:50.00%"></b>' in page
    assert "k1-m-limit" in page


def test_what_does_not_fit_is_marked_and_what_would_is_said():
    page = plan_view(planned("pro-t2v-10s-hd", 6))
    assert 'data-fits="no"' in page
    assert '<li class="k1-over" title="Paint:' in page
    assert "Paint needs" in page
    assert "It would fit in" in page
    assert "about" not in page


def test_the_demo_on_a_cpu_is_told_in_a_line_without_a_picture():
    page = plan_view(planned("demo-t2v", None))
    assert "Fits in memory" in page
    assert "of 64.0 GB RAM" in page
    for absent in ("VRAM", "k1-stack", "moved", "blocks", "GPU"):
        assert absent not in page


def test_a_large_model_on_a_cpu_shows_where_the_memory_goes():
    assert "RAM by stage" in plan_view(planned("lite-t2v-5s-sft", None, 32))


@pytest.mark.parametrize(
    ("seconds", "runs", "text", "source"),
    [
        (4.2, 3, "about 4.0 s", "3 runs here"),
        (83.0, 1, "about 1 min 25 s", "1 run here"),
        (3000.0, 0, "about 50 min", "RTX 4090"),
    ],
)
def test_the_time_is_rounded_and_says_where_it_comes_from(seconds, runs, text, source):
    outlook = replace(planned("pro-t2v-5s-sd", 24), expected_s=seconds, past_runs=runs)
    page = plan_view(outlook)
    assert text in page
    assert source in page


def test_while_the_machine_is_not_known_the_page_says_so():
    assert "looking at this machine" in plan_view(None)


def test_texts_are_inert():
    hostile = "<script>alert(1)</script> ${7}"
    pages = [
        no_plan(hostile),
        plan_view(replace(planned("pro-t2v-5s-sd", 24), card=hostile, notices=(hostile,))),
    ]
    for page in pages:
        assert "<script" not in page
        assert "${" not in page


def test_every_preset_is_drawn():
    for name in PRESETS:
        assert plan_view(planned(name, 24))

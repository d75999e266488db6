"""In what weights the text encoder encodes and writes, and when it does not write at all."""

from __future__ import annotations

import dataclasses

import pytest

from kandinsky5.family import QWEN_7B, TextEncoderShape
from kandinsky5.memory.budget import GB, Budget
from kandinsky5.memory.demand import PlanChoices, PlanRequest
from kandinsky5.memory.plan import MemoryPlan, lowered, make_plan
from kandinsky5.memory.text_stages import MAX_EXPANSION_S, EncoderUse, is_worthwhile
from tests.memory.plans import job_of

PRO = "pro-t2v-5s-sd"
BF16 = ("bf16",)


def job(choice: str | None = None, *, formats: tuple[str, ...] = ("bf16", "nf4")) -> PlanRequest:
    made = job_of(PRO, PlanChoices(text_weights=choice), weights="int8")
    return dataclasses.replace(made, text_formats=formats)


def plan(vram: float | None, ram: float, choice: str | None = None, **options) -> MemoryPlan:
    return make_plan(job(choice, **options), Budget.of_gb(vram, ram))


def stage(made: MemoryPlan, name: str):
    return next(item for item in made.stages if item.name == name)


def said(made: MemoryPlan) -> str:
    return "\n".join(made.notices)


@pytest.mark.parametrize("vram", [18, 24, 48, 96])
def test_bf16_is_taken_for_both_where_it_fits_whole(vram: float) -> None:
    text = plan(vram, 64).text
    assert text.encode == text.expand == EncoderUse("bf16", "resident")


@pytest.mark.parametrize("vram", [8, 12, 16])
def test_a_card_too_small_for_bf16_writes_in_nf4_whole(vram: float) -> None:
    made = plan(vram, 64)
    assert made.text.expand == EncoderUse("nf4", "resident")
    assert made.text.encode.weights == "bf16"
    assert stage(made, "expand").peak_vram_bytes < 7.4 * GB


@pytest.mark.parametrize("vram", [4, 6])
def test_a_smaller_card_writes_in_nf4_streamed_from_ram(vram: float) -> None:
    made = plan(vram, 32)
    assert made.text.expand == EncoderUse("nf4", "pinned", 2)
    assert made.text.encode.weights == "bf16"
    assert "once a token: about 48 s" in said(made)


@pytest.mark.parametrize(("vram", "ram"), [(4, 32), (6, 16), (8, 16), (24, 64), (None, 64)])
def test_encoding_is_in_bf16_unless_nf4_is_asked_for(vram: float | None, ram: float) -> None:
    assert plan(vram, ram).text.encode.weights in ("bf16", "fp32")
    wanted = plan(vram, ram, "nf4").text
    assert wanted.encode.weights == "nf4"
    assert wanted.expand is None or wanted.expand.weights == "nf4"
    assert wanted.encode.source != "disk"


def test_the_bytes_are_those_of_its_tensors() -> None:
    """Linear layers at half a byte and a float32 for 64 weights; tables, norms and biases in bf16."""
    parts = {part.name: part.size_bytes for part in stage(plan(8, 64), "expand").vram}
    linear = 28 * 233_046_016
    tables = 2 * 152_064 * 3584
    plain = 28 * (3584 + 2 * 512 + 2 * 3584) + 3584
    assert parts["text encoder"] == linear // 2 + linear // 64 * 4 + 2 * (tables + plain)
    assert parts["text encoder"] == pytest.approx(5.85e9, rel=0.001)
    assert parts["unpacked matrix"] == 2 * 3584 * 18944
    streamed = {part.name: part.size_bytes for part in stage(plan(4, 32), "expand").vram}
    assert streamed["slots"] == 2 * 131_111_936


def test_what_is_not_quantised_takes_four_bytes_where_float32_is_computed() -> None:
    in_float32 = dataclasses.replace(job("nf4"), dtype="fp32")
    parts = {
        part.name: part.size_bytes
        for part in stage(make_plan(in_float32, Budget.of_gb(None, 32)), "encode text").ram
    }
    assert parts["token table"] == 4 * QWEN_7B.embedding_parameters
    assert parts["text encoder"] == QWEN_7B.total_bytes("nf4", 4, generating=False, pictures=False)


# When the prompt is not expanded


@pytest.mark.parametrize(
    ("source", "seconds", "worthwhile"),
    [
        ("resident", 10.0, True),
        ("pinned", 38.0, True),
        ("pinned", MAX_EXPANSION_S, True),
        ("pinned", 134.0, False),
        ("resident", 800.0, False),
        ("disk", 557.0, False),
        ("disk", 1.0, False),
    ],
)
def test_writing_from_disk_or_for_more_than_two_minutes_is_not_worthwhile(
    source: str, seconds: float, worthwhile: bool
) -> None:
    assert is_worthwhile(source, seconds) == worthwhile


def test_without_nf4_a_small_card_leaves_the_prompt_as_it_is_and_says_why() -> None:
    made = plan(8, 64, formats=BF16)
    assert made.fits
    assert made.text.expand is None
    assert "expand" not in {item.name for item in made.stages}
    assert "streamed from RAM for each of 256 tokens, would take about 134 s" in said(made)
    assert "pip install bitsandbytes" in said(made)


def test_bf16_asked_for_is_obeyed_and_its_price_said() -> None:
    made = plan(8, 64, "bf16")
    assert made.text.expand is None
    assert "text weights on auto" in said(made)


def test_an_encoder_that_would_come_from_disk_does_not_write() -> None:
    made = plan(4, 6)
    assert made.text.encode.source == "disk"
    assert made.text.expand is None
    assert "streamed from disk" in said(made)
    on_cpu = plan(None, 16)
    assert on_cpu.text.encode.source == "disk"
    assert on_cpu.text.expand is None
    assert "not expanded" in said(on_cpu)


def test_a_cpu_with_room_for_the_whole_encoder_writes() -> None:
    made = plan(None, 64)
    assert made.text.expand is not None
    assert made.text.expand.source == "resident"
    assert "not expanded" not in said(made)


def test_a_cpu_does_not_write_in_nf4_and_is_not_given_it_unasked() -> None:
    assert plan(None, 16).text.encode.weights != "nf4"
    made = plan(None, 16, "nf4")
    assert made.text.expand is None
    assert "unpacked" in said(made)
    assert "takes minutes to quantise" in said(made)


def test_no_room_to_write_is_said() -> None:
    made = plan(3.1, 6)
    assert made.fits, made.problems
    assert made.text.expand is None
    assert "no room for the text encoder to write" in said(made)


def test_a_prompt_that_is_not_to_be_expanded_is_none_to_talk_about() -> None:
    made = make_plan(dataclasses.replace(job(), expand=False), Budget.of_gb(4, 6))
    assert made.text.expand is None
    assert "expanded" not in said(made)


def test_a_small_encoder_writes_from_ram_without_nf4() -> None:
    small = TextEncoderShape("custom", 512, 12, 128, 2048, 32_000, 0, tied=True)
    models = dataclasses.replace(job().models, text_encoder=small)
    made = make_plan(dataclasses.replace(job(formats=BF16), models=models), Budget.of_gb(4, 8))
    assert made.text.expand is not None


def test_when_memory_runs_out_while_writing_less_is_taken_until_nothing_is_written() -> None:
    made: MemoryPlan | None = plan(24, 64)
    ways = []
    while made is not None:
        ways.append(made.text.expand)
        made = lowered(made, "expand") if made.text.expand is not None else None
    named = [(way.weights, way.source) for way in ways if way is not None]
    assert named[0] == ("bf16", "resident")
    assert ("nf4", "resident") in named
    assert named[-1] == ("nf4", "pinned")
    assert ways[-1] is None


def test_an_encoder_is_known_again_by_its_dimensions() -> None:
    values = {name: value for name, value in vars(QWEN_7B).items() if name != "name"}
    assert TextEncoderShape.of_dimensions(values) is QWEN_7B
    assert TextEncoderShape.of_dimensions({**values, "layers": 3}).name == "custom"

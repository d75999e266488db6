"""What the text encoder is counted to allocate: whole answers, and every part of them."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest

from kandinsky5.bench.plan_peaks import WITHIN, PeakCase, bare_bytes, planned
from kandinsky5.bench.text_counts import (
    WritingBytes,
    encode_text_bytes,
    expand_bytes,
    writing_bytes,
)
from kandinsky5.family import QWEN_7B, TextEncoderShape
from kandinsky5.memory.budget import Budget, Speeds
from kandinsky5.memory.demand import PlanChoices
from kandinsky5.memory.plan import MemoryPlan, make_plan
from kandinsky5.memory.text_stages import EncoderUse, TextPlan

SMALL = TextEncoderShape("custom", 256, 4, 128, 640, 3000, QWEN_7B.vision_parameters)
WHOLE, STREAMED = EncoderUse("bf16", "resident"), EncoderUse("bf16", "pinned", 2)
NF4 = EncoderUse("nf4", "resident")
TEXT_ALONE, WITH_PICTURE = "image-t2i", "image-i2i"
FAST_LINK = Speeds(link_bytes_per_s=60e9)
TOKENS = 8
TOWER_OUTPUT = 5120
"""Values of a position before the vision tower's last layer."""


@cache
def plan_of(preset: str, **options: object) -> MemoryPlan:
    return planned(PeakCase("case", preset, 24, 64, **options))


def small_plan(preset: str, expand: EncoderUse, **changes: object) -> MemoryPlan:
    """With a small encoder, which is used so."""
    plan, shape = plan_of(preset), dataclasses.replace(SMALL, **changes)
    models = dataclasses.replace(plan.job.models, text_encoder=shape)
    job = dataclasses.replace(plan.job, models=models, width_px=128, height_px=192)
    return dataclasses.replace(plan, job=job, text=TextPlan(WHOLE, expand))


def small_count(
    preset: str = TEXT_ALONE, use: EncoderUse = WHOLE, **changes: object
) -> WritingBytes:
    return writing_bytes(small_plan(preset, use, **changes), tokens=TOKENS)


def predicted(plan: MemoryPlan, stage: str) -> int:
    return bare_bytes(next(item for item in plan.stages if item.name == stage))


def parts_of(plan: MemoryPlan, stage: str) -> dict[str, int]:
    item = next(item for item in plan.stages if item.name == stage)
    return {part.name: part.size_bytes for part in item.vram}


@pytest.mark.parametrize(
    "use", [WHOLE, STREAMED, NF4], ids=lambda use: f"{use.weights} {use.source}"
)
def test_passes_that_are_left_out_take_no_more_than_those_that_are_run(use: EncoderUse) -> None:
    plan = small_plan(TEXT_ALONE, use)
    every = writing_bytes(plan, tokens=TOKENS, every_pass=True)
    assert writing_bytes(plan, tokens=TOKENS) == every


def test_the_same_with_a_picture() -> None:
    plan = small_plan(WITH_PICTURE, STREAMED)
    every = writing_bytes(plan, tokens=TOKENS, every_pass=True)
    assert writing_bytes(plan, tokens=TOKENS) == every


def test_each_token_that_is_written_adds_its_keys_and_values() -> None:
    plan = small_plan(TEXT_ALONE, WHOLE)
    few, many = (writing_bytes(plan, tokens=tokens) for tokens in (TOKENS, TOKENS + 1000))
    token_bytes = 2 * 2 * SMALL.layers * SMALL.key_value_dim
    assert few.weights == many.weights
    assert few.reading == many.reading
    # and, while a layer's keys are lengthened, those before
    assert 0 <= many.writing - few.writing - 1000 * token_bytes <= 1000 * token_bytes / SMALL.layers


def test_the_output_layer_and_its_logits_count() -> None:
    few, many = (small_count(vocabulary=words) for words in (100_000, 300_000))
    assert many.weights - few.weights == 200_000 * 2 * 2 * SMALL.hidden  # and the token table
    # as they come, in float32, and in float32 those of the token before
    assert many.writing - few.writing == 200_000 * (2 + 4 + 4)


def test_a_tied_output_layer_is_not_there_twice() -> None:
    table = 2 * SMALL.vocabulary * SMALL.hidden
    assert small_count().weights - small_count(tied=True).weights == table


def test_a_streamed_encoder_has_slots_and_its_table_elsewhere() -> None:
    whole, streamed = small_count(), small_count(use=STREAMED)
    table = 2 * SMALL.vocabulary * SMALL.hidden
    layer = SMALL.layer_bytes("bf16")
    assert whole.weights - streamed.weights == table + SMALL.layers * layer
    assert streamed.writing - whole.writing == pytest.approx(2 * layer, rel=0.01)


def test_nf4_unpacks_a_matrix_to_read_and_none_to_write() -> None:
    wide = {"intermediate": 16 * SMALL.hidden, "hidden": 2 * SMALL.hidden}
    plain, packed = small_count(**wide), small_count(use=NF4, **wide)
    matrix = 2 * wide["intermediate"] * wide["hidden"]
    values = 2 * wide["intermediate"] * 641  # the widest tensor that is not there at that time
    assert matrix - values <= packed.reading - plain.reading <= matrix
    assert packed.writing == plain.writing
    shape = dataclasses.replace(SMALL, **wide)
    saved = shape.layer_bytes("bf16") - shape.layer_bytes("nf4")
    assert plain.weights - packed.weights == SMALL.layers * saved


def test_an_encoder_that_sees_has_a_tower_and_reads_the_picture() -> None:
    text, picture = small_count(), small_count(WITH_PICTURE)
    narrower = (QWEN_7B.hidden - SMALL.hidden) * (TOWER_OUTPUT + 1)
    assert picture.weights - text.weights == 2 * (QWEN_7B.vision_parameters - narrower)
    marks, cells = 3, 2 * 3
    token_bytes = 2 * 2 * SMALL.layers * SMALL.key_value_dim
    assert picture.writing - text.writing >= (cells + marks) * token_bytes
    assert picture.reading > text.reading


# The published encoder


@pytest.mark.parametrize("preset", [TEXT_ALONE, WITH_PICTURE])
def test_an_answers_end_takes_within_a_tenth_the_keys_and_values_of_its_plan(preset: str) -> None:
    plan = plan_of(preset)
    assert plan.text.expand == WHOLE
    cache_bytes = parts_of(plan, "expand")["key-value cache"]
    assert cache_bytes == pytest.approx(writing_bytes(plan).writing, rel=WITHIN)


def test_what_comes_and_goes_beside_nf4_through_slots_is_predicted() -> None:
    plan = planned(PeakCase("slots", TEXT_ALONE, 4, 32))
    assert plan.text.expand == EncoderUse("nf4", "pinned", 2)
    parts, counted = parts_of(plan, "expand"), writing_bytes(plan)
    staying = parts["vision tower, output layer"] + parts["CLIP"]
    assert staying == pytest.approx(counted.weights, rel=0.001)
    assert predicted(plan, "expand") - staying == pytest.approx(counted.reading, rel=WITHIN)


@pytest.mark.parametrize("size", [(2048, 2048), (64, 2048)])
def test_pictures_of_every_shape_are_predicted(size: tuple[int, int]) -> None:
    job = dataclasses.replace(plan_of(WITH_PICTURE).job, width_px=size[0], height_px=size[1])
    plan = make_plan(job, Budget.of_gb(48, 64))
    weights = job.models.text_encoder.total_bytes("bf16", generating=False, pictures=True)
    weights += job.models.clip.total_bytes
    counted = encode_text_bytes(plan) - weights
    assert predicted(plan, "encode text") - weights == pytest.approx(counted, rel=WITHIN)


def test_nf4_that_is_asked_for_is_predicted_in_both_stages() -> None:
    case = PeakCase("nf4", WITH_PICTURE, 12, 64, choices=PlanChoices(text_weights="nf4"))
    plan = planned(case)
    assert plan.text.encode.weights == "nf4"
    assert predicted(plan, "encode text") == pytest.approx(encode_text_bytes(plan), rel=WITHIN)
    assert predicted(plan, "expand") == pytest.approx(expand_bytes(plan), rel=WITHIN)


def test_writing_in_bf16_through_slots_is_predicted() -> None:
    job = dataclasses.replace(plan_of(WITH_PICTURE).job, text_formats=("bf16",))
    plan = make_plan(job, dataclasses.replace(Budget.of_gb(8, 64), speeds=FAST_LINK))
    assert plan.text.expand == STREAMED
    assert predicted(plan, "expand") == pytest.approx(expand_bytes(plan), rel=WITHIN)


def test_a_plan_that_does_not_expand_has_nothing_to_count() -> None:
    plan = small_plan(TEXT_ALONE, WHOLE)
    with pytest.raises(ValueError, match="does not expand"):
        expand_bytes(dataclasses.replace(plan, text=TextPlan(WHOLE)))

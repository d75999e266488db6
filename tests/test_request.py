"""One request for page, command line, queue and metadata: what it accepts, refuses and keeps through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kandinsky5.errors import UserError
from kandinsky5.presets import PRESETS, NablaSettings
from kandinsky5.request import (
    CHOICES,
    MAX_PROMPT_CHARACTERS,
    MAX_SEED,
    RANGES,
    REQUEST_VERSION,
    GenerationRequest,
    LoraChoice,
    frames_of,
    latent_shape,
    nabla_of,
    settle,
)
from kandinsky5.request_values import VAE_TILE_STEP_PX

HINTS = typing.get_type_hints(GenerationRequest)
INTEGERS = {name for name in RANGES if HINTS[name] in (int, int | None)}
OPTIONAL = {item.name for item in dataclasses.fields(GenerationRequest) if item.default is None}


def refused(**values: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        GenerationRequest(**{"prompt": "a red circle", **values})
    return caught.value


def numbers(name: str) -> st.SearchStrategy[float | int]:
    low, high = RANGES[name]
    if name in INTEGERS:
        step = VAE_TILE_STEP_PX if name == "vae_tile" else 1
        return st.integers(math.ceil(low / step), int(high) // step).map(lambda n: n * step)
    return st.floats(low, high, allow_nan=False)


prompts = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=60)
requests = st.builds(
    GenerationRequest,
    preset=st.sampled_from(sorted(PRESETS)),
    prompt=prompts.filter(str.strip),
    negative_prompt=st.just("") | prompts,
    clip_prompt=st.none() | prompts,
    image=st.none() | st.text(max_size=20),
    loras=st.lists(
        st.builds(LoraChoice, st.text(max_size=20), st.floats(-10, 10, allow_nan=False))
    ).map(tuple),
    expand=st.booleans(),
    device=st.sampled_from(["auto", "cpu", "cuda", "cuda:1"]),
    **{name: st.sampled_from(allowed) for name, allowed in CHOICES.items()},
    **{name: st.none() | numbers(name) for name in RANGES if name in OPTIONAL},
    **{name: numbers(name) for name in RANGES if name not in OPTIONAL},
)


@given(requests)
def test_a_request_survives_json(request_: GenerationRequest) -> None:
    text = json.dumps(request_.to_dict())
    assert GenerationRequest.from_dict(json.loads(text)) == request_


def test_an_old_file_with_few_keys_takes_the_defaults() -> None:
    assert GenerationRequest.from_dict({"prompt": "x"}) == GenerationRequest(prompt="x")


def test_a_request_cannot_be_changed() -> None:
    request_ = GenerationRequest(prompt="x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        request_.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("prompt", ["", "  \n\t"])
def test_an_empty_prompt_is_said(prompt: str) -> None:  # fault 23
    error = refused(prompt=prompt)
    assert error.field == "prompt"
    assert "describe" in str(error)


@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "clip_prompt"])
def test_nul_is_said(field: str) -> None:  # fault 23
    error = refused(**{field: "a\0b"})
    assert (error.field, "NUL" in str(error)) == (field, True)


@pytest.mark.parametrize(
    "prompt", ["🟥 moves ➡", "<script>alert(1)</script>", "{} {0} %s", "красный круг"]
)
def test_any_other_text_is_a_prompt(prompt: str) -> None:  # fault 23
    assert GenerationRequest(prompt=prompt).prompt == prompt


def test_an_endless_prompt_is_refused_in_one_line() -> None:
    error = refused(prompt="x" * (MAX_PROMPT_CHARACTERS + 1))
    assert str(MAX_PROMPT_CHARACTERS) in str(error)
    assert len(str(error)) < 300


@pytest.mark.parametrize("field", ["width", "height"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 10**6, 63, 512.5, "512", True])
def test_impossible_sizes_are_refused_with_the_range(field: str, value: object) -> None:  # fault 24
    error = refused(**{field: value})
    assert error.field == field
    assert "64 to 2048" in str(error)


def test_a_size_off_the_grid_is_snapped_with_a_notice() -> None:  # fault 24
    request_ = GenerationRequest(preset="lite-t2v-5s-sft", prompt="x", width=641, height=359)
    settled, notices = settle(request_)
    assert (settled.width, settled.height) == (640, 352)
    assert [notice.split()[0] for notice in notices] == ["width", "height"]
    assert all(word in notices[0] for word in ("641", "640", "16"))


@given(width=st.integers(64, 2048), height=st.integers(64, 2048))
def test_snapped_sides_are_multiples_within_the_limits(width: int, height: int) -> None:
    for name in ("lite-t2v-5s-sft", "pro-t2v-5s-hd"):
        request_ = GenerationRequest(preset=name, prompt="x", width=width, height=height)
        settled, notices = settle(request_)
        assert settled.width and settled.height
        for before, after in ((width, settled.width), (height, settled.height)):
            multiple = PRESETS[name].multiple_px
            assert after % multiple == 0
            assert multiple <= after <= 2048
            assert abs(after - before) <= multiple
        assert bool(notices) == ((settled.width, settled.height) != (width, height))


def test_thirty_seconds_are_refused_with_the_range() -> None:  # fault 24
    assert "to 21" in str(refused(seconds=30))


def test_lengths_come_in_sixths_of_a_second() -> None:
    settled, notices = settle(GenerationRequest(preset="lite-t2v-5s-sft", prompt="x", seconds=1.1))
    assert settled.seconds == pytest.approx(7 / 6)
    assert len(notices) == 1
    assert frames_of(settled.seconds) == 29


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("steps", 0, "1 to 1000"),
        ("steps", 2.5, "without a fraction"),
        ("guidance", math.nan, "1 to 30"),
        ("guidance", 0.5, "1 to 30"),
        ("shift", 0, "0.1 to 100"),
        ("seed", -5, "0 to"),
        ("seed", 2**70, "0 to"),
        ("seed", 10**400, "0 to"),
        ("vram", 0, "0.5 to"),
        ("crf", 52, "0 to 51"),
    ],
)
def test_a_number_out_of_range_is_refused_at_its_field(
    field: str, value: object, allowed: str
) -> None:  # fault 25
    error = refused(**{field: value})
    assert error.field == field
    assert allowed in str(error)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    GenerationRequest(prompt="x", seed=MAX_SEED, steps=1, guidance=1, shift=0.1, seconds=21)
    assert GenerationRequest(prompt="x", steps=20.0).steps == 20


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_that_is_none_names_the_choices(name: str) -> None:
    error = refused(**{name: "best"})
    assert error.field == name
    assert all(choice in str(error) for choice in CHOICES[name])


def test_an_unknown_preset_names_the_known_ones() -> None:
    assert "lite-t2v-5s-sft" in str(refused(preset="lite"))


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:1", ""])
def test_an_unknown_device_is_refused(device: str) -> None:
    assert refused(device=device).field == "device"


def refused_job(values: dict[str, Any]) -> UserError:
    with pytest.raises(UserError) as caught:
        GenerationRequest.from_dict(values)
    return caught.value


def test_every_unknown_key_of_a_job_file_is_named() -> None:  # fault 35
    unknown = {f"a_rather_long_name_for_key_{number}": "x" * 50 for number in range(20)}
    error = refused_job({"prompt": "x", **unknown})
    assert (error.field, error.given) == ("request", unknown)
    assert all(repr(key) in str(error) for key in unknown)
    assert "negative_prompt" in error.allowed


def test_every_wrong_key_is_named_with_what_is_allowed() -> None:  # fault 35
    wrong = {"steps": "many", "seed": -5, "weights": "best", "colour": "red", "version": 99}
    error = refused_job({"seconds": 1, "prompt": "x", **wrong})
    assert (error.field, error.given) == ("request", wrong)
    said = (
        f"version: version {REQUEST_VERSION} or older",
        "steps: a number from 1 to 1000",
        "seed: a number from 0 to",
        "weights: one of auto, bf16",
        "unknown keys: 'colour'",
    )
    assert all(part in error.allowed for part in said)
    assert "seconds:" not in str(error)
    assert "\n" not in str(error)


def test_a_prompt_that_is_missing_is_said_beside_the_wrong_keys() -> None:
    assert refused_job({}).field == "prompt"
    error = refused_job({"steps": 0})
    assert "prompt: describe" in error.allowed and "steps: a number" in error.allowed


def test_thousands_of_unknown_keys_are_counted_in_one_short_line() -> None:
    error = refused_job({"prompt": "x", **{f"\x1b{number}" * 100: 1 for number in range(5000)}})
    assert "and 4900 more" in error.allowed
    assert "\x1b" not in str(error)
    assert len(str(error)) < 10_000


@pytest.mark.parametrize("version", [REQUEST_VERSION + 1, 0, "1", None, 1.5, True])
def test_a_version_from_elsewhere_is_refused(version: object) -> None:  # fault 35
    with pytest.raises(UserError) as caught:
        GenerationRequest.from_dict({"version": version, "prompt": "x"})
    assert caught.value.field == "version"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 5),
        ("prompt", None),
        ("steps", "20"),
        ("seed", [1]),
        ("expand", "no"),
        ("loras", "style.safetensors"),
        ("loras", [{"file": "style.safetensors"}]),
        ("loras", [{"path": 3}]),
        ("loras", [{"path": "a", "strength": "much"}]),
        ("loras", [{"path": "a", "strength": 11}]),
        ("image", {}),
        ("width", {}),
    ],
)
def test_a_value_of_the_wrong_type_names_its_key(field: str, value: object) -> None:  # fault 35
    with pytest.raises(UserError) as caught:
        GenerationRequest.from_dict({"prompt": "x", field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("values", [[], "prompt", None, 3])
def test_a_job_that_is_no_object_is_refused(values: Any) -> None:  # fault 35
    with pytest.raises(UserError):
        GenerationRequest.from_dict(values)


def test_an_image_is_asked_for_where_it_is_needed_and_refused_where_not() -> None:
    with pytest.raises(UserError, match="needs an input image"):
        settle(GenerationRequest(preset="demo-i2v", prompt="x"))
    with pytest.raises(UserError, match="takes no image"):
        settle(GenerationRequest(preset="demo-t2v", prompt="x", image="a.png"))


def test_a_preset_fills_what_was_left_open_and_nothing_else() -> None:
    settled, _ = settle(GenerationRequest(preset="lite-t2v-5s-distilled", prompt="x", steps=4))
    assert (settled.steps, settled.guidance, settled.shift) == (4, 1.0, 5.0)
    assert (settled.width, settled.height, settled.seconds) == (768, 512, 5.0)
    assert settled.seed is None
    assert latent_shape(settled) == (31, 64, 96)


def test_size_follows_the_image_when_none_is_given() -> None:
    settled, _ = settle(GenerationRequest(preset="lite-i2v-5s", prompt="x", image="a.png"))
    assert (settled.width, settled.height) == (None, None)


def test_settling_twice_changes_nothing() -> None:
    once, _ = settle(GenerationRequest(prompt="x", width=100, seconds=0.9))
    assert settle(once) == (once, ())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"preset": "lite-t2v-5s-sft"}, None),
        ({"preset": "lite-t2v-10s-sft"}, NablaSettings(0.9, 11, 3, 3)),
        ({"preset": "pro-t2v-5s-hd"}, NablaSettings(0.8, 11, 3, 3)),
        ({"preset": "pro-t2v-5s-hd", "attention": "sdpa"}, None),
        ({"preset": "lite-t2v-5s-sft", "attention": "nabla"}, NablaSettings(0.9, 11, 3, 3)),
        (
            {"preset": "pro-t2v-10s-hd", "nabla_p": 0.5, "nabla_wt": 5, "nabla_ww": 1},
            NablaSettings(0.5, 5, 3, 1),
        ),
        ({"preset": "lite-t2v-5s-sft", "nabla_p": 0.5}, None),
    ],
)
def test_nabla_follows_the_preset_and_the_users_own_settings(
    values: dict[str, Any], expected: NablaSettings | None
) -> None:
    assert nabla_of(GenerationRequest(prompt="x", **values)) == expected


@pytest.mark.parametrize("preset", ["demo-t2v", "lite-t2v-5s-sft", "image-t2i"])
def test_nabla_snaps_sizes_to_its_tiles_with_a_notice(preset: str) -> None:
    request_ = GenerationRequest(
        preset=preset, prompt="x", width=320, height=200, attention="nabla"
    )
    settled, notices = settle(request_)
    assert (settled.width, settled.height) == (256, 256)
    assert [notice.split()[0] for notice in notices] == ["width", "height"]
    assert all("128" in notice for notice in notices)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("nabla_p", 0, "0.01 to 1"),
        ("nabla_p", 1.5, "0.01 to 1"),
        ("nabla_wt", 0, "1 to 255"),
        ("nabla_wh", 2.5, "without a fraction"),
        ("nabla_ww", 32, "1 to 31"),
    ],
)
def test_nablas_settings_have_their_ranges(field: str, value: float, allowed: str) -> None:
    error = refused(**{field: value})
    assert error.field == field and allowed in str(error)

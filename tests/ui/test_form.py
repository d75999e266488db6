from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from PIL import Image

from kandinsky5.errors import UserError
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, LoraChoice, settle
from kandinsky5.ui import choices, form
from kandinsky5.ui.fields import (
    BY_NAME,
    FIELDS,
    LORA_FIELDS,
    LORA_ROWS,
    UNASKED,
    is_shown,
    placeholder_of,
)


def filled(**changes: Any) -> dict[str, Any]:
    """Values of the controls as the page sends them, with the first preset's defaults."""
    values: dict[str, Any] = {field.name: field.default for field in FIELDS}
    preset = PRESETS[changes.get("preset", values["preset"])]
    return {**values, **choices.preset_values(preset), "prompt": "a red circle", **changes}


def test_every_field_of_the_table_is_the_requests_or_steers_others():
    known = {field.name for field in dataclasses.fields(GenerationRequest)}
    assert {field.request_field for field in FIELDS} - known == set(UNASKED)
    unasked = {"init_latents", "save_latents", "out", "device"}
    assert known - {field.request_field for field in FIELDS} == unasked


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_defaults_make_the_request_that_the_preset_alone_would(name, tmp_path):
    picture = None
    if PRESETS[name].takes_image:
        picture = str(tmp_path / "start.png")
        Image.new("RGB", (8, 8)).save(picture)
    made = form.request_from(filled(preset=name, image=picture))
    alone = GenerationRequest(preset=name, prompt="a red circle", image=picture)
    assert settle(made) == settle(alone)


def test_settings_of_a_result_fill_the_form_and_give_the_same_request():
    request = GenerationRequest(
        prompt="a", negative_prompt="b", seed=2**63 - 1, width=96, height=64, seconds=2.0, steps=7
    )
    values = form.values_of(request)
    assert values["seed"] == "9223372036854775807"
    assert values["size"] == choices.CUSTOM_SIZE
    assert settle(form.request_from(values)) == settle(request)


@pytest.mark.parametrize(
    ("written", "gigabytes"), [("", None), (" ", None), ("12", 12.0), ("12,5 GB", 12.5), ("8gb", 8)]
)
def test_a_budget_is_read_as_people_write_it(written, gigabytes):
    assert form.request_from(filled(vram=written)).vram == gigabytes


def test_budgets_and_formats_of_a_result_come_back_and_go_again():
    values = form.values_of(GenerationRequest(prompt="a", vram=12.5, weights="int8"))
    assert (values["vram"], values["ram"], values["weights"]) == ("12.5", "", "int8")
    assert form.values_of(GenerationRequest(prompt="a"))["weights"] == "auto"


def test_an_image_left_over_from_another_mode_is_not_sent():
    assert form.request_from(filled(image="/nowhere.png")).image is None


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("prompt", "", "describe"),
        ("prompt", "  \n", "describe"),
        ("prompt", "a\0b", "NUL"),
        ("steps", 0, "1 to 1000"),
        ("steps", 2.5, "without a fraction"),
        ("guidance", float("nan"), "1 to 30"),
        ("shift", 0, "0.1 to 100"),
        ("seed", "-5", "0 to 9223372036854775807"),
        ("seed", str(2**70), "0 to 9223372036854775807"),
        ("seed", "one", "0 to 9223372036854775807"),
        ("width", -1, "64 to 2048"),
        ("height", 10**6, "64 to 2048"),
        ("seconds", 30, "to 21"),
        ("vram", "plenty", "0.5 to 1024"),
        ("vram", "0", "0.5 to 1024"),
        ("ram", "-1", "0.5 to 4096"),
        ("ram", "nan", "0.5 to 4096"),
        ("dit", "/nowhere/model.safetensors", "nothing is there"),
        ("dit", "/tmp", "not a file"),
        ("model_dir", "/etc/hostname", "not a folder"),
        ("dit", "~nobody-of-that-name/x", "path of a file"),
        ("lora_1", "/nowhere/style.safetensors", "nothing is there"),
        ("guidance_start", "2", "0 to 1"),
        ("crf", "high", "0 to 51"),
        ("preset", "no-such", "list"),
    ],
)
def test_what_cannot_be_used_names_its_field_and_what_is_allowed(field, value, allowed):
    values = {**filled(), field: value}
    with pytest.raises(UserError) as caught:
        form.request_from(values)
    assert caught.value.field == field
    text = form.problem_text(caught.value)
    assert text.startswith(BY_NAME[field].label)
    assert allowed in text
    assert "\n" not in text


def test_an_image_mode_without_an_image_says_so_at_the_image():
    with pytest.raises(UserError, match="needs an input image") as caught:
        form.request_from(filled(preset="demo-i2v"))
    assert form.problem_text(caught.value) == "Input image: demo-i2v needs an input image."


def test_a_pasted_path_loses_its_quotes_and_gets_its_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "my model.safetensors"
    file.touch()
    for written in (f' "{file}" ', f"'{file}'", "~/my model.safetensors"):
        assert form.request_from(filled(dit=written)).dit == str(file)


def lora_rows(folder, *names: str) -> dict[str, str]:
    rows = {}
    for (path, _), name in zip(LORA_FIELDS, names, strict=False):
        (folder / name).touch()
        rows[path.name] = str(folder / name)
    return rows


def test_every_setting_goes_into_the_request_and_comes_back(tmp_path):
    """What the page sends, what the queue keeps, and what "use these settings" fills in again."""
    request = GenerationRequest(
        preset="pro-t2v-5s-hd",
        prompt="a fox",
        clip_prompt="fox",
        seed=4,
        width=1024,
        height=1024,
        seconds=5.0,
        steps=50,
        guidance=5.0,
        shift=10.0,
        guidance_start=0.1,
        guidance_end=0.75,
        attention="nabla",
        nabla_p=0.7,
        nabla_wt=9,
        nabla_wh=5,
        nabla_ww=1,
        cache="magcache",
        cache_threshold=0.3,
        cache_retention=0.15,
        weights="int8",
        text_weights="nf4",
        dtype="bf16",
        vram=12.5,
        ram=40.0,
        crf=20,
        preview=False,
        vae_tiling="rolling",
        vae_tile=256,
        expand=False,
        loras=tuple(
            LoraChoice(path, strength)
            for path, strength in zip(
                lora_rows(tmp_path, "a.safetensors", "b.safetensors").values(),
                (0.5, -1.0),
                strict=True,
            )
        ),
    )
    values = form.values_of(GenerationRequest.from_dict(request.to_dict()))
    assert form.request_from(values) == request


def test_what_is_not_opened_is_left_to_the_program():
    made = form.request_from(filled())
    plain = GenerationRequest(prompt="a red circle")
    for name in (
        "attention",
        "cache",
        "cache_threshold",
        "nabla_p",
        "guidance_end",
        "loras",
        "crf",
    ):
        assert getattr(made, name) == getattr(plain, name)


def test_nabla_is_asked_for_where_it_is_used_with_the_presets_own_values():
    hd, sd = PRESETS["pro-t2v-5s-hd"], PRESETS["pro-t2v-5s-sd"]
    share = BY_NAME["nabla_p"]
    assert is_shown(share, hd, {}) and placeholder_of(share, hd) == "0.8"
    assert not is_shown(share, hd, {"attention": "sdpa"})
    assert not is_shown(share, sd, {})
    assert is_shown(share, sd, {"attention": "nabla"})


def test_the_cache_asks_how_daring_it_shall_be_only_when_it_is_on():
    assert not is_shown(BY_NAME["cache_threshold"], PRESETS["demo-t2v"], {})
    assert is_shown(BY_NAME["cache_threshold"], PRESETS["demo-t2v"], {"cache": "magcache"})


def test_what_is_hidden_neither_counts_nor_refuses():
    made = form.request_from(filled(cache_threshold="x", nabla_p="y", attention="sdpa"))
    assert (made.cache_threshold, made.nabla_p) == (0.12, None)


def test_what_stands_in_the_box_is_what_is_encoded(tmp_path):
    written = filled(preset="lite-t2v-5s-sft", expanded_prompt=" A red circle rolls. ")
    made = form.request_from(written)
    assert (made.expand, made.expanded_prompt) == (False, " A red circle rolls. ")
    values = form.values_of(made)
    assert (values["expand"], values["expanded_prompt"]) == (True, " A red circle rolls. ")
    unticked = form.request_from({**written, "expand": False})
    assert (unticked.expand, unticked.expanded_prompt) == (False, None)
    empty = form.request_from({**written, "expanded_prompt": " "})
    assert (empty.expand, empty.expanded_prompt) == (True, None)


def test_rows_of_loras_leave_out_the_empty_ones(tmp_path):
    rows = lora_rows(tmp_path, "a.safetensors", "b.safetensors")
    rows |= {"lora_1": "", "lora_2_strength": "0,75"}
    (lora,) = form.request_from(filled(**rows)).loras
    assert lora == LoraChoice(str(tmp_path / "b.safetensors"), 0.75)


@pytest.mark.parametrize("strength", ["much", "11", "nan"])
def test_a_strength_that_cannot_be_is_named_at_its_field(tmp_path, strength):
    rows = lora_rows(tmp_path, "a.safetensors")
    with pytest.raises(UserError, match="-10 to 10") as caught:
        form.request_from(filled(**rows, lora_1_strength=strength))
    assert caught.value.field == "lora_1_strength"


def test_more_loras_than_rows_are_not_dropped_in_silence():
    loras = tuple(LoraChoice(f"{n}.safetensors") for n in range(LORA_ROWS + 1))
    with pytest.raises(UserError, match=f"at most {LORA_ROWS}"):
        form.values_of(GenerationRequest(prompt="a", loras=loras))

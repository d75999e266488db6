from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from PIL import Image

from kandinsky5.errors import UserError
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, settle
from kandinsky5.ui import choices, form


def filled(**changes: Any) -> dict[str, Any]:
    """Values of the controls as the page sends them, with the first preset's defaults."""
    values: dict[str, Any] = {field.name: field.default for field in form.FIELDS}
    preset = PRESETS[changes.get("preset", values["preset"])]
    return {**values, **choices.preset_values(preset), "prompt": "a red circle", **changes}


def test_every_field_of_the_table_is_the_requests_or_steers_others():
    known = {field.name for field in dataclasses.fields(GenerationRequest)}
    assert {field.name for field in form.FIELDS if field.is_setting} <= known
    assert {field.name for field in form.FIELDS if not field.is_setting} == {"mode", "size"}


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
        ("preset", "no-such", "list"),
    ],
)
def test_what_cannot_be_used_names_its_field_and_what_is_allowed(field, value, allowed):
    values = {**filled(), field: value}
    with pytest.raises(UserError) as caught:
        form.request_from(values)
    assert caught.value.field == field
    text = form.problem_text(caught.value)
    assert text.startswith(form.BY_NAME[field].label)
    assert allowed in text
    assert "\n" not in text


def test_an_image_mode_without_an_image_says_so_at_the_image():
    with pytest.raises(UserError, match="needs an input image") as caught:
        form.request_from(filled(preset="demo-i2v"))
    assert form.problem_text(caught.value) == "Input image: demo-i2v needs an input image."


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n broken"])
def test_a_corrupt_image_is_refused_with_one_line(tmp_path, content):
    broken = tmp_path / "broken.png"
    broken.write_bytes(content)
    with pytest.raises(UserError, match="not a readable image") as caught:
        form.request_from(filled(preset="demo-i2v", image=str(broken)))
    assert caught.value.field == "image"


def test_a_pasted_path_loses_its_quotes_and_gets_its_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "my model.safetensors"
    file.touch()
    for written in (f' "{file}" ', f"'{file}'", "~/my model.safetensors"):
        assert form.request_from(filled(dit=written)).dit == str(file)

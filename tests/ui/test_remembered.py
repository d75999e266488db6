from __future__ import annotations

import json
from typing import Any

import pytest

from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest
from kandinsky5.ui import choices, form
from kandinsky5.ui.remembered import KEPT_NAMES, VERSION, values_from


def kept(**changes: Any) -> dict[str, Any]:
    filled = form.values_of(GenerationRequest(prompt="a red circle"))
    return {name: {**filled, **changes}[name] for name in KEPT_NAMES}


def stored(values: Any, version: Any = VERSION) -> str:
    return json.dumps({"version": version, "values": values})


def test_what_was_typed_comes_back_also_what_cannot_be_used() -> None:
    typed = kept(
        prompt="🟥 <b>", steps=0, guidance=2.5, seed="-5", dit="~/x", width=96, height=None
    )
    assert values_from(stored(typed)) == {**typed, "size": choices.CUSTOM_SIZE}


def test_the_picture_is_not_kept() -> None:
    assert "image" not in KEPT_NAMES
    assert "image" not in (values_from(stored({**kept(), "image": "/tmp/x.png"})) or {})


@pytest.mark.parametrize("preset", [name for name, row in PRESETS.items() if row.is_video])
def test_the_preset_decides_mode_and_size(preset: str) -> None:
    width, height = PRESETS[preset].sizes_px[-1]
    values = values_from(stored(kept(preset=preset, width=width, height=height, mode="t2i")))
    assert values is not None
    assert (values["preset"], values["mode"]) == (preset, PRESETS[preset].mode)
    assert values["size"] == f"{width} × {height}"


@pytest.mark.parametrize("gone", ["lite-t2v-2019", 7, None, ["demo-t2v"], {}])
def test_a_preset_that_cannot_be_chosen_leaves_texts_and_defaults(gone: Any) -> None:
    values = values_from(stored(kept(preset=gone, prompt="kept", steps=77)))
    assert values is not None
    assert (values["preset"], values["prompt"]) == ("demo-t2v", "kept")
    assert values["steps"] == PRESETS["demo-t2v"].steps


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", 5),
        ("prompt", "x" * 200_000),
        ("negative_prompt", None),
        ("seed", 7),
        ("dit", ["a"]),
        ("steps", "20"),
        ("steps", True),
        ("guidance", float("nan")),
        ("shift", float("inf")),
        ("seconds", 10**400),
        ("width", {}),
    ],
)
def test_a_value_of_another_kind_takes_its_default(name: str, value: Any) -> None:
    values = values_from(stored(kept(**{name: value})))
    assert values is not None and values[name] == kept(prompt="")[name]


def test_a_value_that_is_missing_takes_its_default_and_a_strange_one_is_left_out() -> None:
    assert values_from(stored({"prompt": "old", "colour": "red"})) == kept(prompt="old")


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "null",
        "[]",
        "7",
        "[" * 100_000,
        stored(kept(), version=2),
        stored(kept(), version=None),
        stored([]),
        stored(None),
        "\ud800",
    ],
)
def test_what_cannot_be_read_is_as_if_nothing_had_been_kept(text: str | None) -> None:
    assert values_from(text) is None

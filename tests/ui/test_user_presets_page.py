"""The row of the user's presets: what each button does to the form, the list and the line below."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kandinsky5.request import GenerationRequest
from kandinsky5.ui import form
from kandinsky5.ui.fields import BY_NAME, FIELDS
from kandinsky5.ui.form_handlers import FormHandlers
from kandinsky5.ui.settings import Settings
from kandinsky5.ui.user_presets import MAX_FOREIGN_BYTES, UserPresets
from kandinsky5.ui.user_presets_page import UserPresetHandlers, export_route, file_name_of

TOLD = ("asked", "line", "yes", "no", "chosen", "row", "box")


@pytest.fixture
def presets(tmp_path: Path) -> UserPresets:
    return UserPresets(tmp_path)


@pytest.fixture
def handlers(presets, fake_client, tmp_path) -> UserPresetHandlers:
    client = fake_client.FakeClient(tmp_path / "outputs")
    of_form = FormHandlers(client, lambda preset: False, settings=lambda: Settings(crf=30))
    return UserPresetHandlers(presets, of_form)


def filled(**changes: Any) -> list[Any]:
    values = {**form.values_of(GenerationRequest(prompt="a red circle")), **changes}
    return [values[field.name] for field in FIELDS]


def told(outputs: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(TOLD, outputs, strict=True))


def loaded(handlers: UserPresetHandlers, name: str | None) -> tuple[dict[str, Any], str]:
    *updates, line = handlers.loaded(name)
    return dict(zip(BY_NAME, updates, strict=True)), line


def test_a_saved_form_comes_back_as_settings_of_a_result_do(handlers, presets):
    values = filled(steps=9, seed="77", guidance=2.5, attention="nabla", nabla_p="0.8", crf="20")
    saved = told(handlers.saved("Mine", True, *values))
    assert "Saved “Mine”" in saved["line"]
    assert saved["chosen"] == gr.update(choices=["Mine"], value="Mine")
    assert (saved["row"], saved["box"]) == (
        gr.update(visible=True),
        gr.update(label="Your presets (1)"),
    )
    updates, line = loaded(handlers, "Mine")
    assert "Loaded “Mine”" in line
    of_form = handlers._of_form
    direct = dict(zip(BY_NAME, of_form.filled_with(presets.get("Mine").request, None), strict=True))
    assert {**updates, "image": None} == {**direct, "image": None}
    assert (updates["steps"]["value"], updates["seed"]["value"]) == (9, "77")
    assert (updates["nabla_p"]["value"], updates["crf"]["value"]) == ("0.8", "20")


def test_a_preset_leaves_the_picture_and_what_it_says_nothing_of(handlers):
    handlers.saved("Mine", False, *filled(prompt="secret", steps=9))
    updates, _ = loaded(handlers, "Mine")
    for name in ("prompt", "negative_prompt", "clip_prompt", "expanded_prompt", "image"):
        assert "value" not in updates[name], name
    assert updates["steps"]["value"] == 9


def test_a_form_without_a_prompt_or_a_picture_can_be_saved(handlers):
    values = filled(preset="demo-i2v", mode="i2v", prompt=" ", image=None, width=None, height=None)
    assert "Saved" in told(handlers.saved("Mine", True, *values))["line"]
    updates, _ = loaded(handlers, "Mine")
    assert updates["preset"]["value"] == "demo-i2v"
    assert "value" not in updates["prompt"]


def test_an_empty_crf_stays_empty_whatever_the_settings_say_later(handlers):
    handlers.saved("Mine", True, *filled(crf=""))
    assert loaded(handlers, "Mine")[0]["crf"]["value"] == ""


@pytest.mark.parametrize(
    ("changes", "label"),
    [({"steps": 0}, "Steps"), ({"seed": "-5"}, "Seed"), ({"dit": "/no/such"}, "DiT checkpoint")],
)
def test_a_form_that_cannot_be_used_is_not_saved(handlers, presets, changes, label):
    line = told(handlers.saved("Mine", True, *filled(**changes)))["line"]
    assert "k1-problem" in line
    assert BY_NAME[next(iter(changes))].label in line
    assert presets.names == ()


def test_a_name_that_is_there_asks_and_replaces_when_told_to(handlers, presets):
    handlers.saved("Mine", True, *filled(steps=9))
    asks = told(handlers.saved(" Mine ", True, *filled(steps=30)))
    assert "is there already" in asks["line"]
    assert asks["yes"] == gr.update(visible=True, value="Replace it")
    assert presets.get("Mine").request.steps == 9
    assert told(handlers.declined())["asked"] is None
    done = told(handlers.confirmed(asks["asked"], True, *filled(steps=30)))
    assert "Replaced “Mine”" in done["line"]
    assert done["yes"] == gr.update(visible=False)
    assert presets.get("Mine").request.steps == 30


def test_deleting_asks_first(handlers, presets):
    handlers.saved("Mine", True, *filled())
    asks = told(handlers.delete_pressed("Mine"))
    assert presets.names == ("Mine",)
    done = told(handlers.confirmed(asks["asked"], True, *filled()))
    assert "Deleted “Mine”" in done["line"]
    assert done["chosen"] == gr.update(choices=[], value=None)
    assert done["row"] == gr.update(visible=False)
    assert presets.names == ()


def test_what_another_tab_deleted_is_told_everywhere(handlers):
    handlers.saved("Mine", True, *filled())
    asks = told(handlers.delete_pressed("Mine"))
    handlers.confirmed(asks["asked"], True, *filled())
    assert all(
        "no longer there" in line
        for line in (loaded(handlers, "Mine")[1], handlers.exported("Mine"))
    )
    assert "no longer there" in told(handlers.confirmed(asks["asked"], True, *filled()))["line"]
    for line in (loaded(handlers, None)[1], handlers.exported(None)):
        assert "choose a saved one first" in line


def test_a_foreign_file_is_taken_in_or_refused_in_one_line(handlers, tmp_path):
    file = tmp_path / "theirs.json"
    request = {"prompt": "x", "out": "/etc/passwd"}
    entries = [
        {"name": "<b>Bold</b>", "request": request},
        {"name": "Bad", "request": {"prompt": "x", "steps": 0}},
    ]
    file.write_text(json.dumps({"version": 1, "presets": entries}))
    outcome = told(handlers.taken_in(str(file)))
    assert "&lt;b&gt;Bold&lt;/b&gt;" in outcome["line"]
    assert "Left out, as no preset holds them: out" in outcome["line"]
    assert "“Bad”: steps" in outcome["line"]
    assert outcome["chosen"]["value"] == "<b>Bold</b>"
    file.write_bytes(b" " * (MAX_FOREIGN_BYTES + 100))
    for path in (file, tmp_path / "gone.json", None):
        line = told(handlers.taken_in(path and str(path)))["line"]
        assert line.count("k1-problem") == 1


def test_a_preset_is_fetched_as_a_file_that_another_studio_takes(handlers, presets, tmp_path):
    handlers.saved("Ёж & Co.", True, *filled())
    app = FastAPI()
    app.include_router(export_route(presets))
    visitor = TestClient(app)
    answer = visitor.get("/k1/user-preset", params={"name": "Ёж & Co."})
    assert answer.status_code == 200
    assert "attachment" in answer.headers["content-disposition"]
    other = UserPresets(tmp_path / "elsewhere")
    assert other.take_in(answer.content, file_name="x.json").names == ("Ёж & Co.",)
    assert visitor.get("/k1/user-preset", params={"name": "../settings"}).status_code == 404


@pytest.mark.parametrize(
    ("name", "file"),
    [("Two words", "Two-words"), ("../../etc", "etc"), ("Ёж", "Ёж"), ("…", "unnamed")],
)
def test_an_export_has_a_plain_file_name(name, file):
    assert file_name_of(name) == f"k1-preset-{file}.json"

"""The settings on the page: shown, checked, saved, and passed on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from kandinsky5.ui.form_handlers import FormHandlers
from kandinsky5.ui.options import StudioOptions
from kandinsky5.ui.settings import FILE_NAME, Settings, StudioSettings
from kandinsky5.ui.settings_page import LABELS, SettingsHandlers, section
from kandinsky5.ui.user_presets import UserPresets

FORM = ("crf_of_form", "preview_of_form", "preset_of_form")
OUTPUTS = ("line", *LABELS, "shown", *FORM)


class Page:
    """A tab: what its controls hold, and what it was shown."""

    def __init__(self, handlers: SettingsHandlers) -> None:
        self._handlers = handlers
        *values, self.shown = handlers.shown()
        self.values = dict(zip(LABELS, values, strict=True))

    def save(self, **typed: Any) -> dict[str, Any]:
        self.values |= typed
        told = self._handlers.saved("t2v", self.shown, *self.values.values())
        outputs = dict(zip(OUTPUTS, told, strict=True))
        if "Not saved" not in outputs["line"]:
            self.values = {name: outputs[name] for name in LABELS}
            self.shown = outputs["shown"]
        return outputs


@pytest.fixture
def client(fake_client, tmp_path):
    return fake_client.FakeClient(tmp_path / "outputs")


@pytest.fixture
def page(client, tmp_path):
    """Opens a tab (``page(**options)``); all are of one studio unless they have options."""
    studios: dict[str, SettingsHandlers] = {}

    def opened(**options: Any) -> Page:
        key = repr(options)
        if key not in studios:
            settings = StudioSettings(StudioOptions(state_dir=tmp_path, **options))
            of_form = FormHandlers(client, lambda preset: False, settings=settings)
            studios[key] = SettingsHandlers(settings, client, of_form)
        return Page(studios[key])

    return opened


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FILE_NAME).read_text())


def test_what_is_saved_is_kept_told_and_passed_on(page, client, tmp_path):
    tab = page()
    (tmp_path / "models").mkdir()
    outputs = tab.save(
        models_dirs=f"'{tmp_path}/models'\n", out_dir=f"{tmp_path}/new", crf=" 20 ", theme="dark"
    )
    assert "next job" in outputs["line"]
    assert outputs["models_dirs"] == f"{tmp_path}/models"
    assert client.folders.models_dirs == (tmp_path / "models",)
    assert client.folders.out_dir == tmp_path / "new"
    assert (tmp_path / "new").is_dir()
    assert (stored(tmp_path)["crf"], stored(tmp_path)["theme"]) == (20, "dark")
    assert "&quot;theme&quot;: &quot;dark&quot;" in outputs["line"]
    assert page().values == tab.values


def test_the_form_follows_crf_and_live_preview_as_far_as_they_changed(page):
    tab = page()
    outputs = tab.save(crf="30")
    assert outputs["crf_of_form"] == gr.update(placeholder="30")
    assert outputs["preview_of_form"] == gr.skip()
    assert tab.save(preview=False)["preview_of_form"] is False
    assert outputs["preset_of_form"]["choices"][0][1] == "demo-t2v"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({"crf": "52"}, "Default video CRF: “52”: a whole number from 0"),
        ({"crf": ""}, "a whole number"),
        ({"crf": "1e1"}, "a whole number"),
        ({"crf": "²"}, "a whole number"),
        ({"models_dirs": "/no/such/folder"}, "“/no/such/folder”: nothing is there"),
        ({"models_dirs": "\n".join(f"/{number}" for number in range(40))}, "nothing is there"),
        ({"out_dir": "/proc/nothing/here"}, "Outputs folder"),
        ({"out_dir": "a\0b"}, "Outputs folder"),
        ({"theme": "<b>"}, "Theme: “&lt;b&gt;”"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line_and_nothing_is_saved(page, tmp_path, typed, said):
    outputs = page().save(**typed, remember_form=False)
    assert outputs["line"].startswith('<p class="k1-problem"')
    assert outputs["line"].count("<p") == 1
    assert said in outputs["line"]
    assert outputs["crf"] == gr.skip()
    assert not (tmp_path / FILE_NAME).exists()


def test_two_tabs_do_not_undo_one_another(page, tmp_path):
    first, second = page(), page()
    first.save(theme="dark")
    outputs = second.save(crf="20")
    assert (stored(tmp_path)["theme"], stored(tmp_path)["crf"]) == ("dark", 20)
    assert outputs["theme"] == "dark"


def test_a_saved_folder_that_is_gone_for_now_stays(page, tmp_path):
    (tmp_path / "usb").mkdir()
    tab = page()
    tab.save(models_dirs=f"{tmp_path}/usb")
    (tmp_path / "usb").rmdir()
    (tmp_path / "disk").mkdir()
    outputs = tab.save(models_dirs=f"{tmp_path}/usb\n{tmp_path}/disk")
    assert "Saved" in outputs["line"]
    assert stored(tmp_path)["models_dirs"] == [f"{tmp_path}/usb", f"{tmp_path}/disk"]


def test_comfyuis_own_folder_becomes_its_models(page, tmp_path):
    for name in ("vae", "loras"):
        (tmp_path / "ComfyUI" / "models" / name).mkdir(parents=True)
    outputs = page().save(models_dirs=f"{tmp_path}/ComfyUI")
    assert outputs["models_dirs"] == f"{tmp_path}/ComfyUI/models"


def test_folders_are_told_while_they_are_typed(page, tmp_path):
    handlers = page()._handlers
    models, out = handlers.looked_at(f"{tmp_path}\n/no/<b>", f"{tmp_path}/new")
    assert models.count("<p") == 2
    assert 'data-state="refused"' in models
    assert "&lt;b&gt;" in models
    assert "it will be made" in out
    assert handlers.looked_at("", "") == ("", "")


def test_damaged_files_are_told_on_the_page_and_the_defaults_hold(client, tmp_path):
    from kandinsky5.ui.app import build

    for name in (FILE_NAME, "presets.json"):
        (tmp_path / name).write_text("{")
    settings = StudioSettings(StudioOptions(state_dir=tmp_path))
    page = str(build(client, settings, UserPresets(tmp_path)).get_config_file())
    assert settings() == Settings()
    assert "settings.json is damaged" in page
    assert "presets.json is damaged" in page


def test_the_page_says_where_the_command_line_decides(page, client, tmp_path):
    options = StudioOptions(
        state_dir=tmp_path, out_dir=Path("/typed"), models_dirs=(Path("/typed/models"),)
    )
    with gr.Blocks():
        controls = section(options).controls
        plain = section(StudioOptions(state_dir=tmp_path)).controls
    assert "--outdir /typed decides" in controls["out_dir"].info
    assert "after --models-dir /typed/models" in controls["models_dirs"].info
    assert "--" not in plain["out_dir"].info + plain["models_dirs"].info
    tab = page(out_dir=tmp_path / "typed")
    tab.save(out_dir=f"{tmp_path}/set")
    assert client.folders.out_dir == tmp_path / "typed"
    assert stored(tmp_path)["out_dir"] == f"{tmp_path}/set"

"""What is set once: read without trusting the file, changed and kept, below what the command line says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kandinsky5.errors import K1Error, UserError
from kandinsky5.ui.options import StudioOptions
from kandinsky5.ui.settings import (
    FILE_NAME,
    MAX_FOLDERS,
    Settings,
    StudioSettings,
    read_settings,
    settings_in,
)


def kept(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    return values


def put(folder: Path, values: dict[str, Any]) -> None:
    (folder / FILE_NAME).write_text(json.dumps({"version": 1, **values}))


def opened(folder: Path, **options: Any) -> StudioSettings:
    return StudioSettings(StudioOptions(state_dir=folder, **options))


def test_what_is_changed_is_kept_with_what_else_stood_in_the_file(tmp_path):
    put(tmp_path, {"crf": 20, "colour": ["red"]})
    settings = opened(tmp_path)
    assert settings().crf == 20
    settings.change({"theme": "dark", "models_dirs": ("/models", "/models")})
    assert kept(tmp_path)["colour"] == ["red"]
    again = opened(tmp_path)
    assert again() == settings()
    assert (again().crf, again().theme, again().models_dirs) == (20, "dark", ("/models",))
    assert again.notices == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crf", 52),
        ("crf", -1),
        ("crf", 20.5),
        ("crf", True),
        ("crf", "20"),
        ("theme", "pink"),
        ("theme", ["dark"]),
        ("preview", "yes"),
        ("remember_form", None),
        ("models_dirs", "/models"),
        ("models_dirs", ["models"]),
        ("models_dirs", [7]),
        ("models_dirs", [""]),
        ("models_dirs", ["/a\0b"]),
        ("models_dirs", [f"/{number}" for number in range(MAX_FOLDERS + 1)]),
        ("out_dir", "outputs"),
        ("out_dir", None),
        ("earlier_out_dirs", {"a": 1}),
    ],
)
def test_a_value_that_cannot_be_used_is_named_and_takes_its_default(name, value):
    settings, problems = settings_in({name: value, "crf": 30} if name != "crf" else {name: value})
    assert getattr(settings, name) == getattr(Settings(), name)
    assert [problem.partition(":")[0] for problem in problems] == [name]
    assert name == "crf" or settings.crf == 30
    with pytest.raises(UserError) as caught:
        Settings(**{name: value})
    assert caught.value.field == name


def test_a_bad_value_and_a_damaged_file_are_told(tmp_path):
    put(tmp_path, {"crf": 99})
    (notice,) = opened(tmp_path).notices
    assert "crf" in notice and "51" in notice
    (tmp_path / FILE_NAME).write_text("{")
    settings = opened(tmp_path)
    assert settings() == Settings()
    (notice,) = settings.notices
    assert "damaged" in notice


def test_the_command_line_wins_over_the_settings(tmp_path):
    put(tmp_path, {"models_dirs": ["/set", "/both"], "out_dir": "/set/outputs"})
    assert opened(tmp_path).folders.out_dir == Path("/set/outputs")
    settings = opened(
        tmp_path, out_dir=Path("/typed"), models_dirs=(Path("/typed/models"), Path("/both"))
    )
    assert settings.folders.out_dir == Path("/typed")
    assert settings.folders.holds_result(Path("/set/outputs/made before.mp4"))
    assert settings.folders.model_names == ("/typed/models", "/both", "/set")


def test_without_a_folder_results_go_where_the_program_was_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert opened(tmp_path).folders.out_dir == tmp_path / "outputs"


def test_results_made_before_are_still_found_when_they_go_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = opened(tmp_path)
    for name in ("b", "c", "b"):
        settings.change({"out_dir": str(tmp_path / name)})
    folders = opened(tmp_path).folders
    assert folders.out_dir == tmp_path / "b"
    assert folders.earlier_out_dirs == (tmp_path / "outputs", tmp_path / "c")
    settings.change({"crf": 3})
    assert opened(tmp_path).folders == folders


def test_what_cannot_be_used_or_written_changes_nothing(tmp_path, monkeypatch):
    settings = opened(tmp_path)
    settings.change({"crf": 20})
    with pytest.raises(UserError):
        settings.change({"crf": 99})
    with monkeypatch.context() as broken:
        broken.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(30, "read-only")))
        with pytest.raises(K1Error):
            settings.change({"crf": 30, "out_dir": str(tmp_path / "b")})
    assert settings() == opened(tmp_path)() == Settings(crf=20)


def test_a_command_reads_them_without_moving_a_damaged_file(tmp_path):
    put(tmp_path, {"models_dirs": ["/models"]})
    assert read_settings(tmp_path).models_dirs == ("/models",)
    (tmp_path / FILE_NAME).write_text("{")
    assert read_settings(tmp_path) == Settings()
    assert (tmp_path / FILE_NAME).read_text() == "{"


@pytest.mark.parametrize(("typed", "crf"), [("", "30"), (None, "30"), (" ", "30"), ("0", "0")])
def test_an_empty_crf_of_the_form_comes_to_the_settings(typed, crf):
    filled = Settings(crf=30).with_defaults({"crf": typed, "steps": None})
    assert filled == {"crf": crf, "steps": None}

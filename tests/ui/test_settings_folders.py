"""Folders as they are entered: what they are is said, ComfyUI's is known, and nothing is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from kandinsky5.ui.settings_folders import models_folder, models_folders, outputs_folder


def comfyui(folder: Path) -> Path:
    for name in ("diffusion_models", "vae", "loras/styles", "text_encoders"):
        (folder / "models" / name).mkdir(parents=True)
    for name in ("diffusion_models/lite.safetensors", "loras/styles/a.safetensors"):
        (folder / "models" / name).touch()
    (folder / "models" / "loras" / "notes.txt").touch()
    return folder


def test_comfyuis_models_folder_is_known_and_counted(tmp_path):
    models = comfyui(tmp_path) / "models"
    told = models_folder(str(models))
    assert (told.state, told.taken) == ("known", models)
    assert told.text == "ComfyUI’s models folder: 1 diffusion model, 1 LoRA"


def test_of_comfyui_itself_the_folder_models_is_taken(tmp_path):
    told = models_folder(str(comfyui(tmp_path)))
    assert (told.state, told.taken) == ("known", tmp_path / "models")
    assert "“models” is taken" in told.text


def test_of_one_folder_of_comfyuis_the_others_are_named(tmp_path):
    told = models_folder(str(comfyui(tmp_path) / "models" / "loras"))
    assert (told.state, told.taken) == ("doubtful", tmp_path / "models" / "loras")
    assert str(tmp_path / "models") in told.text


def test_other_folders_are_told_by_what_lies_in_them(tmp_path):
    assert models_folder(str(tmp_path)).state == "doubtful"
    (tmp_path / "Kandinsky" / "deeper").mkdir(parents=True)
    (tmp_path / "Kandinsky" / "a.safetensors").touch()
    (tmp_path / "Kandinsky" / "deeper" / "b.safetensors").touch()
    assert models_folder(str(tmp_path)).text == "1 .safetensors file"
    (tmp_path / "models--org--name").mkdir()
    assert models_folder(str(tmp_path)).text == "a cache of the hub: 1 model"


@pytest.mark.parametrize("typed", ["/no/such/folder", "~nobody-here/x", "a\0b", "x" * 5000])
def test_what_is_no_folder_is_refused(typed):
    told = models_folder(typed)
    assert (told.state, told.taken) == ("refused", None)
    assert told.text


def test_a_file_is_refused_and_quotes_and_empty_lines_do_not_count(tmp_path):
    (tmp_path / "with space").mkdir()
    (tmp_path / "file").touch()
    told = models_folders(f'\n  "{tmp_path}/with space"  \n\n{tmp_path}/file\n')
    assert [(item.typed, item.state) for item in told] == [
        (f"{tmp_path}/with space", "doubtful"),
        (f"{tmp_path}/file", "refused"),
    ]
    assert models_folders(None) == ()


def test_a_folder_for_results_need_not_be_there_and_is_not_made(tmp_path):
    (tmp_path / "file").touch()
    assert outputs_folder("").taken is None
    told = outputs_folder(str(tmp_path / "a" / "b"))
    assert (told.state, told.taken) == ("known", tmp_path / "a" / "b")
    assert "will be made" in told.text
    assert not (tmp_path / "a").exists()
    assert outputs_folder(str(tmp_path)).text == "it can be written"
    assert outputs_folder(str(tmp_path / "file" / "x")).state == "refused"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda folder, _: folder != tmp_path)
    told = outputs_folder(str(tmp_path / "x"))
    assert told.state == "refused"
    assert str(tmp_path) in told.text

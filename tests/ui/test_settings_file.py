"""A small file of the user's: whole or as it was, and no file of another kind ends the studio."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kandinsky5.errors import K1Error, UserError
from kandinsky5.ui import settings_file
from kandinsky5.ui.settings_file import KeptFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "settings.json"


def written(path: Path, content: str | bytes) -> KeptFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return KeptFile(path, 1)


def test_what_is_written_is_read_again_and_nothing_lies_beside_it(path):
    values = {"name": "Ёжик 🦔 \ud800", "many": [1, None, True]}
    KeptFile(path, 1).write(values)
    assert json.loads(path.read_bytes()) == {"version": 1, **values}
    assert "Ёжик 🦔" in path.read_text(encoding="utf-8")
    file = KeptFile(path, 1)
    assert (file.read(), file.notice) == (values, "")
    assert [entry.name for entry in path.parent.iterdir()] == ["settings.json"]


def test_a_missing_file_holds_nothing_and_no_folder_is_made(path):
    file = KeptFile(path, 1)
    assert (file.read(), file.notice) == ({}, "")
    assert not path.parent.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        "{",
        "[1]",
        "null",
        "[" * 100_000,
        b"\xff\xfe\x00",
        '{"crf": 20}',
        '{"version": "1"}',
        '{"version": true}',
        '{"version": 0}',
        '{"version": 1, "crf": ' + "9" * 5000 + "}",
    ],
)
def test_a_damaged_file_is_set_aside_with_a_notice(path, content):
    file = written(path, content)
    assert file.read() == {}
    (aside,) = path.parent.iterdir()
    assert aside.name.startswith("settings.damaged-")
    assert aside.name in file.notice
    assert "damaged" in file.notice
    file.write({"crf": 20})
    assert KeptFile(path, 1).read() == {"crf": 20}
    assert aside.exists()


def test_who_only_looks_leaves_a_damaged_file_where_it_is(path):
    file = written(path, "{")
    assert file.read(rename_damaged=False) == {}
    assert path.read_text() == "{"


def test_a_file_far_too_large_is_not_read(path, monkeypatch):
    monkeypatch.setattr(settings_file, "MAX_BYTES", 10)
    file = written(path, '{"version": 1, "crf": 20}')
    assert file.read() == {}
    assert "far too large" in file.notice


def test_a_file_of_a_newer_program_stays_as_it_is(path):
    content = '{"version": 2, "crf": {"video": 20}}'
    file = written(path, content)
    assert file.read() == {}
    assert "newer K1" in file.notice
    with pytest.raises(UserError, match="newer K1"):
        file.write({"crf": 20})
    assert path.read_text() == content


def test_a_folder_in_its_place_is_said_and_not_removed(path):
    path.mkdir(parents=True)
    file = KeptFile(path, 1)
    assert file.read() == {}
    assert "cannot be read" in file.notice
    with pytest.raises(K1Error, match="cannot be written"):
        file.write({})


def test_a_write_that_fails_leaves_the_file_as_it_was(path, monkeypatch):
    file = written(path, '{"version": 1, "crf": 20}')

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(K1Error, match="too little room"):
        file.write({"crf": 30})
    monkeypatch.undo()
    assert [entry.name for entry in path.parent.iterdir()] == ["settings.json"]
    assert file.read() == {"crf": 20}

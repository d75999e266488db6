"""What a job asks of checkpoints before it begins."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from kandinsky5.errors import CheckpointError
from kandinsky5.model import facts
from kandinsky5.model.facts import fingerprint, transformer_facts
from kandinsky5.presets import DEMO_FOLDER


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the demo's transformer."""
    folder = Path(shutil.copytree(DEMO_FOLDER / "transformer", tmp_path / "transformer"))
    (found,) = folder.glob("*.safetensors")
    return found


def test_a_copy_has_the_same_fingerprint_by_whatever_path(checkpoint: Path) -> None:
    (own,) = (DEMO_FOLDER / "transformer").glob("*.safetensors")
    assert fingerprint(checkpoint) == fingerprint(checkpoint.parent) == fingerprint(own)


def test_other_numbers_under_the_same_header_have_another(checkpoint: Path) -> None:
    before = fingerprint(checkpoint)
    with checkpoint.open("r+b") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(start)
        first = stream.read(1)
        stream.seek(start)
        stream.write(bytes([first[0] ^ 1]))
    assert fingerprint(checkpoint) != before


def test_headers_are_read_once_while_the_file_stays(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = transformer_facts(checkpoint)
    print_of = fingerprint(checkpoint)
    opened = []
    real = facts.Checkpoint
    monkeypatch.setattr(facts, "Checkpoint", lambda path: (opened.append(path), real(path))[1])
    assert transformer_facts(checkpoint) == told and fingerprint(checkpoint) == print_of
    assert opened == []
    os.utime(checkpoint)
    assert transformer_facts(checkpoint) == told and fingerprint(checkpoint) == print_of
    assert len(opened) == 2


def test_what_cannot_be_loaded_is_refused_each_time(checkpoint: Path) -> None:
    os.truncate(checkpoint, 100)
    for _ in range(2):
        with pytest.raises(CheckpointError):
            transformer_facts(checkpoint)

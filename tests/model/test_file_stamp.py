"""A warm model is the one on disk: what tells that its files have changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kandinsky5.errors import CheckpointError
from kandinsky5.model.file_stamp import file_stamp

TIME_NS = 1_700_000_000_000_000_000


def put(path: Path, content: bytes = b"12345678", time_ns: int = TIME_NS) -> Path:
    path.write_bytes(content)
    os.utime(path, ns=(time_ns, time_ns))
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """An index of two shards, with their config.json and a file that is none of theirs."""
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name in (*shards, "config.json", "README.md"):
        put(tmp_path / name)
    weight_map = {f"w{number}": shard for number, shard in enumerate(shards * 2)}
    index = json.dumps({"weight_map": weight_map}).encode()
    return put(tmp_path / "model.safetensors.index.json", index)


def rewritten(path: Path) -> None:
    """The same size and time in place of the old file, as downloaders and copies leave it."""
    put(path.with_name("new"))
    os.replace(path.with_name("new"), path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "later": lambda path: put(path, time_ns=TIME_NS + 1),
    "longer": lambda path: put(path, b"123456789"),
    "replaced": rewritten,
    "gone": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_a_file_changes_its_stamp(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    weights, _ = put(folder / "model.safetensors"), put(folder / "config.json")
    before = file_stamp(folder)
    assert file_stamp(folder) == before
    CHANGES[change](weights)
    assert file_stamp(folder) != before


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json"])
def test_every_file_of_a_sharded_model_counts(sharded: Path, name: str, change: str) -> None:
    before = file_stamp(sharded)
    CHANGES[change](sharded.parent / name)
    assert file_stamp(sharded) != before


def test_files_that_do_not_belong_to_a_part_do_not_count(sharded: Path) -> None:
    single = put(sharded.parent / "single.safetensors")
    before = file_stamp(sharded), file_stamp(single)
    put(sharded.parent / "README.md", b"other words")
    put(sharded.parent / "another.safetensors")
    assert (file_stamp(sharded), file_stamp(single)) == before


def test_a_file_is_not_another_of_the_same_size_and_time(tmp_path: Path) -> None:
    first, second = put(tmp_path / "a.safetensors"), put(tmp_path / "b.safetensors")
    assert file_stamp(first) != file_stamp(second)


def test_a_link_counts_as_what_it_leads_to(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    old, new = put(blobs / "old"), put(blobs / "new")
    link = tmp_path / "model.safetensors"
    link.symlink_to(old)
    before = file_stamp(link)
    link.unlink()
    link.symlink_to(new)
    assert file_stamp(link) != before


def test_a_stamp_can_be_part_of_a_key(sharded: Path) -> None:
    assert len({file_stamp(sharded), file_stamp(sharded)}) == 1
    assert [row[0] for row in file_stamp(sharded)] == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        file_stamp(tmp_path / "none.safetensors")

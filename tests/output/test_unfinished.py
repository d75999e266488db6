"""Unfinished files: a killed program's go with the next file written there, a living one's never."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kandinsky5.output.atomic import prepare_output, replacing
from kandinsky5.output.unfinished import UnfinishedFiles

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")

REPOSITORY = Path(__file__).resolve().parents[2]
WRITER = """
import sys
from pathlib import Path
from kandinsky5.output.atomic import replacing

with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    print(temporary.name, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer() -> Iterator[Callable[[Path], tuple[subprocess.Popen[str], Path]]]:
    """Starts a program that is in the middle of writing a file; gives it and its unfinished file."""
    started = []

    def start(final: Path) -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(final)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        return process, final.parent / process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def killed(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def test_a_killed_program_s_file_goes_when_the_next_one_is_written(tmp_path, writer) -> None:
    process, left = writer(tmp_path / "video.mp4")
    killed(process)
    assert left.read_bytes() == b"half"
    prepare_output(tmp_path / "next.mp4")
    assert os.listdir(tmp_path) == []


def test_a_living_program_s_file_stays_until_it_is_killed_too(tmp_path, writer) -> None:
    dead, left = writer(tmp_path / "first.mp4")
    alive, written = writer(tmp_path / "second.mp4")
    killed(dead)
    with replacing(tmp_path / "next.mp4") as temporary:
        temporary.write_bytes(b"whole")
    assert written.read_bytes() == b"half"
    killed(alive)
    prepare_output(tmp_path / "next.mp4")
    assert not left.exists() and not written.exists()
    assert os.listdir(tmp_path) == ["next.mp4"]


def test_a_living_program_can_finish_while_others_write(tmp_path, writer) -> None:
    alive, _ = writer(tmp_path / "slow.mp4")
    prepare_output(tmp_path / "next.mp4")
    alive.communicate("")
    assert alive.returncode == 0
    assert (tmp_path / "slow.mp4").read_bytes() == b"half"


def test_a_program_does_not_sweep_what_it_writes_itself(tmp_path) -> None:
    with replacing(tmp_path / "a.mp4") as temporary:
        temporary.write_bytes(b"whole")
        prepare_output(tmp_path / "b.mp4")
        with replacing(tmp_path / "b.mp4") as other:
            other.write_bytes(b"whole")
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "b.mp4"]


def test_only_unfinished_files_of_ours_are_swept(tmp_path) -> None:
    kept = [".k1-note", "movie.part", ".other-1.part", "k1-1.part"]
    for name in [*kept, ".k1-0123456789abcdef.part"]:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".k1-folder.part").mkdir()
    UnfinishedFiles(tmp_path).close()
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, ".k1-folder.part"])


def test_names_differ_and_what_is_left_of_them_goes_at_the_end(tmp_path) -> None:
    with UnfinishedFiles(tmp_path) as unfinished:
        first, second = unfinished.new(), unfinished.new()
        assert first != second and os.listdir(tmp_path) == []
        first.write_bytes(b"x")
    unfinished.close()
    assert os.listdir(tmp_path) == []


def test_where_folders_cannot_be_locked_nothing_is_swept_and_all_is_written(
    tmp_path, monkeypatch
) -> None:
    import fcntl

    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    left = tmp_path / ".k1-0123456789abcdef.part"
    left.write_bytes(b"perhaps another host's")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with replacing(tmp_path / "a.mp4") as temporary:
        temporary.write_bytes(b"whole")
    assert left.exists() and (tmp_path / "a.mp4").exists()

"""Videos and pictures as they are written: they play, they say what made them, nothing half is left."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from kandinsky5.errors import K1Error, UserError
from kandinsky5.output import atomic, media, mp4
from kandinsky5.output.media import DiskFull, VideoWriter, prepare_output, video_bytes, write_png
from kandinsky5.output.metadata import read_metadata, video_info

NASTY = "a=b;c#d\\ \"q\" 'x' \n;\r\n[chapter]\n=\t\x01\x7f 😀 Привет \u2028 \ud800 %d %s $(x) <b>"
PLAIN = {"k1": "0", "request": {"prompt": "a red disc"}}


def write(path: Path, frames: np.ndarray, metadata: dict | None = None, **options) -> VideoWriter:
    height, width = frames.shape[1:3]
    with VideoWriter(
        path, width=width, height=height, metadata=metadata or PLAIN, **options
    ) as writer:
        for frame in frames:
            writer.write(frame)
    return writer


def fake_ffmpeg(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = folder / "fake-ffmpeg"
    script.write_text(f"#!{sys.executable}\nimport os, signal, sys\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(script))


def test_what_is_played_back_is_what_was_written(tmp_path, moving_disc, played):
    frames = moving_disc(25, 128, 192)
    writer = write(tmp_path / "disc.mp4", frames, crf=10)
    seen, stream = played(tmp_path / "disc.mp4")
    assert seen.shape == frames.shape
    assert writer.frames == 25
    errors = (seen.astype(np.float64) - frames) ** 2
    psnr_db = 10 * np.log10(255**2 / errors.reshape(25, -1).mean(axis=1))
    assert psnr_db.min() > 32
    assert "yuv420p(tv, bt709" in stream
    assert "24 fps" in stream


def test_colours_of_flat_frames_survive(tmp_path, played):
    for colour in ((255, 0, 0), (0, 255, 0), (10, 20, 250), (255, 255, 255), (0, 0, 0)):
        frames = np.broadcast_to(np.array(colour, np.uint8), (3, 64, 64, 3))
        write(tmp_path / "flat.mp4", frames)
        seen, _ = played(tmp_path / "flat.mp4")
        assert np.abs(seen.astype(int) - frames).max() <= 4, colour


def test_index_stands_before_the_pictures(tmp_path, moving_disc):
    write(tmp_path / "disc.mp4", moving_disc(9, 64, 64))
    with (tmp_path / "disc.mp4").open("rb") as file:
        order = mp4.layout(file)
    assert order.index("moov") < order.index("mdat")


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 64, 64), (5, 2, 2), (13, 66, 130)])
def test_sizes_and_lengths_that_are_rare(tmp_path, moving_disc, played, frames, height, width):
    write(tmp_path / "small.mp4", moving_disc(frames, height, width))
    seen, _ = played(tmp_path / "small.mp4")
    assert seen.shape == (frames, height, width, 3)
    info = video_info(tmp_path / "small.mp4")
    assert (info["frames"], info["height"], info["width"], info["fps"]) == (
        frames,
        height,
        width,
        24.0,
    )


def test_lossless_at_crf_0_in_luma(tmp_path, played):
    grey = np.random.default_rng(1).integers(16, 235, (4, 32, 32, 1), np.uint8)
    write(tmp_path / "grey.mp4", np.repeat(grey, 3, axis=3), crf=0)
    seen, _ = played(tmp_path / "grey.mp4")
    assert np.abs(seen.astype(int) - grey).max() <= 2


def test_frames_that_are_not_contiguous_are_written_as_they_look(tmp_path, moving_disc, played):
    frames = moving_disc(3, 64, 96)[:, :, ::-1]
    write(tmp_path / "mirror.mp4", frames, crf=4)
    seen, _ = played(tmp_path / "mirror.mp4")
    assert np.abs(seen.astype(int) - frames).mean() < 4


@pytest.mark.parametrize("prompt", [NASTY, NASTY * 1500, "😀" * 100_000, "=" * 100_000])
def test_any_prompt_comes_back_from_the_comment(tmp_path, moving_disc, prompt):
    metadata = {"k1": "0", "request": {"prompt": prompt, "negative_prompt": prompt}}
    write(tmp_path / "v.mp4", moving_disc(2, 64, 64), metadata)
    assert read_metadata(tmp_path / "v.mp4") == metadata
    with (tmp_path / "v.mp4").open("rb") as file:
        assert mp4.read_video_track(file).frames == 2


def test_ffmpeg_reads_the_comment_as_json(tmp_path, moving_disc):
    metadata = {"k1": "0", "request": {"prompt": 'a=b;c#d \\ "q" 😀'}}
    write(tmp_path / "v.mp4", moving_disc(2, 64, 64), metadata)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(tmp_path / "v.mp4")]
    text = subprocess.run(
        [*command, "-f", "ffmetadata", "pipe:1"], capture_output=True, check=True
    ).stdout.decode()
    line = next(line for line in text.splitlines() if line.startswith("comment="))
    plain = line.removeprefix("comment=")
    for special in "=;#\\":
        plain = plain.replace("\\" + special, special)
    assert json.loads(plain) == metadata


def test_later_metadata_take_the_place_of_the_first(tmp_path, moving_disc):
    path = tmp_path / "v.mp4"
    with VideoWriter(path, width=64, height=64, metadata=PLAIN) as writer:
        for frame in moving_disc(3, 64, 64):
            writer.write(frame)
        writer.set_metadata({**PLAIN, "seconds": {"decode": 1.5}, "peak_vram_bytes": 10**10})
    assert read_metadata(path)["peak_vram_bytes"] == 10**10
    assert video_info(path)["frames"] == 3


def test_later_metadata_that_are_too_long_leave_the_first(tmp_path, moving_disc, caplog):
    path = tmp_path / "v.mp4"
    with VideoWriter(path, width=64, height=64, metadata=PLAIN) as writer:
        writer.write(moving_disc(1, 64, 64)[0])
        writer.set_metadata({**PLAIN, "long": "x" * 5000})
    assert read_metadata(path) == PLAIN
    assert "too long" in caplog.text


def test_the_same_frames_give_the_same_bytes_on_fewer_processors(tmp_path, moving_disc):
    frames = moving_disc(12, 640, 384)
    write(tmp_path / "a.mp4", frames)
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if processors:
        os.sched_setaffinity(0, {min(processors)})
    try:
        write(tmp_path / "b.mp4", frames)
    finally:
        if processors:
            os.sched_setaffinity(0, processors)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_nothing_but_the_video_is_left(tmp_path, moving_disc):
    write(tmp_path / "v.mp4", moving_disc(3, 64, 64))
    assert os.listdir(tmp_path) == ["v.mp4"]


@pytest.mark.parametrize("name", ["-y.mp4", "100% a:b 'q' \"d\" 😀.mp4", "x" * 250 + ".mp4"])
def test_names_that_could_confuse_a_command_line(tmp_path, moving_disc, name):
    write(tmp_path / name, moving_disc(1, 64, 64))
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(("width", "height"), [(63, 64), (64, 63), (0, 64), (64, -2)])
def test_sizes_that_h264_cannot_hold_are_refused(tmp_path, width, height):
    with pytest.raises(UserError) as refused:
        VideoWriter(tmp_path / "v.mp4", width=width, height=height, metadata=PLAIN)
    assert refused.value.field == ("width" if width != 64 else "height")


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((64, 64, 3), np.float32),
        np.zeros((64, 32, 3), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64), np.uint8),
    ],
)
def test_a_frame_of_another_kind_is_refused_and_nothing_is_left(tmp_path, frame):
    with pytest.raises(ValueError, match=r"uint8 \[64, 64, 3\]"):
        write_frame_of_64(tmp_path / "v.mp4", frame)
    assert os.listdir(tmp_path) == []


def write_frame_of_64(path: Path, frame: np.ndarray) -> None:
    with VideoWriter(path, width=64, height=64, metadata=PLAIN) as writer:
        writer.write(frame)


@pytest.mark.parametrize("error", [RuntimeError("decoder"), KeyboardInterrupt()])
def test_an_exception_in_the_block_leaves_the_older_file_and_no_other(tmp_path, moving_disc, error):
    path = tmp_path / "v.mp4"
    path.write_bytes(b"older")
    with (
        pytest.raises(type(error)),
        VideoWriter(path, width=64, height=64, metadata=PLAIN) as writer,
    ):
        writer.write(moving_disc(1, 64, 64)[0])
        process = writer._encoder._process
        raise error
    assert process.poll() is not None
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["v.mp4"]


def test_the_final_name_does_not_exist_while_frames_are_written(tmp_path, moving_disc):
    path = tmp_path / "v.mp4"
    with VideoWriter(path, width=64, height=64, metadata=PLAIN) as writer:
        for frame in moving_disc(5, 64, 64):
            writer.write(frame)
            assert not path.exists()
            assert all(name.startswith(".") for name in os.listdir(tmp_path))
    assert path.exists()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_ffmpeg_is_told_and_nothing_is_left(tmp_path, moving_disc):
    with (
        pytest.raises(K1Error, match="killed by signal 9"),
        VideoWriter(tmp_path / "v.mp4", width=64, height=64, metadata=PLAIN) as writer,
    ):
        writer.write(moving_disc(1, 64, 64)[0])
        process = writer._encoder._process
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        writer.write(np.zeros((64, 64, 3), np.uint8))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupted_ffmpeg_does_not_pass_for_a_whole_video(tmp_path, moving_disc):
    with (
        pytest.raises(K1Error, match="ffmpeg"),
        VideoWriter(tmp_path / "v.mp4", width=64, height=64, metadata=PLAIN) as writer,
    ):
        for frame in moving_disc(30, 64, 64):
            writer.write(frame)
        writer._encoder._process.send_signal(signal.SIGTERM)
    assert os.listdir(tmp_path) == []


def test_a_ffmpeg_that_ends_early_but_well_does_not_pass_for_a_whole_video(
    tmp_path, moving_disc, monkeypatch
):
    write(tmp_path / "short.mp4", moving_disc(2, 64, 64))
    copy = f"sys.stdin.buffer.read()\nshort = {str(tmp_path / 'short.mp4')!r}"
    copy += "\nopen(sys.argv[-1].removeprefix('file:'), 'wb').write(open(short, 'rb').read())"
    fake_ffmpeg(tmp_path, copy, monkeypatch)
    (tmp_path / "out").mkdir()
    with pytest.raises(K1Error, match="2 of 3 frames"):
        write(tmp_path / "out" / "v.mp4", moving_disc(3, 64, 64))
    assert os.listdir(tmp_path / "out") == []


def test_the_last_lines_of_a_failing_ffmpeg_are_given(tmp_path, moving_disc, monkeypatch):
    body = "for n in range(50000): print('line', n, file=sys.stderr)\nsys.exit(3)"
    fake_ffmpeg(tmp_path, body, monkeypatch)
    with pytest.raises(K1Error, match=r"ended with code 3.*line 49999") as failed:
        write(tmp_path / "out" / "v.mp4", moving_disc(40, 128, 128))
    assert "\n" not in str(failed.value)
    assert len(str(failed.value)) < 2000
    assert os.listdir(tmp_path / "out") == []


def test_a_disk_that_fills_is_named_with_both_numbers(tmp_path, moving_disc, monkeypatch):
    body = "print('Error writing trailer: No space left on device', file=sys.stderr)\nsys.exit(228)"
    fake_ffmpeg(tmp_path, body, monkeypatch)
    with pytest.raises(DiskFull, match=r"needs [\d.]+ MB, [\d.]+ MB free"):
        write(tmp_path / "out" / "v.mp4", moving_disc(40, 128, 128))
    assert os.listdir(tmp_path / "out") == []


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a disk of 200 kB needs the right to mount one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_really_fills_leaves_no_file(tiny_disk, monkeypatch):
    monkeypatch.setattr(atomic, "free_bytes", lambda folder: 10**12)
    noise = np.random.default_rng(0).integers(0, 256, (12, 128, 128, 3), np.uint8)
    (tiny_disk / "v.mp4").write_bytes(b"older")
    with pytest.raises(DiskFull):
        write(tiny_disk / "v.mp4", np.tile(noise, (4, 1, 1, 1)))
    with pytest.raises(DiskFull):
        write_png(tiny_disk / "p.png", noise.reshape(12 * 128, 128, 3), PLAIN)
    assert os.listdir(tiny_disk) == ["v.mp4"]
    assert (tiny_disk / "v.mp4").read_bytes() == b"older"


def test_too_little_disk_is_told_before_the_first_frame(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "free_bytes", lambda folder: 5 * 10**6)
    writer = VideoWriter(
        tmp_path / "v.mp4", width=1280, height=768, metadata=PLAIN, frames=241, crf=16
    )
    with pytest.raises(DiskFull, match=r"5\.0 MB free"), writer:
        pytest.fail("the block was entered")
    with pytest.raises(DiskFull, match=r"needs 6\.0 MB, 5\.0 MB free"):
        prepare_output(tmp_path / "v.mp4", needed_bytes=6 * 10**6)
    assert os.listdir(tmp_path) == []


def test_room_asked_for_grows_with_the_video_and_covers_noise(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    write(tmp_path / "v.mp4", noise, crf=0)
    assert (tmp_path / "v.mp4").stat().st_size < video_bytes(64, 64, 6, crf=0)
    assert video_bytes(64, 64, 100) < video_bytes(64, 64, 200) < video_bytes(64, 64, 200, crf=0)


def test_a_missing_ffmpeg_is_told(tmp_path, moving_disc, monkeypatch):
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(tmp_path / "none"))
    with pytest.raises(K1Error, match="reinstall"):
        write(tmp_path / "v.mp4", moving_disc(1, 64, 64))
    assert os.listdir(tmp_path) == []


def test_a_video_without_frames_is_no_video(tmp_path):
    with pytest.raises(K1Error, match="no frame"):
        write(tmp_path / "v.mp4", np.zeros((0, 64, 64, 3), np.uint8))
    assert os.listdir(tmp_path) == []


def test_missing_folders_are_made(tmp_path):
    assert prepare_output(tmp_path / "a" / "b" / "v.mp4") == tmp_path / "a" / "b" / "v.mp4"
    assert os.listdir(tmp_path / "a" / "b") == []


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepare_output("~/v.mp4") == tmp_path / "v.mp4"


@pytest.mark.parametrize(
    "given",
    ["{tmp}/file/v.mp4", "/proc/v.mp4", "{tmp}", "/dev/null", "{tmp}/\0.mp4", "{tmp}/" + "x" * 300],
)
def test_a_place_that_cannot_be_written_is_told_at_the_field(tmp_path, given):
    (tmp_path / "file").write_bytes(b"")
    path = given.format(tmp=tmp_path)
    with pytest.raises(UserError) as refused:
        prepare_output(path)
    assert refused.value.field == "out"
    assert os.listdir(tmp_path) == ["file"]
    assert "\n" not in str(refused.value)


def test_an_existing_file_is_untouched_by_the_check(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"older")
    prepare_output(tmp_path / "v.mp4")
    assert (tmp_path / "v.mp4").read_bytes() == b"older"


def test_a_failing_sync_keeps_the_older_file(tmp_path, monkeypatch):
    (tmp_path / "p.png").write_bytes(b"older")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull):
        write_png(tmp_path / "p.png", np.zeros((8, 8, 3), np.uint8), PLAIN)
    assert os.listdir(tmp_path) == ["p.png"]
    assert (tmp_path / "p.png").read_bytes() == b"older"


def test_a_picture_comes_back_with_its_metadata(tmp_path):
    frame = np.random.default_rng(2).integers(0, 256, (33, 47, 3), np.uint8)
    metadata = {"k1": "0", "request": {"prompt": NASTY * 200}, "seed": 3}
    write_png(tmp_path / "p.png", frame, metadata)
    with Image.open(tmp_path / "p.png") as picture:
        assert np.array_equal(np.asarray(picture), frame)
        assert picture.info["parameters"].startswith("a=b;c#d")
        assert "Seed: 3" in picture.info["parameters"]
    assert read_metadata(tmp_path / "p.png") == metadata
    assert os.listdir(tmp_path) == ["p.png"]


def test_pictures_are_the_same_to_the_byte(tmp_path):
    for name in ("a.png", "b.png"):
        write_png(tmp_path / name, np.full((16, 16, 3), 7, np.uint8), PLAIN)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_files_get_the_usual_permissions(tmp_path, moving_disc):
    before = os.umask(0o022)
    try:
        write(tmp_path / "v.mp4", moving_disc(1, 64, 64))
        write_png(tmp_path / "p.png", moving_disc(1, 64, 64)[0], PLAIN)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


def test_writing_outside_the_block_is_a_mistake(tmp_path):
    writer = VideoWriter(tmp_path / "v.mp4", width=64, height=64, metadata=PLAIN)
    with pytest.raises(RuntimeError):
        writer.write(np.zeros((64, 64, 3), np.uint8))


def test_public_names_are_in_one_place():
    assert set(media.__all__) >= {"VideoWriter", "write_png", "prepare_output", "DiskFull"}

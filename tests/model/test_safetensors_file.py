"""Files that are not what they claim to be are named as what they are, before anything is read."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
from collections import OrderedDict
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch
from open_files import open_files
from PIL import Image
from safetensors.torch import save_file

from kandinsky5.errors import CheckpointError
from kandinsky5.model.safetensors_file import MAX_HEADER_VALUES, MAX_TENSORS, SafetensorsFile

FORTY_GB = 40 * 10**9


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with that header (JSON or raw bytes), a header length of one's choice, and that data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def reason(path: Path) -> str:
    """Why the file is refused; one line."""
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)
    return caught.value.reason


def image_bytes(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, kind)
    return buffer.getvalue()


def pickled(**options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(300)}, buffer, **options)
    return buffer.getvalue()


LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 4015405696\n"
)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (LFS_POINTER, "Git-LFS pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page (HTML)"),
        (b"\n  <html lang='en'>please log in</html>", "web page (HTML)"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
        (pickled(), "a pickle can run code; use .safetensors"),
        (
            pickled(_use_new_zipfile_serialization=False),
            "a pickle can run code; use .safetensors",
        ),
        (b"Entry not found", "a text, not a .safetensors file: 'Entry not found'"),
        (b'{"error": "Entry not found"}', "a JSON text"),
        (b'\xef\xbb\xbf[{"error": "Gone"}]', "a JSON text"),
        (b"\xef\xbb\xbf" + LFS_POINTER, "Git-LFS pointer"),
        (b"<!-- a proxy --><html>", "web page (HTML)"),
        ("<html>Войдите</html>".encode("utf-16"), "web page (HTML)"),
        ("<html>".encode("utf-16-be"), "web page (HTML)"),
        (b"\xef\xbb\xbf<!doctype html>", "web page (HTML)"),
        (b"\x1f\x8b\x08" + bytes(64), "a compressed archive"),
        (b"", "the file is empty"),
        (b"\x10\x00\x00", "cut short after 3 bytes"),
        (b"nothing anyone has ever heard of", "not a .safetensors file"),
        (bytes(4096), "not a .safetensors file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_kind_of_file_is_named_as_what_it_is(tmp_path, content, named):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert named in reason(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".PT"])
def test_a_pickles_suffix_is_refused_whatever_is_inside(tmp_path, suffix):
    path = write(tmp_path / f"model{suffix}", {"w": entry(0, 4)}, bytes(4))
    assert "a pickle can run code; use .safetensors" in reason(path)


def test_a_pointer_under_a_pickles_name_is_still_called_a_pointer(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(LFS_POINTER)
    assert "Git-LFS pointer" in reason(path)


def test_a_header_of_640_bytes_is_not_taken_for_a_pickle(tmp_path):
    """Its length begins with the very bytes a pickle begins with."""
    text = json.dumps({"w": entry(0, 4)}).encode().ljust(0x280)
    path = write(tmp_path / "model.safetensors", text, bytes(4))
    assert path.read_bytes()[:2] == b"\x80\x02"
    with SafetensorsFile(path) as file:
        assert list(file.tensors) == ["w"]


def test_names_shapes_dtypes_and_metadata_come_from_the_header(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(
        {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)},
        path,
        metadata={"trigger": "k5"},
    )
    with SafetensorsFile(path) as file:
        assert file.metadata == {"trigger": "k5"}
        assert {n: (i.dtype, i.shape) for n, i in file.tensors.items()} == {
            "a": ("F32", (2, 3)),
            "b": ("BF16", (5,)),
        }


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(3, 4).to(torch.bfloat16),
        torch.randn(7).half(),
        torch.randn(2, 2, 2).double(),
        torch.randint(-128, 127, (5, 3), dtype=torch.int8),
        torch.randn(4, 4).to(torch.float8_e4m3fn),
        torch.tensor(3.5),
        torch.zeros(0, 4),
        torch.tensor([True, False]),
    ],
    ids=lambda t: f"{t.dtype} {list(t.shape)}",
)
def test_a_tensor_reads_back_as_it_was_written(tmp_path, tensor):
    save_file({"before": torch.ones(3), "t": tensor}, tmp_path / "model.safetensors")
    with SafetensorsFile(tmp_path / "model.safetensors") as file:
        read = file.read("t")
    assert read.dtype == tensor.dtype and read.shape == tensor.shape
    assert torch.equal(read.float(), tensor.float())


def test_a_tensor_that_takes_several_reads_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("kandinsky5.model.safetensors_file._READ_BYTES", 7)
    save_file({"t": torch.arange(100.0)}, tmp_path / "model.safetensors")
    with SafetensorsFile(tmp_path / "model.safetensors") as file:
        assert torch.equal(file.read("t"), torch.arange(100.0))


def test_a_truncated_download_says_both_sizes(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"t": torch.zeros(1000)}, path)
    whole = path.stat().st_size
    os.truncate(path, whole - 100)
    assert reason(path) == (
        f"header says {whole} bytes, the file has {whole - 100}: download it again"
    )


def test_a_file_cut_inside_its_header_says_both_sizes(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"t": torch.zeros(1000)}, path)
    os.truncate(path, 20)
    assert "the file has 20: download it again" in reason(path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path):
    path = write(tmp_path / "model.safetensors", {"w": entry(0, 4)}, bytes(10))
    assert "header says" in reason(path)


def test_a_truncated_file_of_40_gb_is_refused_without_reading_it(tmp_path):
    path = write(tmp_path / "model.safetensors", {"w": entry(0, 2 * FORTY_GB)})
    os.truncate(path, FORTY_GB)
    assert f"the file has {FORTY_GB}" in reason(path)


def test_a_header_of_10_gb_is_refused_before_it_is_read(tmp_path):
    path = write(tmp_path / "model.safetensors", b"{", length=10 * 10**9)
    os.truncate(path, FORTY_GB)
    assert "claims a header of 10000000000 bytes" in reason(path)


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (b'{"w": ', "not valid JSON"),
        (b'{"w\xff": 1}', "not valid JSON"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "not valid JSON"),
        (b'{"w": 1, "w": 1}', "occurs twice"),
        ({"w": [1]}, "needs dtype, shape and data_offsets"),
        ({"w": {"dtype": "U8", "shape": [4]}}, "needs dtype, shape and data_offsets"),
        ({"w": entry(0, 4, dtype="U9")}, "unknown dtype 'U9'"),
        ({"w": entry(0, 4, [5])}, "4 bytes for shape [5] in U8"),
        ({"w": entry(0, 4, [-2, -2])}, "whole numbers"),
        ({"w": entry(0, 4, [True, 4])}, "whole numbers"),
        ({"w": entry(-4, 0, [4])}, "whole numbers"),
        ({"w": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, "whole numbers"),
        ({"w": entry(0, 0, [0, 2**62, 2**62])}, "more elements than can be counted"),
        ({"w": entry(0, 4, [1] * 20 + [4])}, "21 dimensions"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, "'a' and 'b' overlap"),
        ({"a": entry(0, 4), "b": entry(6, 10)}, "'a' and 'b' leave a gap"),
        ({"a": entry(2, 6)}, "the header and 'a' leave a gap"),
        ({"__metadata__": {"x": 1}, "a": entry(0, 10)}, "not text by name"),
        ({"a\n\x1b[31m" + "x" * 5000: entry(2, 12)}, r"'a\n\x1b[31mxxx"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_header_that_does_not_hold_together_is_refused(tmp_path, header, named):
    path = write(tmp_path / "model.safetensors", header, bytes(10))
    why = reason(path)
    assert named in why
    assert len(why) < 300


def test_a_file_cut_short_after_it_was_opened_gives_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000), "b": torch.ones(100_000)}, path)
    with SafetensorsFile(path) as file:
        os.truncate(path, 50_000)
        assert torch.equal(file.read("a"), torch.ones(1000))
        with pytest.raises(CheckpointError, match="became shorter while it was read"):
            file.read("b")


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path):
    assert reason(tmp_path / "none.safetensors") == "no such file"
    assert "a folder" in reason(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in reason(tmp_path / "pipe")
    assert "not a regular file" in reason(Path("/dev/zero"))


def test_a_refused_file_is_not_left_open(tmp_path):
    path = write(tmp_path / "model.safetensors", {"w": entry(0, 4)})
    reason(path)
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WebP", "BMP", "TIFF", "AVIF"])
def test_an_image_is_called_one_with_its_format(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    try:
        path.write_bytes(image_bytes(kind))
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    assert reason(path) == f"an image ({kind}), not a checkpoint"


@pytest.mark.parametrize(
    ("kind", "suffix"), [("MP4", "mp4"), ("MOV", "mov"), ("MKV or WebM", "mkv")]
)
def test_a_video_is_called_one_with_its_format(tmp_path, kind, suffix):
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-f",
        "lavfi",
        "-i",
        "testsrc=s=16x16:d=0.1",
    ]
    subprocess.run([*command, str(tmp_path / f"a.{suffix}")], check=True)
    path = (tmp_path / f"a.{suffix}").rename(tmp_path / "model.safetensors")
    assert reason(path) == f"a video ({kind}), not a checkpoint"


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize(
    "value", [{}, {"w": 1.5}, [1, 2], OrderedDict(w=1), torch.zeros(3), Path("x")], ids=str
)
def test_a_pickle_of_any_protocol_is_refused_as_one(tmp_path, protocol, value):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(value, protocol))
    assert reason(path) == "a pickle can run code; use .safetensors"


def test_a_text_is_no_pickle(tmp_path):
    path = tmp_path / "model.safetensors"
    for text in ("city\nname\nand more", "(see below)\nI am\n", "[model]\nsize = 3\n"):
        path.write_text(text)
        assert "text, not a .safetensors file" in reason(path)


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (
            b'{"w":' + b'{"data_offsets":[0,0]},' * (MAX_TENSORS + 1),
            f"names {MAX_TENSORS + 1} tensors",
        ),
        (b'{"w":[' + b"[]," * MAX_HEADER_VALUES, "values"),
        (b'{"w":{' + b'"a":1,' * MAX_HEADER_VALUES, "values"),
    ],
    ids=["tensors", "lists", "names"],
)
def test_a_header_that_would_take_long_is_refused_before_it_is_parsed(
    tmp_path, monkeypatch, header, named
):
    monkeypatch.setattr("kandinsky5.model.safetensors_file.json.loads", None)
    why = reason(write(tmp_path / "model.safetensors", header))
    assert named in why and len(why) < 120


def test_more_tensors_than_are_read_are_refused_however_their_entries_are_written(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("kandinsky5.model.safetensors_file.MAX_TENSORS", 2)
    header = json.dumps({name: entry(0, 0) for name in "abc"}).replace("data_o", "data\\u005fo")
    path = write(tmp_path / "model.safetensors", header.encode())
    assert "names 3 tensors, at most 2" in reason(path)
    two = {"__metadata__": {"about": '"data_offsets"'}, "a": entry(0, 0), "b": entry(0, 0)}
    SafetensorsFile(write(tmp_path / "model.safetensors", two)).close()

"""A file says what made it, tells nothing about the machine, and restores the request."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from kandinsky5 import __version__
from kandinsky5.errors import UserError
from kandinsky5.output.media import VideoWriter, write_png
from kandinsky5.output.metadata import (
    describe,
    header_sha256,
    read_metadata,
    readable,
    request_of,
    to_json,
    video_info,
)
from kandinsky5.request import GenerationRequest, LoraChoice

REPOSITORY = Path(__file__).resolve().parents[2]
FIGURES = {"seconds": {"denoise": 1.23456}, "peak_vram_bytes": 5, "peak_rss_bytes": 6}


def full_request() -> GenerationRequest:
    return GenerationRequest(
        preset="demo-i2v",
        prompt="a red circle moves right",
        negative_prompt="blur",
        image="/home/ann/pictures/cat.png",
        dit=r"C:\models\own.safetensors",
        model_dir="/home/ann/models/",
        loras=(LoraChoice("/home/ann/loras/a.safetensors", 0.5), LoraChoice("b.safetensors")),
        init_latents="/home/ann/noise.safetensors",
        save_latents="../../home/ann/final.safetensors",
        out="/home/ann/out.mp4",
        width=128,
        height=96,
        seconds=1.0,
        steps=12,
        guidance=3.5,
        shift=5.0,
        crf=20,
        expand=False,
    )


def described(**changes) -> dict:
    options = {"checkpoint": None, "seed": 11, **FIGURES, **changes}
    return describe(options.pop("request", full_request()), **options)


@pytest.fixture
def video(tmp_path) -> Path:
    path = tmp_path / "v.mp4"
    with VideoWriter(path, width=64, height=48, metadata=described()) as writer:
        for level in range(12):
            writer.write(np.full((48, 64, 3), level * 20, np.uint8))
    return path


def test_no_path_of_the_machine_is_told(tmp_path):
    checkpoint = tmp_path / "own.safetensors"
    checkpoint.write_bytes(b"")
    text = to_json(described(checkpoint=checkpoint))
    assert not re.search(r"/|\\\\", text), text
    assert "ann" not in text
    assert str(tmp_path) not in text


def test_names_of_files_are_kept():
    values = described()["request"]
    assert values["image"] == "cat.png"
    assert values["dit"] == "own.safetensors"
    assert values["model_dir"] == "models"
    assert values["loras"] == [
        {"path": "a.safetensors", "strength": 0.5},
        {"path": "b.safetensors", "strength": 1.0},
    ]


def test_description_is_json_with_version_figures_and_expansion():
    metadata = described(expanded_prompt="A red circle glides …")
    assert json.loads(to_json(metadata)) == metadata
    assert metadata["k1"] == __version__
    assert metadata["expanded_prompt"] == "A red circle glides …"
    assert metadata["seconds"] == {"denoise": 1.235}
    assert "expanded_prompt" not in described()


def test_the_request_is_restored_but_for_folders_and_with_its_seed():
    request = request_of(json.loads(to_json(described())))
    original = full_request().to_dict()
    restored = request.to_dict()
    assert restored.pop("seed") == 11
    changed = {key for key, value in restored.items() if value != original[key]}
    paths = {"image", "dit", "model_dir", "loras", "init_latents", "save_latents", "out"}
    assert changed == paths


def test_a_video_restores_its_request(video):
    assert request_of(read_metadata(video)) == request_of(described())


def test_a_picture_restores_its_request(tmp_path):
    write_png(tmp_path / "p.png", np.zeros((16, 16, 3), np.uint8), described())
    assert request_of(read_metadata(tmp_path / "p.png")) == request_of(described())


def test_info_of_a_video(video):
    assert video_info(video) == {
        "width": 64,
        "height": 48,
        "frames": 12,
        "duration_s": 0.5,
        "fps": 24.0,
    }


def test_info_of_a_picture(tmp_path):
    write_png(tmp_path / "p.png", np.zeros((16, 24, 3), np.uint8), described())
    info = video_info(tmp_path / "p.png")
    assert (info["width"], info["height"], info["frames"]) == (24, 16, 1)


def test_info_of_a_video_of_another_program(tmp_path):
    path = tmp_path / "other.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi"]
    command += ["-i", "testsrc=size=96x80:rate=30000/1001:duration=1", "-f", "lavfi"]
    command += ["-i", "sine=duration=1", "-map", "1:a", "-map", "0:v", "-c:v", "mpeg4", str(path)]
    subprocess.run(command, check=True)
    info = video_info(path)
    assert (info["width"], info["height"], info["frames"]) == (96, 80, 30)
    assert info["fps"] == pytest.approx(30000 / 1001, rel=1e-4)
    with pytest.raises(UserError, match="no K1 parameters"):
        read_metadata(path)


def test_the_hash_is_that_of_the_header_alone(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    start = struct.pack("<Q", len(header)) + header
    (tmp_path / "a.safetensors").write_bytes(start + b"\0\0\0\0")
    (tmp_path / "b.safetensors").write_bytes(start + b"\1\1\1\1")
    wanted = hashlib.sha256(header).hexdigest()
    assert header_sha256(tmp_path / "a.safetensors") == wanted
    assert header_sha256(tmp_path / "b.safetensors") == wanted
    assert header_sha256(tmp_path) == hashlib.sha256(header + header).hexdigest()
    assert described(checkpoint=tmp_path / "a.safetensors")["checkpoint"] == {
        "name": "a.safetensors",
        "header_sha256": wanted,
    }


@pytest.mark.parametrize("data", [b"", b"abc", struct.pack("<Q", 10**10), b"\xff" * 64])
def test_no_hash_where_there_is_no_header(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    assert header_sha256(tmp_path / "x") is None
    assert header_sha256(tmp_path / "missing") is None


def test_the_readable_text_names_what_a_person_looks_for():
    text = readable(described())
    assert text.splitlines()[:2] == ["a red circle moves right", "Negative prompt: blur"]
    assert "Steps: 12, Guidance: 3.5, Shift: 5.0, Seed: 11, Size: 128x96" in text


COMMUNITY = {
    "model_type": "Kandinsky 5.0",
    "mode": "i2v",
    "prompt": "a cat",
    "negative_prompt": "static",
    "image_path": "cat.png",
    "width": 768,
    "height": 512,
    "video_duration": 5,
    "sample_steps": 50,
    "guidance_weight": 5.0,
    "scheduler_scale": 10.0,
    "seed": 7,
    "use_int8": True,
    "use_magcache": True,
    "blocks_in_memory": None,
    "model_config": "5s Pro 20B HD (I2V)",
    "dit_checkpoint_path": "/home/bob/k5.safetensors",
    "attention_type": None,
    "nabla_P": None,
}


def test_the_early_community_programs_videos_restore_a_request(tmp_path):
    source = tmp_path / "source.mp4"
    with VideoWriter(source, width=64, height=64, metadata={}) as writer:
        writer.write(np.zeros((64, 64, 3), np.uint8))
    theirs = tmp_path / "theirs.mp4"
    comment = f"comment={json.dumps(COMMUNITY, indent=2)}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(source)]
    subprocess.run([*command, "-metadata", comment, "-codec", "copy", str(theirs)], check=True)
    request = request_of(read_metadata(theirs))
    assert (request.preset, request.prompt) == ("pro-i2v-5s-hd", "a cat")
    assert (request.seed, request.steps, request.shift) == (7, 50, 10.0)
    assert (request.width, request.height, request.seconds) == (768, 512, 5.0)
    assert (request.weights, request.cache, request.image) == ("int8", "magcache", "cat.png")
    assert request.dit == "k5.safetensors"


@pytest.mark.parametrize(
    "change", [{"width": "wide"}, {"prompt": None}, {"seed": -4}, {"dit_checkpoint_path": 3}]
)
def test_an_edited_community_comment_is_refused_as_bad_input(change):
    with pytest.raises(UserError):
        request_of({**COMMUNITY, **change})


def test_an_unknown_label_falls_back_by_mode():
    assert request_of({**COMMUNITY, "model_config": []}).preset == "lite-i2v-5s"
    assert request_of({**COMMUNITY, "model_config": "?", "mode": "t2v"}).preset == "lite-t2v-5s-sft"


@pytest.mark.parametrize("request_value", [None, [], "x", {"surprise": 1}, {"version": 99}])
def test_an_edited_request_is_refused_as_bad_input(request_value):
    with pytest.raises(UserError):
        request_of({"k1": "0", "request": request_value})


@pytest.mark.parametrize(
    "comment", ["", "hello", "[1]", "{", "[" * 100_000, "9" * 6000, '{"a": 1}']
)
def test_somebody_elses_text_is_no_parameters(tmp_path, comment):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("k1", comment)
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png", pnginfo=chunks)
    with pytest.raises(UserError, match="no K1 parameters") as refused:
        read_metadata(tmp_path / "p.png")
    assert refused.value.field == "file"


@pytest.mark.parametrize("name", ["missing.mp4", ".", "\0", "~nobody-here/x.mp4", "text.mp4"])
def test_what_is_no_video_is_refused_as_bad_input(tmp_path, name):
    (tmp_path / "text.mp4").write_text("hello, this is not a video")
    path = name if name.startswith("~") else f"{tmp_path}/{name}"
    for read in (read_metadata, video_info):
        with pytest.raises(UserError) as refused:
            read(path)
        assert refused.value.field == "file"


def test_a_video_cut_short_anywhere_is_refused_or_read_never_worse(video, tmp_path):
    data = video.read_bytes()
    cut = tmp_path / "cut.mp4"
    for length in range(0, len(data), 7):
        cut.write_bytes(data[:length])
        for read in (read_metadata, video_info):
            try:
                read(cut)
            except UserError as error:
                assert error.field == "file"


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8)
)
def test_a_damaged_video_is_refused_or_read_never_worse(edits, whole_video):
    path, data = whole_video
    damaged = bytearray(data)
    for place, value in edits:
        damaged[place % min(len(damaged), 4000)] = value
    path.write_bytes(damaged)
    for read in (read_metadata, video_info):
        try:
            read(path)
        except UserError as error:
            assert error.field == "file"


@pytest.fixture(scope="module")
def whole_video(tmp_path_factory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("damaged") / "v.mp4"
    with VideoWriter(path, width=64, height=64, metadata=described()) as writer:
        writer.write(np.zeros((64, 64, 3), np.uint8))
    return path, path.read_bytes()


def test_reading_metadata_loads_neither_torch_nor_ffmpeg():
    code = "import sys, kandinsky5.output.metadata; "
    code += "assert not {'torch', 'imageio_ffmpeg', 'safetensors'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)

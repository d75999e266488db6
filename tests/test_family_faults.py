"""Rows of faults.md that concern models and prompts, through the command line: one line, or a notice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FRAMES, HEIGHT_PX, WIDTH_PX, quick, write_model

from kandinsky5.cli import main
from kandinsky5.presets import PRESETS

FILE = PRESETS["lite-t2v-5s-sft"].weights_file
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound t2v model in the official layout."""
    return write_model(tmp_path_factory.mktemp("whole") / "model", "t2v", "official")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """(exit code, JSON, what is said on stderr after the progress) of ``generate`` for a request's values."""

    def typed(values: dict[str, Any]) -> tuple[int, dict[str, Any], str]:
        words = ["generate", "--json", "--no-expand", "--state-dir", str(tmp_path / "state")]
        for name, value in {"out": tmp_path / "a.mp4", **values}.items():
            if name != "expand":
                words += [f"--{name.replace('_', '-')}", str(value)]
        capfd.readouterr()
        code = main(words)
        said = capfd.readouterr()
        return code, json.loads(said.out), said.err.strip().splitlines()[-1] if said.err else ""

    return typed


def changed(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_truncated_part_says_both_sizes(model, run) -> None:  # fault 10
    path = model / "model" / FILE
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    code, _, said = run(quick("t2v", model))
    assert code == 3
    assert f"header says {len(data)} bytes, the file has {len(data) - 1000}: download" in said


def test_a_text_to_video_file_begins_with_a_picture_and_says_so(model, run) -> None:  # fault 15
    code, done, _ = run(quick("i2v", model, dit=model / "model" / FILE))
    assert code == 0 and done["frames"] == FRAMES
    assert f"{FILE} is by its name for t2v, lite-i2v-5s is for i2v" in done["notices"]


def test_a_path_in_quotes_with_blanks_is_understood(model, run) -> None:  # fault 16
    place = model.rename(model.with_name("my model"))
    code, done, _ = run(quick("t2v", place) | {"model_dir": f'  "{place}" '})
    assert code == 0 and done["frames"] == FRAMES
    code, _, said = run(quick("t2v", place) | {"model_dir": "/dev/null"})
    assert code == 2 and said.startswith("k1: model_dir: got '/dev/null'")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder2"])
def test_a_missing_part_names_its_path_and_the_command(model, run, part) -> None:  # fault 17
    shutil.rmtree(model / part)
    code, _, said = run(quick("t2v", model))
    assert code == 3
    assert str(model / part) in said or str(model / "text_encoder_2") in said
    assert "python k1.py download lite-t2v-5s-sft" in said


def test_a_step_that_gives_nan_ends_the_run_with_the_safe_choice(model, run) -> None:  # fault 18
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["visual_transformer_blocks.1.feed_forward.in_layer.weight"][3, 5] = torch.nan

    changed(model / "model" / FILE, spoil)
    code, _, said = run(quick("t2v", model))
    assert code == 1
    assert "step 1 of 2 gave NaN" in said and 'choose attention "sdpa"' in said


def test_frames_of_one_colour_are_a_warning_with_the_result(model, run) -> None:  # fault 19
    def blind(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("decoder.conv_out.conv.weight", "decoder.conv_out.conv.bias"):
            tensors[name].zero_()

    changed(model / VAE_FILE, blind)
    code, done, _ = run(quick("t2v", model))
    assert code == 0 and done["frames"] == FRAMES
    assert any("every frame is of one colour" in notice for notice in done["notices"])


def test_ten_thousand_tokens_run_with_what_fits(model, run) -> None:  # fault 22
    code, done, _ = run(quick("t2v", model, prompt="red " * 10_000))
    assert code == 0 and done["frames"] == FRAMES
    (notice,) = [text for text in done["notices"] if text.startswith("prompt: ")]
    assert "tokens, the model reads" in notice and "not read: " in notice


def test_a_size_off_the_grid_is_snapped_with_a_notice(model, run) -> None:  # fault 24
    code, done, _ = run(quick("t2v", model, width=WIDTH_PX + 1, height=HEIGHT_PX + 3))
    assert code == 0 and (done["width"], done["height"]) == (WIDTH_PX, HEIGHT_PX)
    said = " ".join(done["notices"])
    assert f"width {WIDTH_PX + 1} set to {WIDTH_PX}" in said
    assert f"height {HEIGHT_PX + 3} set to {HEIGHT_PX}" in said
    for field, value in (("width", -1), ("height", 10**6), ("width", "nan"), ("seconds", 30)):
        code, _, refused = run(quick("t2v", model) | {field: value})
        assert code == 2 and f"{field}: got" in refused and "from" in refused

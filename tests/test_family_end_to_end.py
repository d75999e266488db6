"""All four modes through the command line, on tiny models in both layouts they are published in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_checkpoints import (
    FRAMES,
    HEIGHT_PX,
    LAYOUTS,
    MODES,
    STEPS,
    VIDEO,
    WIDTH_PX,
    quick,
    write_model,
)

from kandinsky5.cli import main
from kandinsky5.model import files as model_files
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.lora import layer_sizes
from kandinsky5.output.metadata import read_metadata, request_of, video_info
from kandinsky5.output.state import load_latents
from kandinsky5.presets import PRESETS
from tests.support import loras


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """``<mode>-<layout>`` folders."""
    folder = tmp_path_factory.mktemp("models")
    for mode in MODES:
        for layout in LAYOUTS:
            write_model(folder / f"{mode}-{layout}", mode, layout)
    return folder


class Typed:
    """Types command lines in a folder of its own."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capfd = folder, capfd

    def generate(self, values: dict[str, Any], *switches: str) -> dict[str, Any]:
        """What ``generate --json`` answers for a request's values."""
        words = ["generate", "--json", "--state-dir", str(self.folder / "state"), *switches]
        for name, value in values.items():
            if name == "expand":
                words += [] if value else ["--no-expand"]
            else:
                words += [f"--{name.replace('_', '-')}", str(value)]
        return self._said(words)

    def inspect(self, path: Path) -> dict[str, Any]:
        return self._said(["inspect", str(path), "--json"])

    def _said(self, words: list[str]) -> dict[str, Any]:
        self._capfd.readouterr()
        code = main(words)
        said = self._capfd.readouterr()
        assert code == 0, said.err
        return json.loads(said.out)


@pytest.fixture
def k1(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Typed:
    return Typed(tmp_path, capfd)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_runs_from_a_typed_line_to_a_file_whatever_the_layout(models, k1, mode) -> None:
    video = PRESETS[MODES[mode].preset].is_video
    frames, latents = FRAMES if video else 1, []
    for layout in LAYOUTS:
        model = models / f"{mode}-{layout}"
        out = k1.folder / f"{layout}.{'mp4' if video else 'png'}"
        kept = k1.folder / f"{layout}.safetensors"
        done = k1.generate(quick(mode, model, out=out, save_latents=kept))
        assert done["output"] == str(out)
        assert (done["frames"], done["width"], done["height"]) == (frames, WIDTH_PX, HEIGHT_PX)
        assert (done["steps_run"], done["evaluations_run"]) == (STEPS, 2 * STEPS)
        info = video_info(out)
        assert (info["frames"], info["width"], info["height"]) == (frames, WIDTH_PX, HEIGHT_PX)
        metadata = read_metadata(out)
        request = request_of(metadata)
        assert (request.preset, request.seed, request.steps) == (MODES[mode].preset, 3, STEPS)
        assert str(models) not in json.dumps(metadata)
        assert metadata["attention"] == {"engine": "sdpa", "nabla": False}
        latents.append(load_latents(kept)[0])
        if not video:
            assert Image.open(out).convert("L").getextrema() != (0, 0)
    assert torch.equal(*latents)
    assert latents[0].isfinite().all() and latents[0].std() > 0.1


def test_a_preset_runs_from_the_hubs_cache_as_a_download_leaves_it(
    models, k1, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, preset = models / "t2v-official", PRESETS[MODES["t2v"].preset]
    parts = {
        preset.repository: {"model": model / "model"},
        "hunyuanvideo-community/HunyuanVideo": {"vae": model / "vae"},
        "Qwen/Qwen2.5-VL-7B-Instruct": {"": model / "text_encoder"},
        "openai/clip-vit-large-patch14": {"": model / "text_encoder2"},
    }
    for repository, folders in parts.items():
        snapshots = k1.folder / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots"
        for name, folder in folders.items():
            shutil.copytree(folder, snapshots / "abc" / name)
    monkeypatch.setenv("HF_HUB_CACHE", str(k1.folder / "hub"))
    monkeypatch.setattr(model_files, "LITE_CHECKPOINTS", k1.folder / "none")
    values = quick("t2v", model, out=k1.folder / "a.mp4")
    del values["model_dir"]
    done = k1.generate(values)
    assert (done["frames"], done["steps_run"]) == (FRAMES, STEPS)


def test_a_prompt_is_rewritten_unless_it_is_said_otherwise(models, k1) -> None:
    """The answer of a random model is noise; it is used and kept all the same, or its refusal is said."""
    out = k1.folder / "a.png"
    done = k1.generate(quick("i2i", models / "i2i-official", expand=True, steps=1, out=out))
    assert "expand" in done["seconds"]
    assert done["expanded_prompt"] or any("expansion" in notice for notice in done["notices"])


def test_sparse_attention_a_cache_and_a_lora_come_together(models, k1) -> None:
    """A ten-second preset has NABLA, whose sides are multiples of 128 pixels."""
    with torch.device("meta"):
        sizes = layer_sizes(DiffusionTransformer3D(VIDEO))
    lora = loras.save_kohya(k1.folder / "a.safetensors", loras.random_pairs(sizes), alpha=3.0)
    values = quick("t2v", models / "t2v-official", steps=10, lora=f"{lora}:0.5")
    file = models / "t2v-official" / "model" / PRESETS["lite-t2v-5s-sft"].weights_file
    values |= {"preset": "lite-t2v-10s-sft", "dit": file, "out": k1.folder / "a.mp4"}
    done = k1.generate(values | {"cache": "magcache"})
    assert (done["width"], done["height"]) == (128, 128)
    said = " ".join(done["notices"])
    assert "width 96 set to 128" in said and "height 64 set to 128" in said
    assert f"{3 * len(sizes)} of {3 * len(sizes)} tensors match" in said
    assert done["evaluations_skipped"] > 0
    assert done["evaluations_run"] + done["evaluations_skipped"] == 20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_model_is_told_by_its_transformer(models, k1, layout) -> None:
    for mode in MODES:
        report = k1.inspect(models / f"{mode}-{layout}")
        assert (report["kind"], report["model"], report["problems"]) == ("dit", "custom", [])
        assert (report["quantization"], report["task_hint"]) == ("fp32", mode)

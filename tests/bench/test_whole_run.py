"""A whole job with random weights: the demo's here, the others' on a GPU; what is written can be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kandinsky5.bench import whole_run as bench
from kandinsky5.bench.random_file import write_random_transformer
from kandinsky5.bench.random_model import write_random_clip, write_random_qwen, write_random_vae
from kandinsky5.bench.whole_run import Measured, reached, whole_run
from kandinsky5.errors import UserError
from kandinsky5.family import QWEN_7B, VaeShape
from kandinsky5.model.dit import DiTConfig
from kandinsky5.model.reader import TransformerReader
from kandinsky5.model.text_loading import load_clip, load_qwen
from kandinsky5.model.vae_loading import load_vae
from kandinsky5.request import GenerationRequest, GenerationResult

CPU = torch.device("cpu")
DIT = DiTConfig(
    in_text_dim=24,
    in_text_dim2=12,
    time_dim=16,
    model_dim=64,
    ff_dim=128,
    num_text_blocks=1,
    num_visual_blocks=2,
    axes_dims=(8, 12, 12),
)


@pytest.mark.parametrize(("preset", "text"), [("demo-t2v", "random"), ("demo-i2v", "given")])
def test_the_demo_runs_with_random_weights_of_its_shapes(tmp_path, preset: str, text: str) -> None:
    found = whole_run(
        preset=preset,
        weights="int8",
        seconds=1 / 6,
        steps=2,
        text=text,
        ram=8.0,
        folder=str(tmp_path),
    )
    assert json.loads(json.dumps(found))["benchmark"] == "whole-run"
    assert set(found["stages"]) >= {"load", "encode text", "prepare", "denoise", "decode"}
    assert ("encode image" in found["stages"]) == (preset == "demo-i2v")
    assert found["evaluations_run"] == 4 and found["step_s"] > 0
    assert found["total_s"] >= sum(s["seconds"] for s in found["stages"].values()) * 0.99
    assert found["peak_rss_bytes"] == max(s["rss_bytes"] for s in found["stages"].values()) > 0
    assert ("given" in found["text_encoders"]) == (text == "given")
    assert found["reached"] == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_one_line_says_what_runs(tmp_path) -> None:
    with pytest.raises(UserError, match="a machine with a CUDA device, or the demo"):
        whole_run(preset="pro-t2v-5s-sd", folder=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"preset": "pro-t2v-7s"},
        {"preset": "demo-t2v", "text": "none"},
        {"preset": "demo-t2v", "compare": "cpu"},
        {"preset": "demo-t2v", "weights": "int4"},
        {"preset": "demo-t2v", "folder": "/nowhere"},
        {"preset": "demo-t2v", "steps": 0},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(wrong: dict[str, object], tmp_path) -> None:
    with pytest.raises(UserError):
        whole_run(**{"folder": str(tmp_path), **wrong})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_a_random_transformer_is_read_in_its_format(tmp_path: Path, weights: str) -> None:
    path = tmp_path / "random.safetensors"
    assert write_random_transformer(path, DIT, weights) == path.stat().st_size
    with TransformerReader(path) as reader:
        assert reader.model.config == DIT
        assert reader.stored_as.startswith(weights)


@pytest.mark.parametrize("is_video", [True, False])
def test_a_random_vae_is_read_and_gives_finite_pixels(tmp_path: Path, is_video: bool) -> None:
    shape = VaeShape("small", 0, (32, 32, 64, 64), 1, is_video=is_video)
    folder = tmp_path / "vae"
    assert (
        write_random_vae(folder, shape)
        == (folder / "diffusion_pytorch_model.safetensors").stat().st_size
    )
    kind = "hunyuan" if is_video else "flux"
    vae = load_vae(folder, kind, device=CPU, dtype=torch.float32)
    latent = torch.randn(1, 16, *((2,) if is_video else ()), 2, 2)
    with torch.inference_mode():
        assert vae.decode(latent).isfinite().all()


def test_random_text_encoders_are_read_by_the_programs_own_readers(tmp_path: Path) -> None:
    small = replace(
        QWEN_7B, hidden=256, layers=2, key_value_dim=128, intermediate=64, vocabulary=1000
    )
    write_random_qwen(tmp_path / "qwen", small)
    qwen = load_qwen(tmp_path / "qwen", device=CPU, dtype=torch.float32)
    with torch.inference_mode():
        hidden = qwen(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).last_hidden_state
    assert hidden.shape == (1, 3, 256) and hidden.isfinite().all()
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    write_random_clip(tmp_path / "clip", config)
    assert load_clip(tmp_path / "clip", device=CPU, dtype=torch.float32) is not None


def result_of(peak_vram_bytes: int, total_s: float, steps: int) -> Measured:
    result = GenerationResult("x", 121, 768, 512, 1, steps, 2 * steps, 0, {"total": total_s}, 0, 0)
    return Measured(replace(result, peak_vram_bytes=peak_vram_bytes), {}, [])


def test_targets_are_told_only_of_the_runs_they_speak_of(monkeypatch) -> None:
    request = GenerationRequest(prompt="x", preset="pro-t2v-5s-sd", vram=8.0)
    assert reached(request, result_of(7 * 10**9, 1.0, 10)) == {"B7": True}
    assert reached(request, result_of(int(7.9e9), 1.0, 10)) == {"B7": False}
    free = replace(request, vram=None)
    assert reached(free, result_of(10**9, 1.0, 50)) == {}
    monkeypatch.setattr(bench, "_is_hopper", lambda: True)
    assert reached(free, result_of(10**9, 559.0, 50)) == {"B10": True}
    assert reached(free, result_of(10**9, 559.0, 49)) == {}
    cached = replace(free, cache="magcache")
    assert reached(cached, result_of(10**9, 300.0, 50)) == {"B10": False}
    assert reached(cached, result_of(10**9, 290.0, 50)) == {"B10": True}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_lite_video_stays_under_its_cap_on_a_gpu(tmp_path) -> None:
    found = whole_run(
        preset="lite-t2v-5s-distilled",
        weights="int8",
        vram=6.0,
        steps=1,
        text="given",
        folder=str(tmp_path),
    )
    assert found["peak_reserved_bytes"] <= 6.0e9
    assert found["h2d_bytes"] > found["d2h_bytes"] > 0, "latents come back, weights never do"
    assert found["stages"]["denoise"]["allocated_bytes"] > 0

"""A preset runs with single files from ComfyUI's folder, bit for bit as with the model's own folder."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_models import (
    clip,
    clip_as_published,
    image_vae,
    in_scaled_fp8,
    qwen,
    qwen_as_published,
    vae_in_original_names,
    video_vae,
    write,
)
from demo_runs import keeper, ran
from PIL import Image
from safetensors.torch import load_file
from tiny_checkpoints import MODES, quick, write_model

from kandinsky5.errors import Stopped
from kandinsky5.model.files import locate_model
from kandinsky5.pipeline.named_files import NamedFiles, describe_files
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.presets import DEMO_FOLDER, PRESETS
from kandinsky5.request import GenerationRequest

QWEN_TOKENS, CLIP_TOKENS = 896, 960
"""Of the demo's tokenizers."""
VAES = {"t2v": (video_vae, "hunyuan_video_vae.safetensors"), "t2i": (image_vae, "ae.safetensors")}


@pytest.fixture(scope="module", params=VAES)
def places(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(mode, folder in diffusers' layout, ComfyUI's ``models`` with the same model, folder of tokenizers)."""
    mode = request.param
    root = tmp_path_factory.mktemp(f"comfyui-{mode}")
    folder = write_model(root / "whole", mode, "diffusers")
    vae, vae_file = VAES[mode][0](), VAES[mode][1]
    encoder, small = qwen(QWEN_TOKENS), clip(CLIP_TOKENS)
    for name, part in (("vae", vae), ("text_encoder", encoder), ("text_encoder_2", small)):
        shutil.rmtree(folder / name)
        part.save_pretrained(folder / name)
    models = root / "ComfyUI" / "models"
    (models / "diffusion_models").mkdir(parents=True)
    shutil.copy(
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
        models / "diffusion_models" / PRESETS[MODES[mode].preset].weights_file,
    )
    write(models / "vae" / vae_file, vae_in_original_names(vae))
    write(models / "text_encoders" / "qwen_2.5_vl_7b.safetensors", qwen_as_published(encoder))
    write(models / "text_encoders" / "clip_l.safetensors", clip_as_published(small))
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(DEMO_FOLDER / name, root / "tokenizers" / name)
    return mode, folder, models, root / "tokenizers"


def whole(places: Any) -> GenerationRequest:
    """Of the model in its own folder."""
    return GenerationRequest(**quick(places[0], places[1]))


def asked(places: Any, **changes: Any) -> GenerationRequest:
    """The same of files that are found."""
    return GenerationRequest(**quick(places[0], places[1], model_dir=None, **changes))


def pictured(places: Any, request: GenerationRequest, out: Path, *models_dirs: Path) -> np.ndarray:
    """The frames that come of a request."""
    if PRESETS[request.preset].is_video:
        run = ran(out, request, pipeline=Pipeline(models_dirs=models_dirs))
        return np.concatenate([run.frames.ravel(), run.latents.numpy().view(np.uint8).ravel()])
    out.mkdir()
    Pipeline(models_dirs=models_dirs).run(request, out=out / "out.png")
    return np.asarray(Image.open(out / "out.png").convert("RGB"))


def test_the_result_is_that_of_the_models_own_folder(places, tmp_path) -> None:
    _, _, models, tokenizers = places
    expected = pictured(places, whole(places), tmp_path / "whole")
    assert expected.std() > 1
    found = pictured(places, asked(places), tmp_path / "found", models, tokenizers)
    assert np.array_equal(found, expected)


def test_the_folder_may_be_named_and_the_tokenizers_found(places, tmp_path) -> None:
    _, _, models, tokenizers = places
    files = locate_model(asked(places), [models, tokenizers])
    named = dataclasses.replace(asked(places), model_dir=str(models))
    assert locate_model(named, [tokenizers]) == files
    assert files.vae.parent == models / "vae" and files.tokenizer == tokenizers / "tokenizer"
    told = describe_files(NamedFiles(named.preset, model_dir=str(models)), [tokenizers])
    assert told["model_dir"]["name"] == "models" and told["model_dir"]["weights"] == "fp32"


@pytest.mark.parametrize("places", ["t2v"], indirect=True)
def test_an_encoder_in_scaled_fp8_runs_and_is_told_of(places, tmp_path) -> None:
    _, _, models, tokenizers = places
    other = tmp_path / "models"
    shutil.copytree(models, other)
    stored = other / "text_encoders" / "qwen_2.5_vl_7b.safetensors"
    write(stored, in_scaled_fp8(load_file(stored), "scale_weight"))
    pipeline = Pipeline(models_dirs=[other, tokenizers])
    exact = ran(
        tmp_path / "exact", asked(places), pipeline=Pipeline(models_dirs=[models, tokenizers])
    )
    scaled = ran(tmp_path / "scaled", asked(places), pipeline=pipeline)
    assert any("fp8: prompts are read less exactly" in text for text in scaled.notices)
    assert not any("fp8" in text for text in exact.notices)
    difference = (scaled.latents - exact.latents).norm() / exact.latents.norm()
    assert 0 < difference < 0.2


@pytest.mark.parametrize("places", ["t2v"], indirect=True)
def test_a_run_stopped_and_gone_on_with_is_the_same(places, tmp_path) -> None:
    _, _, models, tokenizers = places
    pipeline = Pipeline(models_dirs=[models, tokenizers])
    straight = ran(tmp_path / "straight", asked(places), pipeline=pipeline)
    states = keeper(tmp_path / "states")
    stopped = ran(
        tmp_path / "again",
        asked(places),
        pipeline=pipeline,
        stop_before=2,
        states=states,
        catch=Stopped,
    )
    assert isinstance(stopped.error, Stopped)
    state = next((tmp_path / "states").rglob("*.safetensors"))
    resumed = ran(
        tmp_path / "again", pipeline=Pipeline(models_dirs=[models, tokenizers]), resume=state
    )
    assert torch.equal(resumed.latents, straight.latents)
    assert resumed.is_like(straight)

"""All four modes against diffusers' four pipelines, on tiny random components that it saved itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_oracle import compute_in_float32, pipeline_of
from PIL import Image
from tiny_checkpoints import MODES, quick, write_model
from tiny_image_model import picture

from kandinsky5.model.dit import DiTConfig
from kandinsky5.model.loading import load_transformer
from kandinsky5.model.text import Conditioning
from kandinsky5.output.state import load_latents
from kandinsky5.pipeline.denoise import Guidance, denoise, draw_noise, schedule
from kandinsky5.pipeline.model_inputs import config_for, inputs_for
from kandinsky5.pipeline.painting import Painted
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, frames_of

CPU = torch.device("cpu")
STEPS, SHIFT, SCALE = 4, 5.0, 3.5
WIDTH, HEIGHT, SECONDS = 96, 64, 10 / 6
LATENT_FRAMES = 11
"""Enough for the first four to be compared with five others."""
PROMPTS = ("a red circle on a dark background", "blurry")


@pytest.fixture(autouse=True)
def oracle_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_in_float32(monkeypatch)


@pytest.fixture(scope="module", params=MODES)
def saved(request, tmp_path_factory) -> tuple[str, Path]:
    """A mode, and a folder with its components as ``save_pretrained`` writes them."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return request.param, write_model(folder, request.param, "diffusers")


def latent_shape(mode: str) -> tuple[int, int, int, int]:
    frames = LATENT_FRAMES if PRESETS[MODES[mode].preset].is_video else 1
    return (frames, HEIGHT // 8, WIDTH // 8, 16)


def given(mode: str) -> dict[str, Any]:
    """The picture of a mode that takes one, in the size of the result."""
    return {"image": picture(WIDTH, HEIGHT)} if PRESETS[MODES[mode].preset].takes_image else {}


def run_oracle(mode: str, folder: Path, **arguments: Any) -> torch.Tensor:
    """Final latents [T, H, W, 16]."""
    if PRESETS[MODES[mode].preset].is_video:
        arguments["num_frames"] = frames_of(SECONDS)
    with torch.no_grad():
        latents = pipeline_of(mode, folder, (WIDTH, HEIGHT), SHIFT)(
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            output_type="latent",
            return_dict=False,
            **given(mode),
            **arguments,
        )[0][0]
    return latents[..., :16].reshape(latent_shape(mode))


def conditioning(config: DiTConfig, seed: int, tokens: int) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(
        torch.randn(tokens, config.in_text_dim, generator=generator),
        torch.randn(config.in_text_dim2, generator=generator),
    )


def embeddings(name: str, c: Conditioning) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([0, len(c.text)], dtype=torch.int32)
    return {
        f"{name}_embeds_qwen": c.text[None],
        f"{name}_embeds_clip": c.pooled[None],
        f"{name}_cu_seqlens": lengths,
    }


def worst(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, of latents above 1 relative to the largest."""
    assert ours.shape == expected.shape and expected.isfinite().all() and expected.std() > 0.1
    return ((ours - expected).abs().max() / max(1.0, expected.abs().max().item())).item()


def test_given_noise_and_embeddings_the_latents_are_equal_after_four_steps(saved) -> None:
    mode, folder = saved
    preset = PRESETS[MODES[mode].preset]
    transformer = load_transformer(folder / "transformer", device=CPU)
    config = config_for(transformer.config, preset)
    generator = torch.Generator().manual_seed(1)
    noise = draw_noise(latent_shape(mode), generator)
    latent = draw_noise((1, *noise.shape[1:]), generator) * 0.7 if preset.takes_image else None
    inputs = inputs_for(config, latent)
    positive, negative = conditioning(config, 2, 9), conditioning(config, 3, 4)
    expected = run_oracle(
        mode,
        folder,
        latents=inputs.of(inputs.begun(noise))[None],
        **embeddings("prompt", positive),
        **embeddings("negative_prompt", negative),
    )
    ours = denoise(
        transformer,
        noise,
        Guidance(positive, negative, SCALE),
        schedule(STEPS, SHIFT),
        rope_scale=preset.rope_scale,
        inputs=inputs,
    )
    assert worst(ours, expected) <= 1e-4


def test_from_the_prompt_the_latents_are_equal(saved, tmp_path, monkeypatch) -> None:
    """And the picture; a video's frames are compared with diffusers' VAE in tests/model/test_vae.py."""
    mode, folder = saved
    halve_bilinearly(monkeypatch)
    expected = run_oracle(
        mode,
        folder,
        prompt=PROMPTS[0],
        negative_prompt=PROMPTS[1],
        generator=torch.Generator().manual_seed(11),
    )
    preset = PRESETS[MODES[mode].preset]
    changes = {name: str(tmp_path / "in.png") for name in given(mode)}
    for name, path in changes.items():
        given(mode)[name].save(path)
    request = quick(
        mode,
        folder,
        prompt=PROMPTS[0],
        negative_prompt=PROMPTS[1],
        seed=11,
        steps=STEPS,
        shift=SHIFT,
        guidance=SCALE,
        save_latents=str(tmp_path / "latents.safetensors"),
        **changes,
    )
    if preset.is_video:
        request["seconds"] = SECONDS
        monkeypatch.setattr(Pipeline, "_paint", lambda *_: Painted(41, WIDTH, HEIGHT))
    out = tmp_path / ("out.mp4" if preset.is_video else "out.png")
    Pipeline().run(GenerationRequest(**request), out=out)
    ours, _ = load_latents(tmp_path / "latents.safetensors")
    assert worst(ours, expected) <= 1e-3
    if not preset.is_video:
        painted = np.asarray(Image.open(out)).astype(int)
        assert np.abs(painted - painted_by_oracle(mode, folder, expected)).max() <= 1


def painted_by_oracle(mode: str, folder: Path, latents: torch.Tensor) -> np.ndarray:
    """Levels 0 … 255 [H, W, 3] that diffusers' VAE makes of a picture's latents."""
    vae = pipeline_of(mode, folder, (WIDTH, HEIGHT), SHIFT).vae
    with torch.no_grad():
        z = latents.permute(0, 3, 1, 2) / vae.config.scaling_factor
        pixels = vae.decode(z).sample[0].permute(1, 2, 0)
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().numpy().astype(int)


def halve_bilinearly(monkeypatch: pytest.MonkeyPatch) -> None:
    """kandinskylab halves the picture for Qwen bilinearly, diffusers as Pillow does by default."""
    pillow = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, resample=None, *a, **k: pillow(
            self, size, Image.Resampling.BILINEAR if resample is None else resample, *a, **k
        ),
    )

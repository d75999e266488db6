"""Text to image and editing through the pipeline: from a folder of files to a PNG that can be made again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_image_model import I2I, T2I, VAE, diffusers_layout, official_layout, picture, vae

from kandinsky5.errors import CheckpointError, Stopped, UserError
from kandinsky5.events import StepDone
from kandinsky5.model.image_vae import ImageVAEConfig
from kandinsky5.model.loading import check_vae
from kandinsky5.output.autosave import StateKeeper
from kandinsky5.output.metadata import read_metadata, request_of, video_info
from kandinsky5.picture_sizes import nearest_size
from kandinsky5.pipeline.codec import decoded, encode_image
from kandinsky5.pipeline.image import as_seen
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.pipeline.preview import FLUX_COLOURS, colours_of, write_colours
from kandinsky5.pipeline.preview_pace import PreviewEvery
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest
from vae_tiling import plan_tiles

CPU = torch.device("cpu")
WIDTH, HEIGHT = 96, 64


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders: ``image-t2i`` in diffusers' layout, ``image-i2i`` in the official one."""
    folder = tmp_path_factory.mktemp("models")
    diffusers_layout(folder / "image-t2i", T2I)
    official_layout(folder / "image-i2i", I2I, "image-i2i")
    picture(150, 100).save(folder / "in.png")
    return folder


def asked(models: Path, preset: str, **changes) -> GenerationRequest:
    values = {
        "preset": preset,
        "prompt": "a red circle",
        "image": str(models / "in.png") if preset == "image-i2i" else None,
        "seed": 3,
        "width": WIDTH,
        "height": HEIGHT,
        "steps": 3,
        "model_dir": str(models / preset),
        "expand": False,
        "device": "cpu",
        "dtype": "fp32",
    }
    return GenerationRequest(**{**values, **changes})


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("preset", ["image-t2i", "image-i2i"])
def test_a_request_becomes_a_png_that_says_how_to_make_it_again(models, tmp_path, preset) -> None:
    request = asked(models, preset)
    result = Pipeline().run(request, out=tmp_path / "a.png")
    assert (result.frames, result.width, result.height) == (1, WIDTH, HEIGHT)
    assert (result.steps_run, result.evaluations_run) == (3, 6)
    assert video_info(tmp_path / "a.png")["frames"] == 1
    found = request_of(read_metadata(tmp_path / "a.png"))
    assert (found.prompt, found.seed, found.preset) == ("a red circle", 3, preset)
    assert "a red circle" in Image.open(tmp_path / "a.png").info["parameters"]
    Pipeline().run(request, out=tmp_path / "b.png")
    assert np.array_equal(pixels_of(tmp_path / "a.png"), pixels_of(tmp_path / "b.png"))


def test_the_edited_picture_decides_the_result(models, tmp_path) -> None:
    pipeline, other = Pipeline(), tmp_path / "other.png"
    Image.fromarray(255 - pixels_of(models / "in.png")).save(other)
    for name, image in (("a", models / "in.png"), ("b", other)):
        request = asked(models, "image-i2i", image=str(image))
        pipeline.run(request, out=tmp_path / f"{name}.png")
    assert not np.array_equal(pixels_of(tmp_path / "a.png"), pixels_of(tmp_path / "b.png"))


def test_a_resumed_edit_is_the_one_that_never_stopped(models, tmp_path) -> None:
    pipeline, request = Pipeline(), asked(models, "image-i2i")
    pipeline.run(request, out=tmp_path / "whole.png")
    states, seen = StateKeeper(tmp_path / "states"), []
    states.ask_to_save_on_stop()
    with pytest.raises(Stopped):
        pipeline.run(
            request,
            out=tmp_path / "none.png",
            emit=lambda e: seen.append(e) if isinstance(e, StepDone) else None,
            should_stop=lambda: len(seen) == 2,
            states=states,
        )
    pipeline.resume(states.newest(), out=tmp_path / "resumed.png")
    assert not (tmp_path / "none.png").exists()
    assert np.array_equal(pixels_of(tmp_path / "whole.png"), pixels_of(tmp_path / "resumed.png"))


def test_saved_latents_decode_to_the_same_picture(models, tmp_path) -> None:
    pipeline, latents = Pipeline(), tmp_path / "latents.safetensors"
    pipeline.run(asked(models, "image-t2i", save_latents=str(latents)), out=tmp_path / "a.png")
    pipeline.decode(latents, out=tmp_path / "b.png")
    assert np.array_equal(pixels_of(tmp_path / "a.png"), pixels_of(tmp_path / "b.png"))


def test_a_text_to_image_file_cannot_edit_and_says_what_can(models, tmp_path) -> None:
    file = next((models / "image-t2i" / "transformer").glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="takes no picture"):
        Pipeline().run(asked(models, "image-i2i", dit=str(file)), out=tmp_path / "a.png")


def test_an_editing_file_makes_pictures_from_text_with_nothing_beside(models, tmp_path) -> None:
    request = asked(models, "image-t2i", model_dir=str(models / "image-i2i"), dit=None)
    file = models / "image-i2i" / "model" / PRESETS["image-i2i"].weights_file
    result = Pipeline().run(
        GenerationRequest(**{**vars(request), "dit": str(file)}), out=tmp_path / "a.png"
    )
    assert any("i2i" in notice for notice in result.notices)


@pytest.mark.parametrize("name", ["a.mp4", "a.jpg", "a"])
def test_a_picture_is_written_as_png_only(models, tmp_path, name) -> None:
    with pytest.raises(UserError, match=r"\.png"):
        Pipeline().run(asked(models, "image-t2i"), out=tmp_path / name)


def test_previews_are_made_of_a_picture_too(models, tmp_path) -> None:
    write_colours(models / "image-t2i" / "vae" / "preview.json", FLUX_COLOURS)
    events = []
    Pipeline().run(
        asked(models, "image-t2i"),
        out=tmp_path / "a.png",
        emit=events.append,
        previews=PreviewEvery(),
    )
    assert [e for e in events if type(e).__name__ == "PreviewReady"]


def test_the_flux_vae_has_colours_of_its_own_and_another_has_none(tmp_path) -> None:
    assert colours_of(tmp_path, ImageVAEConfig()) is FLUX_COLOURS
    assert colours_of(tmp_path, VAE) is None


def test_a_vae_of_the_other_kind_is_named(models) -> None:
    with pytest.raises(CheckpointError, match="'AutoencoderKL'; video needs"):
        check_vae(models / "image-t2i" / "vae", "hunyuan")
    assert check_vae(models / "image-t2i" / "vae", "flux") == VAE


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((500, 500), (1024, 1024)),
        ((1600, 900), (1280, 768)),
        ((900, 1600), (768, 1280)),
        ((3000, 1000), (1408, 640)),
        ((100, 900), (640, 1408)),
        ((1000, 800), (1152, 896)),
    ],
)
def test_the_trained_size_nearest_to_the_picture_is_taken(given, expected) -> None:
    assert nearest_size(*given, PRESETS["image-i2i"]) == expected


def test_the_text_encoder_sees_the_cropped_picture_halved() -> None:
    seen = as_seen(picture(400, 100), 200, 100)
    assert seen.shape == (50, 100, 3)
    whole = np.asarray(picture(400, 100).crop((100, 0, 300, 100)))
    assert np.abs(seen.mean(axis=(0, 1)) - whole.mean(axis=(0, 1))).max() < 1


def test_large_pictures_are_decoded_in_tiles_each_as_it_is_alone() -> None:
    model = vae()
    latents = torch.randn(1, 24, 32, 16, generator=torch.Generator().manual_seed(0))
    plan = plan_tiles(1, 192, 256, tile_height=128, tile_width=128, overlap=64)
    (frames,) = decoded(model, latents, plan, device=CPU)
    assert plan.tiles > 1 and frames.shape == (1, 192, 256, 3)
    corner = plan_tiles(1, 128, 128)
    (alone,) = decoded(model, latents[:, :16, :16], corner, device=CPU)
    assert np.array_equal(frames[0, :64, :64], alone[0, :64, :64])


def test_the_posterior_is_sampled_and_scaled_without_a_shift() -> None:
    model, pixels = vae(), torch.rand(1, 3, 1, 64, 96) * 2 - 1
    generator = torch.Generator().manual_seed(4)
    latent = encode_image(model, pixels, generator, CPU, plan_tiles(1, 64, 96))
    mean, logvar = model.encode(pixels[:, :, 0])
    drawn = torch.randn(1, 16, 1, 8, 12, generator=torch.Generator().manual_seed(4))[:, :, 0]
    expected = (mean + torch.exp(0.5 * logvar) * drawn) * 0.3611
    torch.testing.assert_close(latent, expected[0].permute(1, 2, 0)[None])

"""Input pictures: read whatever comes, refuse what cannot be, bring it to size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky5.errors import UserError
from kandinsky5.picture_sizes import fitted_size
from kandinsky5.pipeline.image import read_image, to_pixels
from kandinsky5.presets import PRESETS


def saved(tmp_path, picture, name="picture.png", **options):
    path = tmp_path / name
    picture.save(path, **options)
    return str(path)


def test_orientation_in_the_file_is_obeyed(tmp_path) -> None:
    picture = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(saved(tmp_path, picture, "turned.jpg", exif=exif)).size == (20, 40)


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGBA", "P", "I;16", "1"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode) -> None:
    name = "picture.tif" if mode == "CMYK" else "picture.png"
    assert read_image(saved(tmp_path, Image.new(mode, (8, 8)), name)).mode == "RGB"


def test_an_animation_gives_its_first_frame(tmp_path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = saved(
        tmp_path, frames[0], "moving.webp", save_all=True, append_images=frames[1:], lossless=True
    )
    assert read_image(path).getpixel((4, 4)) == (255, 0, 0)


def test_missing_folder_text_and_damaged_files_are_refused_in_one_line(tmp_path) -> None:
    text = tmp_path / "note.png"
    text.write_text("not a picture")
    whole = tmp_path / "whole.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:4000])
    for path in (tmp_path / "none.png", tmp_path, text, cut, tmp_path / ("a" * 5000)):
        with pytest.raises(UserError) as caught:
            read_image(str(path))
        assert caught.value.field == "image"
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_144_megapixels_are_refused(tmp_path) -> None:
    path = saved(tmp_path, Image.new("1", (12_000, 12_000)))
    with pytest.raises(UserError, match="100 megapixels"):
        read_image(path)


@pytest.mark.parametrize(
    ("preset", "given", "expected"),
    [
        ("lite-i2v-5s", (1536, 1024), (768, 512)),
        ("lite-i2v-5s", (1920, 1080), (832, 464)),
        ("pro-i2v-5s-hd", (1920, 1080), (1408, 768)),
        ("pro-i2v-5s-hd", (500, 500), (1024, 1024)),
        ("demo-i2v", (300, 200), (64, 64)),
    ],
)
def test_pictures_keep_their_aspect_in_the_presets_area_and_multiples(
    preset, given, expected
) -> None:
    assert fitted_size(*given, PRESETS[preset]) == expected


def test_a_sliver_is_refused() -> None:
    with pytest.raises(UserError, match="long and narrow"):
        fitted_size(10_000, 10, PRESETS["lite-i2v-5s"])


def test_pixels_cover_the_target_and_span_minus_one_to_one(tmp_path) -> None:
    picture = Image.new("RGB", (100, 40), "black")
    picture.paste("white", (40, 0, 60, 40))
    pixels = to_pixels(picture, 64, 64)
    assert pixels.shape == (1, 3, 1, 64, 64)
    assert pixels.dtype == torch.float32
    assert pixels.min() == -1.0
    assert pixels[0, :, 0, 32, 32].eq(1.0).all()
    assert pixels[0, :, 0, 32, 2].eq(-1.0).all()


def test_a_size_is_never_beyond_the_rotary_tables() -> None:
    wide = dataclasses.replace(PRESETS["lite-i2v-5s"], area_px=2048 * 2048)
    with pytest.raises(UserError):
        fitted_size(4000, 1000, wide)

"""The crop on the page is the picture as the pipeline will cut it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from kandinsky5.errors import UserError
from kandinsky5.pipeline.image import read_image, to_pixels
from kandinsky5.ui import crops
from kandinsky5.ui.crops import crop_view, shown_crop
from kandinsky5.ui.pictures import ORIENTATION


def picture(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards; blue is a smooth wave."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    red, green = 255 * x / width, 255 * y / height
    blue = 127 + 120 * np.sin(12 * x / width) * np.cos(9 * y / height)
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ((1600, 900), (64, 64)),
        ((900, 1600), (768, 512)),
        ((2000, 750), (640, 1408)),
        ((40, 30), (512, 512)),
        ((512, 512), (512, 512)),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_the_crop_is_the_pipelines(tmp_path, given, size, suffix):
    path = str(tmp_path / f"given.{suffix}")
    picture(*given).save(path, quality=95)
    pixels = (to_pixels(read_image(path), *size)[0, :, 0].permute(1, 2, 0).numpy() + 1) * 127.5
    shown = shown_crop(path, size)
    assert shown.width / shown.height == pytest.approx(size[0] / size[1], rel=0.02)
    used = Image.fromarray(pixels.round().astype(np.uint8)).resize(shown.size, 2)
    difference = np.abs(np.asarray(shown, np.float32) - np.asarray(used, np.float32))
    assert difference.mean() < 2.5, "the crop is shifted, or another part"


def test_what_is_cut_off_is_said(tmp_path):
    path = str(tmp_path / "wide.png")
    picture(1600, 900).save(path)
    said = crop_view(path, (512, 512))
    assert "512 × 512 of 1600 × 900, 44 % cut off left and right" in said
    assert "above and below" in crop_view(path, (1408, 640))
    assert "nothing of note cut off" in crop_view(path, (1600, 896))
    assert "enlarged 2.3 times; 2 more in the same way" in crop_view(path, (2048, 2048), others=2)


def test_a_picture_on_its_side_is_shown_upright(tmp_path):
    path, exif = str(tmp_path / "turned.jpg"), Image.Exif()
    exif[ORIENTATION] = 6
    picture(80, 40).save(path, exif=exif)
    assert "of 40 × 80" in crop_view(path, (64, 64))
    shown = np.asarray(shown_crop(path, (64, 128)), np.float32)
    assert shown[-10:, :, 0].mean() > shown[:10, :, 0].mean() + 100


def test_a_picture_is_decoded_once_until_it_changes(tmp_path, monkeypatch):
    path, decoded = str(tmp_path / "given.png"), []
    picture(200, 100).save(path)
    opened = crops.opened_picture
    monkeypatch.setattr(crops, "opened_picture", lambda name: decoded.append(name) or opened(name))
    views = {crop_view(path, (64, side)) for side in (64, 128, 64, 192)}
    assert (len(views), len(decoded)) == (3, 1)
    picture(210, 100).save(path)
    crop_view(path, (64, 64))
    assert len(decoded) == 2


def test_a_broken_picture_is_refused(tmp_path):
    path = tmp_path / "cut.png"
    picture(200, 100).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="not a readable image"):
        crop_view(str(path), (64, 64))

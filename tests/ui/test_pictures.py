"""Pictures given to the page: what cannot be used is refused before it costs anything."""

from __future__ import annotations

import struct
import zlib

import pytest
from PIL import Image

from kandinsky5.errors import UserError
from kandinsky5.pipeline.image import read_image
from kandinsky5.request import GenerationRequest
from kandinsky5.ui import form, pictures
from kandinsky5.ui.pictures import check_picture


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and has no picture in it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize("side", [12_000, 30_000])
def test_144_megapixels_are_refused_by_their_header(tmp_path, monkeypatch, side):
    monkeypatch.setattr(
        "PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("the picture was decoded")
    )
    (tmp_path / "large.png").write_bytes(png_header(side, side))
    with pytest.raises(UserError, match="at most 100 megapixels") as caught:
        check_picture(str(tmp_path / "large.png"))
    assert caught.value.field == "image"


def test_a_header_within_the_limit_is_not_taken_for_the_picture(tmp_path):
    (tmp_path / "hollow.png").write_bytes(png_header(64, 64))
    with pytest.raises(UserError, match="not a readable image"):
        check_picture(str(tmp_path / "hollow.png"))


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n broken"])
def test_a_corrupt_image_is_refused_with_one_line(tmp_path, content):
    broken = tmp_path / "broken.png"
    broken.write_bytes(content)
    with pytest.raises(UserError, match="not a readable image") as caught:
        values = form.values_of(GenerationRequest(preset="demo-i2v", prompt="it moves"))
        form.request_from({**values, "image": str(broken)})
    assert caught.value.field == "image"


def test_a_picture_that_lies_on_its_side_is_measured_and_used_upright(tmp_path):
    path, exif = tmp_path / "turned.jpg", Image.Exif()
    exif[pictures.ORIENTATION] = 6
    Image.new("RGB", (80, 40), "red").save(path, exif=exif)
    assert check_picture(str(path)) == (40, 80)
    assert read_image(str(path)).size == (40, 80)


def test_cmyk_is_taken_and_converted(tmp_path):
    path = tmp_path / "print.jpg"
    Image.new("CMYK", (40, 30), (0, 255, 255, 0)).save(path)
    assert check_picture(str(path)) == (40, 30)
    used = read_image(str(path))
    assert used.mode == "RGB"
    assert used.getpixel((5, 5))[0] > 200


def test_of_an_animation_the_first_frame_counts(tmp_path):
    path = tmp_path / "moving.webp"
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert check_picture(str(path)) == (32, 32)
    assert read_image(str(path)).getpixel((3, 3)) == (255, 0, 0)

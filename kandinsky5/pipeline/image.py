"""The input picture: read, turned upright, brought to the model's size."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from kandinsky5.errors import UserError
from kandinsky5.picture_sizes import MAX_PIXELS, Cover


def read_image(path: str) -> Image.Image:
    """The picture at ``path``: upright, RGB, the first frame of an animation.

    Raises:
        UserError: no such file, not a picture, damaged, or more than 100 megapixels.
    """
    file = Path(path).expanduser()
    if not os.path.isfile(
        file
    ):  # unlike Path's it only answers, to a name that is too long as well
        raise UserError("image", path, "the path of an existing picture (PNG, JPEG, WebP)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    size = f"{picture.width}x{picture.height}"
                    raise UserError("image", size, f"at most {MAX_PIXELS // 10**6} megapixels")
                return ImageOps.exif_transpose(picture).convert("RGB")
    except UserError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError("image", path, f"not a readable picture ({error})") from error
    except Image.DecompressionBombError as error:
        raise UserError("image", path, f"at most {MAX_PIXELS // 10**6} megapixels") from error


def to_pixels(picture: Image.Image, width: int, height: int) -> torch.Tensor:
    """Scaled to cover width × height, cropped at the centre: float32 [1, 3, 1, H, W] in [−1, 1]."""
    cropped = _covering(picture, width, height)
    pixels = torch.from_numpy(np.asarray(cropped, dtype=np.float32) / 127.5 - 1.0)
    return pixels.permute(2, 0, 1)[None, :, None]


def as_seen(picture: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """What the text encoder sees: as :func:`to_pixels`, each side halved. uint8 [H/2, W/2, 3]."""
    cropped = _covering(picture, width, height)
    return np.array(cropped.resize((width // 2, height // 2), Image.Resampling.BILINEAR))


def _covering(picture: Image.Image, width: int, height: int) -> Image.Image:
    cover = Cover.of(picture.size, (width, height))
    size = cover.scaled_px
    scaled = picture.resize(size, Image.Resampling.BILINEAR) if size != picture.size else picture
    left, top = cover.offset_px
    return scaled.crop((left, top, left + width, top + height))

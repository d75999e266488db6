"""The input picture: read, turned upright, brought to the model's size."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from kandinsky5.errors import UserError
from kandinsky5.presets import MAX_SIDE_PX, Preset

MAX_PIXELS = 100_000_000


def read_image(path: str) -> Image.Image:
    """The picture at ``path``: upright, RGB, the first frame of an animation.

    Raises:
        UserError: no such file, not a picture, damaged, or more than 100 megapixels.
    """
    file = Path(path).expanduser()
    if not file.is_file():
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


def nearest_size(width: int, height: int, preset: Preset) -> tuple[int, int]:
    """Of the sizes a preset was trained with the one whose height / width is nearest to a picture's."""
    wanted = height / width
    return min(preset.sizes_px, key=lambda size: abs(size[1] / size[0] - wanted))


def fitted_size(width: int, height: int, preset: Preset) -> tuple[int, int]:
    """(width, height) for a picture of any size: aspect kept, the preset's area, sides in its multiples.

    Raises:
        UserError: so long and narrow that a side would pass 2048 px or vanish.
    """
    multiple = preset.multiple_px
    scale = math.sqrt(preset.area_px / (width * height)) / multiple
    fitted = (round(width * scale) * multiple, round(height * scale) * multiple)
    if min(fitted) < multiple or max(fitted) > MAX_SIDE_PX:
        raise UserError("image", f"{width}x{height}", "a picture less long and narrow")
    return fitted


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
    scale = max(width / picture.width, height / picture.height)
    size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    scaled = picture.resize(size, Image.Resampling.BILINEAR) if size != picture.size else picture
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return scaled.crop((left, top, left + width, top + height))

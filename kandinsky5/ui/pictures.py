"""Pictures that are given to the page: looked at before anything decodes them."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from kandinsky5.errors import UserError
from kandinsky5.picture_sizes import MAX_PIXELS

ORIENTATION = 0x0112
"""EXIF tag; from 5 on the picture lies on its side."""
NOT_READABLE = "not a readable image; use PNG, JPEG or WebP"
TOO_LARGE = f"at most {MAX_PIXELS // 10**6} megapixels"


def check_picture(path: str) -> tuple[int, int]:
    """Refuse a file that is not a picture, or one too large, the latter before it is decoded.

    Returns:
        (width, height), upright.

    Raises:
        UserError: for the field ``image``.
    """
    size = picture_size(path)
    try:
        with opened_picture(path) as picture:
            picture.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError("image", Path(path).name, NOT_READABLE) from error
    return size


def picture_size(path: str) -> tuple[int, int]:
    """(width, height) of a picture, upright, as its header tells.

    Raises:
        UserError: for the field ``image``.
    """
    try:
        with opened_picture(path) as picture:
            width, height = picture.size
            if width * height <= MAX_PIXELS:
                turned = picture.getexif().get(ORIENTATION, 1) >= 5
                return (height, width) if turned else (width, height)
    except Image.DecompressionBombError as error:
        raise UserError("image", Path(path).name, TOO_LARGE) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, TypeError) as error:
        raise UserError("image", Path(path).name, NOT_READABLE) from error
    raise UserError("image", f"{width} × {height}", TOO_LARGE)


def opened_picture(path: str) -> Image.Image:
    """The picture, its header read and nothing decoded; its own library's errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)

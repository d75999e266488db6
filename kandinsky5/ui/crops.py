"""The input picture as the model will see it: scaled to cover the result's size, cropped at its centre."""

from __future__ import annotations

import base64
import functools
import io
import os

from PIL import Image, ImageOps

from kandinsky5.errors import UserError
from kandinsky5.picture_sizes import Cover
from kandinsky5.ui.pictures import NOT_READABLE, opened_picture, picture_size
from kandinsky5.ui.views import safe

KEPT_PX = 1024
"""Longer side of the copy that crops are shown from; the picture itself is decoded once."""
SHOWN_PX = 480
"""Longer side of a crop as the page shows it."""
TOLD_SHARE = 0.005
"""What is cut off below this share of a side is not worth a word."""
ENLARGED = 1.05


def crop_view(path: str, size_px: tuple[int, int], others: int = 0) -> str:
    """The crop and what of the picture it leaves out, as a fragment of the page.

    Args:
        path: of a picture that can be read.
        size_px: (width, height) of the result.
        others: pictures that are cropped likewise and not shown.

    Raises:
        UserError: the picture cannot be used.
    """
    given = picture_size(path)
    cover = Cover.of(given, size_px)
    address = _address(path, _stamp(path), cover, size_px)
    told = f"{size_px[0]} × {size_px[1]} of {given[0]} × {given[1]}{_cut_words(cover, size_px)}"
    if cover.scaled_px[0] > ENLARGED * given[0]:
        told += f"; enlarged {cover.scaled_px[0] / given[0]:.1f} times"
    if others:
        told += f"; {others} more in the same way"
    return (
        f'<figure class="k1-crop"><img src="{address}" alt="The picture as the model sees it">'
        f"<figcaption><b>As the model sees it</b><span>{safe(told)}</span></figcaption></figure>"
    )


def shown_crop(path: str, size_px: tuple[int, int]) -> Image.Image:
    """The crop, its longer side at most :data:`SHOWN_PX`.

    Raises:
        UserError: the picture cannot be used.
    """
    return _cropped(_kept(path, _stamp(path)), Cover.of(picture_size(path), size_px), size_px)


def _cropped(kept: Image.Image, cover: Cover, size_px: tuple[int, int]) -> Image.Image:
    """The part of the copy that the crop is."""
    across = kept.width / cover.scaled_px[0], kept.height / cover.scaled_px[1]
    left, top = (offset * share for offset, share in zip(cover.offset_px, across, strict=True))
    right, bottom = left + size_px[0] * across[0], top + size_px[1] * across[1]
    share = min(1.0, SHOWN_PX / max(size_px))
    shown = max(1, round(size_px[0] * share)), max(1, round(size_px[1] * share))
    box = (left, top, min(right, kept.width), min(bottom, kept.height))
    return kept.resize(shown, Image.Resampling.BILINEAR, box=box)


@functools.lru_cache(maxsize=16)
def _address(path: str, stamp: tuple[int, int], cover: Cover, size_px: tuple[int, int]) -> str:
    """The crop as a data address; 30 kB or so."""
    packed = io.BytesIO()
    _cropped(_kept(path, stamp), cover, size_px).save(packed, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode('ascii')}"


@functools.lru_cache(maxsize=4)
def _kept(path: str, stamp: tuple[int, int]) -> Image.Image:
    """A small copy, upright, RGB, of the file as it was at that stamp."""
    try:
        with opened_picture(path) as picture:
            picture.draft("RGB", (KEPT_PX, KEPT_PX))  # a large JPEG is decoded at a fraction of it
            upright = ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError("image", os.path.basename(path), NOT_READABLE) from error
    upright.thumbnail((KEPT_PX, KEPT_PX), Image.Resampling.BILINEAR)
    return upright


def _stamp(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_mtime_ns, found.st_size


def _cut_words(cover: Cover, size_px: tuple[int, int]) -> str:
    """What is cut off, such as “, 12 % cut off left and right”."""
    for side, words in enumerate(("left and right", "above and below")):
        share = 1 - size_px[side] / cover.scaled_px[side]
        if share >= TOLD_SHARE:
            return f", {100 * share:.0f} % cut off {words}"
    return ", nothing of note cut off"

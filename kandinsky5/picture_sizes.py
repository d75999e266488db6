"""The size of a result that begins with a picture. Arithmetic only."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from kandinsky5.errors import UserError
from kandinsky5.presets import MAX_SIDE_PX, PRESETS, Preset
from kandinsky5.request import GenerationRequest, multiple_px_of

MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded."""


def size_for_picture(width: int, height: int, request: GenerationRequest) -> tuple[int, int]:
    """(width, height) that a given picture asks for where the request names no size.

    Args:
        width, height: of the picture, upright.
        request: its preset and its attention decide.

    Raises:
        UserError: so long and narrow that a side would pass 2048 px or vanish.
    """
    preset = PRESETS[request.preset]
    if not preset.is_video:
        return nearest_size(width, height, preset)
    multiple = multiple_px_of(request)
    area = max(preset.area_px, multiple**2)
    return fitted_size(
        width, height, dataclasses.replace(preset, multiple_px=multiple, area_px=area)
    )


@dataclass(frozen=True)
class Cover:
    """How a picture comes to cover a size: scaled to ``scaled_px``, then cropped at its centre.

    Attributes:
        scaled_px: (width, height) of the whole picture, neither side shorter than the size.
        offset_px: (left, top) of the crop in it.
    """

    scaled_px: tuple[int, int]
    offset_px: tuple[int, int]

    @classmethod
    def of(cls, picture_px: tuple[int, int], size_px: tuple[int, int]) -> Cover:
        """The least that covers a size, all sizes as (width, height)."""
        scale = max(size / side for size, side in zip(size_px, picture_px, strict=True))
        width, height = (
            max(size, round(side * scale)) for size, side in zip(size_px, picture_px, strict=True)
        )
        return cls((width, height), ((width - size_px[0]) // 2, (height - size_px[1]) // 2))


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

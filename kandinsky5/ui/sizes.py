"""Free sizes: scaled with their aspect kept, swapped, and what they are snapped to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kandinsky5.errors import UserError
from kandinsky5.picture_sizes import size_for_picture
from kandinsky5.presets import MAX_SIDE_PX, PRESETS, Preset
from kandinsky5.request import GenerationRequest, multiple_px_of, settle
from kandinsky5.ui.pictures import picture_size
from kandinsky5.ui.views import safe

LEAST_PERCENT, MOST_PERCENT = 25, 200
LEAST_SIDE_PX = 64
KEPT_SIZES = 200
SIZE_FIELDS = ("preset", "width", "height", "attention", "image", "images")
"""What the size of a result depends on."""
Size = tuple[int, int]


@dataclass(frozen=True)
class Scaled:
    """What the slider made, so that many moves of it do not wear the aspect away.

    Attributes:
        aspect_px: (width, height) that is scaled.
        made_px: sizes it was made to, the last one last; a move may still be told one before.
    """

    aspect_px: Size
    made_px: tuple[Size, ...]

    @property
    def size_px(self) -> Size:
        """(width, height) by now."""
        return self.made_px[-1]


@dataclass(frozen=True)
class Frame:
    """The part of the form that decides the size.

    Attributes:
        preset: chosen.
        attention: as chosen; NABLA asks for sides of its own.
        width, height: as typed; both None where the size follows from the picture.
        picture: path of the (first) input picture, where the preset takes one.
        others: how many more pictures there are.
    """

    preset: Preset
    attention: str
    width: Any
    height: Any
    picture: str | None = None
    others: int = 0

    @classmethod
    def of(
        cls, preset: str, width: Any, height: Any, attention: str, image: Any, images: Any
    ) -> Frame:
        """From the values of :data:`SIZE_FIELDS`.

        Raises:
            UserError: no such preset.
        """
        row = PRESETS.get(preset)
        if row is None:
            raise UserError("preset", preset, "one of the list")
        given = [path for path in (image, *(images or ())) if path] if row.takes_image else []
        picture = given[0] if given else None
        return cls(row, attention, width, height, picture, max(len(given) - 1, 0))

    def _request(self, **sizes: Any) -> GenerationRequest:
        image = self.picture or ("a picture" if self.preset.takes_image else None)
        return GenerationRequest(
            preset=self.preset.name,
            prompt="a size",
            attention=self.attention,
            image=image,
            **sizes,
        )

    @property
    def multiple_px(self) -> int:
        """Both sides are multiples of this."""
        return multiple_px_of(self._request())

    def settled(self) -> tuple[Size | None, tuple[str, ...]]:
        """(width, height) of the result and a notice for each side that is snapped.

        The size is None where it follows from a picture that is not here yet.

        Raises:
            UserError: a side out of its range, or a picture that cannot be used.
        """
        if not self.width and not self.height and self.preset.takes_image:
            if self.picture is None:
                return None, ()
            return size_for_picture(*picture_size(self.picture), self._request()), ()
        request, notices = settle(self._request(width=self.width, height=self.height))
        assert request.width and request.height
        return (request.width, request.height), notices

    def scaled(self, percent: float, kept: Scaled | None) -> Scaled:
        """The size with its aspect kept, its area so many per cent (squared) of the trained one.

        Args:
            percent: of a side of the trained area, :data:`LEAST_PERCENT` … :data:`MOST_PERCENT`.
            kept: what the slider made before; of no account once the size was set otherwise.
        """
        aspect = self._now()
        made: tuple[Size, ...] = ()
        if kept is not None and aspect in kept.made_px:
            aspect, made = kept.aspect_px, kept.made_px
        share = min(max(percent, LEAST_PERCENT), MOST_PERCENT) / 100
        factor = share * math.sqrt(self.preset.area_px / (aspect[0] * aspect[1]))
        # a side at its limit keeps the aspect too: the other one gives way
        factor = min(factor, MAX_SIDE_PX / max(aspect))
        width, height = (_snapped(side * factor, self.multiple_px) for side in aspect)
        earlier = tuple(size for size in made if size != (width, height))
        return Scaled(aspect, (*earlier[-KEPT_SIZES:], (width, height)))

    def swapped(self) -> Size:
        """Width and height the other way round."""
        width, height = self._now()
        return _snapped(height, self.multiple_px), _snapped(width, self.multiple_px)

    def _now(self) -> Size:
        """The size as it is, or the preset's where none can be told."""
        try:
            size, _ = self.settled()
        except UserError:
            size = None
        return size or self.preset.sizes_px[0]


def percent_of(preset: Preset, width: Any, height: Any) -> int:
    """Where the slider stands for a size as typed; at the trained area where it is none."""
    try:
        percent = round(100 * math.sqrt(width * height / preset.area_px))
    except (TypeError, ValueError, OverflowError):
        return 100
    return min(max(percent, LEAST_PERCENT), MOST_PERCENT)


def size_line(text: str) -> str:
    """What is said of a size, as a fragment of the page; nothing where nothing is."""
    said = safe(text[:1].upper() + text[1:])
    return f'<p class="k1-hint" role="status">{said}</p>' if text else ""


def _snapped(side: float, multiple: int) -> int:
    low, high = -(-LEAST_SIDE_PX // multiple), MAX_SIDE_PX // multiple
    return min(max(round(side / multiple), low), high) * multiple

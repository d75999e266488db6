"""The word for a colour that was seen: the nearest of the demo's tables, or none."""

from __future__ import annotations

import math

import numpy as np

from kandinsky5.demo.scenes import COLOURS

_MAX_DISTANCE = 25.0  # CIELAB; orange is 46 from red, blue 30 from purple
_VOTES = 0.8  # of the pixels that must agree on the word
_DARK_BELOW, _LIGHT_ABOVE, _GREY_CHROMA = 35.0, 55.0, 25.0  # CIELAB of a background's words


def colour_word(pixels: np.ndarray) -> str | None:
    """The word of :data:`~.scenes.COLOURS` that most of the pixels, float32 [N, 3], agree on."""
    if not len(pixels):
        return None
    lab = cielab(pixels)
    table = cielab(np.array(list(COLOURS.values()), np.float32))
    distances = np.stack([squared_norm(lab - entry) for entry in table], axis=1)
    nearest = np.where(distances.min(1) < _MAX_DISTANCE**2, distances.argmin(1), len(table))
    votes = np.bincount(nearest, minlength=len(table) + 1)[:-1] / len(pixels)
    winner = int(votes.argmax())
    return list(COLOURS)[winner] if votes[winner] >= _VOTES else None


def background_word(ground: np.ndarray) -> str | None:
    """The word for a greyish colour, float32 [3]: "dark", "light", or None in between."""
    lightness, a, b = cielab(ground[None])[0]
    if math.hypot(a, b) > _GREY_CHROMA or _DARK_BELOW <= lightness <= _LIGHT_ABOVE:
        return None
    return "dark" if lightness < _DARK_BELOW else "light"


def cielab(rgb: np.ndarray) -> np.ndarray:
    """sRGB [N, 3] in 0 … 255 to CIELAB [N, 3] under D65 (IEC 61966-2-1, CIE 15)."""
    value = np.clip(rgb / 255.0, 0.0, 1.0)
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _XYZ_OF_RGB / _WHITE
    cubic = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = cubic[:, 0], cubic[:, 1], cubic[:, 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def squared_norm(vectors: np.ndarray) -> np.ndarray:
    """Squared lengths along the last axis."""
    return np.einsum("...c,...c->...", vectors, vectors)


_XYZ_OF_RGB = np.array(
    [
        [0.4124564, 0.2126729, 0.0193339],
        [0.3575761, 0.7151522, 0.1191920],
        [0.1804375, 0.0721750, 0.9503041],
    ],
    np.float32,
)
_WHITE = np.array([0.95047, 1.0, 1.08883], np.float32)

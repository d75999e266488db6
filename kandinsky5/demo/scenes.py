"""The demo model's world: one coloured shape that moves, or stands, before a plain background.

Scenes are drawn with exact area coverage at any size, described in free wording, and used to train the
model, to ask it for videos, and to judge what it paints.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 44, 40),
    "green": (40, 180, 72),
    "blue": (44, 84, 228),
    "yellow": (238, 214, 48),
    "white": (248, 248, 248),
    "purple": (150, 56, 196),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"dark": (26, 28, 34), "light": (168, 174, 184)}

TRAVEL = (0.34, 0.46)
"""How far a moving shape goes during a clip, as a share of the picture's side."""
RADIUS = (0.145, 0.19)
"""Size of a shape as a share of the picture's side."""


@dataclass(frozen=True)
class Scene:
    """One shape and its way across the unit square (x to the right, y down).

    Attributes:
        colour, shape, direction, background: words of the tables above.
        radius: of the circle; the other shapes cover about the same area.
        start: centre in the first frame.
        travel: distance covered between the first and the last frame.
    """

    colour: str
    shape: str
    direction: str
    background: str
    radius: float
    start: tuple[float, float]
    travel: float

    def centre(self, progress: float) -> tuple[float, float]:
        """Where the shape is at ``progress`` in [0, 1] of the clip."""
        dx, dy = DIRECTIONS[self.direction]
        return (
            self.start[0] + dx * self.travel * progress,
            self.start[1] + dy * self.travel * progress,
        )


def random_scene(
    rng: random.Random,
    *,
    colour: str | None = None,
    shape: str | None = None,
    direction: str | None = None,
    background: str | None = None,
    wander: float = 1.0,
) -> Scene:
    """A scene whose shape stays inside the picture; what is given is kept, the rest is drawn from ``rng``.

    ``wander`` is the share of the free room that the shape's way may be off the middle: 1 is anywhere.
    """
    colour = colour or rng.choice(list(COLOURS))
    shape = shape or rng.choice(SHAPES)
    direction = direction or rng.choice(list(DIRECTIONS))
    background = background or rng.choice(list(BACKGROUNDS))
    radius = rng.uniform(*RADIUS)
    travel = rng.uniform(*TRAVEL) if direction != "still" else 0.0
    margin = radius * 1.3 + 0.02

    def start(step: int) -> float:
        low, high = margin, 1.0 - margin
        low, high = low + travel * (step < 0), high - travel * (step > 0)
        middle, room = (low + high) / 2, (high - low) / 2
        return middle + wander * rng.uniform(-room, room)

    dx, dy = DIRECTIONS[direction]
    return Scene(colour, shape, direction, background, radius, (start(dx), start(dy)), travel)


def render(scene: Scene, frames: int, size_px: int) -> np.ndarray:
    """Draw the scene: uint8 [frames, size_px, size_px, 3]."""
    alphas = np.stack(
        [
            coverage(
                scene.shape,
                scene.centre(i / max(frames - 1, 1)),
                scene.radius,
                size_px,
            )
            for i in range(frames)
        ]
    )[..., None]
    colour = np.asarray(COLOURS[scene.colour], np.float32)
    background = np.asarray(BACKGROUNDS[scene.background], np.float32)
    return np.round(background + alphas * (colour - background)).astype(np.uint8)


def coverage(shape: str, centre: tuple[float, float], radius: float, size_px: int) -> np.ndarray:
    """Share of each pixel that the shape covers, float32 [size_px, size_px] in [0, 1].

    ``centre`` and ``radius`` are in units of the side.
    """
    grid = np.arange(size_px, dtype=np.float32) + 0.5
    x = grid[None, :] - centre[0] * size_px
    y = grid[:, None] - centre[1] * size_px
    radius_px = radius * size_px
    if shape == "circle":
        distance = np.sqrt(x * x + y * y) - radius_px
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.886 * radius_px
    else:  # an equilateral triangle, apex up, of about the circle's area
        inner = 0.75 * radius_px
        slope = np.sqrt(np.float32(3.0)) / 2
        distance = np.maximum(y, slope * np.abs(x) - 0.5 * y) - inner
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


_NOUNS = {
    "circle": ("circle", "circle", "circle", "disc", "ball"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle", "triangle", "triangle"),
}
_MOTIONS = {
    "left": ("moves left", "moving left", "moves to the left", "goes left", "slides to the left"),
    "right": (
        "moves right",
        "moving right",
        "moves to the right",
        "goes right",
        "slides to the right",
    ),
    "up": ("moves up", "moving up", "rises up", "goes up", "slides upwards"),
    "down": ("moves down", "moving down", "falls down", "goes down", "slides downwards"),
    "still": ("stands still", "standing still", "does not move", "stays in place", "is still"),
}
_BACKDROPS = (
    "on a {} background",
    "before a {} background",
    "{} background",
    "in front of a {} wall",
)


def describe(scene: Scene, rng: random.Random) -> str:
    """A caption of the scene in one of many wordings; the background is not always named."""
    subject = f"{scene.colour} {rng.choice(_NOUNS[scene.shape])}"
    subject = rng.choice(("a {}", "a {}", "{}", "the {}", "one {}", "a video of a {}")).format(
        subject
    )
    caption = f"{subject} {rng.choice(_MOTIONS[scene.direction])}"
    if rng.random() < 0.6:
        backdrop = rng.choice(_BACKDROPS).format(scene.background)
        caption = rng.choice((f"{caption} {backdrop}", f"{caption}, {backdrop}"))
    if rng.random() < 0.15:
        caption = caption[0].upper() + caption[1:] + "."
    return caption

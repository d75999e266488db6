"""What a clip of the demo's world shows, read from its pixels alone, and whether it was asked for.

:func:`measure` knows nothing of the prompt. It finds the plain background, what stands out from it,
that thing's colour, its path and its outline, and stays silent (``None``) wherever the picture is
not clear: where several things are seen, where the thing fades, jumps or turns back, where its
colour or outline changes on the way. Blur, ringing, noise and small colour errors, as a video
autoencoder and H.264 leave them, do not disturb it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from kandinsky5.demo.colour import background_word, colour_word, squared_norm
from kandinsky5.demo.scenes import SHAPES, Scene, coverage

_ENOUGH_PX = 64  # on the shorter side

_PLAIN_DISTANCE = 40.0  # RGB distance from the border's median that still counts as background
_PLAIN_SHARE = 0.85  # of the border's pixels that must be background

_MIN_CONTRAST = 50.0  # RGB distance; the faintest pair of the tables has 120
_AREA_SHARE = (0.015, 0.35)  # of the picture; drawn shapes cover 0.06 … 0.12

_AREA_CHANGE = 1.35  # times the clip's median area, or one over that
_WITHIN_SHARE = 0.9  # of the foreground that must lie around its centre
_MAX_SPREAD = 0.24  # second moment over squared area: circle 0.159, square 0.167, triangle 0.192
_SOUND_SHARE = 0.9  # of the frames that must show one whole thing

_MAX_JUMP = 0.12  # of the side between two frames; drawn shapes move at most 0.02
_STILL_BELOW, _MOVES_ABOVE = 0.08, 0.12  # of the side; drawn shapes move 0.34 … 0.46 or not at all
_SIDEWAYS_SHARE = 0.5  # of the displacement that may go into the other axis
_BACKWARD_SHARE = 0.25  # of the displacement that the path may go back on its way

_MIN_OVERLAP = 0.85  # with the best template; of equal areas, two shapes overlap by 0.66 … 0.84
_OVERLAP_MARGIN = 0.02  # by which the best template must lead
_SHAPE_VOTES = 0.8  # of the frames that must agree on the template

_TEMPLATE_AREA = {"circle": math.pi, "square": 4 * 0.886**2, "triangle": 3 * math.sqrt(3) * 0.75**2}
"""Area of each shape of radius 1, as :func:`kandinsky5.demo.scenes.coverage` draws it."""


@dataclass(frozen=True)
class Observation:
    """What a clip shows; ``None`` where the picture does not answer clearly.

    Attributes:
        colour, shape, direction, background: words of the tables of :mod:`~.scenes`.
        displacement: (x, y) between the first and the last frames as a share of the longer side,
            x to the right and y down; None when nothing stands out.
        colour_rgb, background_rgb: what was seen, 0 … 255.
        overlap: mean intersection over union with the best template, 0 … 1; 0 without any.
        sound_share: share of the frames that show one whole thing.
    """

    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    background: str | None = None
    displacement: tuple[float, float] | None = None
    colour_rgb: tuple[int, int, int] | None = None
    background_rgb: tuple[int, int, int] | None = None
    overlap: float = 0.0
    sound_share: float = 0.0


@dataclass(frozen=True)
class SceneWords:
    """What a prompt asks for; the background is None when the prompt does not name it."""

    colour: str
    shape: str
    direction: str
    background: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Which of the prompt's words the clip keeps; ``background`` is None when not asked for."""

    colour: bool
    direction: bool
    shape: bool
    background: bool | None = None

    @property
    def all_right(self) -> bool:
        return self.colour and self.direction and self.shape and self.background is not False


def words_of(scene: Scene, prompt: str) -> SceneWords:
    """The words of ``scene`` that ``prompt``, a caption of :func:`~.scenes.describe`, asks for."""
    named = scene.background in prompt.lower()
    background = scene.background if named else None
    return SceneWords(scene.colour, scene.shape, scene.direction, background)


def judge(scene_words: SceneWords, observation: Observation) -> Verdict:
    """Compare what was asked for with what is seen; what is not seen clearly is not right."""
    background = None
    if scene_words.background is not None:
        background = observation.background == scene_words.background
    return Verdict(
        colour=observation.colour == scene_words.colour,
        direction=observation.direction == scene_words.direction,
        shape=observation.shape == scene_words.shape,
        background=background,
    )


def first_frame_psnr(frames: np.ndarray, image: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of the first frame against a picture; infinite if equal.

    Args:
        frames: uint8 [T, H, W, 3].
        image: uint8 [H, W, 3].

    Raises:
        ValueError: the sizes differ or the arrays are not of that form.
    """
    _check(frames)
    if image.shape != frames.shape[1:] or image.dtype != np.uint8:
        raise ValueError(
            f"image: got {image.dtype} {image.shape}; uint8 {frames.shape[1:]} is allowed"
        )
    error = float(np.mean((frames[0].astype(np.float64) - image) ** 2))
    return math.inf if error == 0.0 else 10.0 * math.log10(255.0**2 / error)


def measure(frames: np.ndarray) -> Observation:
    """Look at a clip.

    Args:
        frames: uint8 [T, H, W, 3], at least 16 pixels a side.

    Raises:
        ValueError: the array is not of that form.
    """
    _check(frames)
    pixels = _small(frames)
    ground, plain = _ground(pixels)
    if not plain:
        return Observation(background_rgb=_rounded(ground))
    background = background_word(ground)
    distance = np.sqrt(squared_norm(pixels - ground))
    contrast = float(np.median(np.quantile(distance, 0.98, axis=(1, 2), method="nearest")))
    # Half the ramp of a blurred edge around the same middle: sharp enough to compare with a drawn
    # one, and rid of faint ringing.
    mask = np.clip(2.0 * distance / max(contrast, _MIN_CONTRAST) - 0.5, 0.0, 1.0)
    blobs = [_find_blob(frame) for frame in mask]
    area = float(np.median([blob.area for blob in blobs]))
    low, high = _AREA_SHARE
    if contrast < _MIN_CONTRAST or not low <= area / mask[0].size <= high:
        return Observation(background=background, background_rgb=_rounded(ground))

    core = pixels[_inner(distance > 0.35 * contrast)]
    sound = np.array([blob.is_whole(area) for blob in blobs])
    kept = [blob for blob, ok in zip(blobs, sound, strict=True) if ok]
    direction = shape = displacement = None
    overlap = 0.0
    if kept:
        path = np.array([(blob.x, blob.y) for blob in kept]) / max(mask.shape[1:])
        shift = _ends(path)
        displacement = (round(float(shift[0]), 4), round(float(shift[1]), 4))
        shape, overlap = _shape(mask[sound], kept)
        if sound.mean() >= _SOUND_SHARE:
            direction = _direction(path)
        else:
            shape = None
    return Observation(
        colour=colour_word(core),
        shape=shape,
        direction=direction,
        background=background,
        displacement=displacement,
        colour_rgb=_rounded(np.median(core, axis=0)) if len(core) else None,
        background_rgb=_rounded(ground),
        overlap=round(overlap, 4),
        sound_share=round(float(sound.mean()), 4),
    )


@dataclass(frozen=True)
class _Blob:
    """The foreground of one frame: area and centre in pixels, how much of it lies together."""

    area: float
    x: float
    y: float
    within: float
    spread: float

    def is_whole(self, usual_area: float) -> bool:
        """Whether this is one thing of about its usual size."""
        usual = usual_area / _AREA_CHANGE <= self.area <= usual_area * _AREA_CHANGE
        return usual and self.within >= _WITHIN_SHARE and self.spread <= _MAX_SPREAD


def _check(frames: np.ndarray) -> None:
    good = frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3
    if not good or frames.shape[0] < 1 or min(frames.shape[1:3]) < 16:
        raise ValueError(
            f"frames: got {frames.dtype} {frames.shape}; "
            "uint8 [T, H, W, 3] with sides of 16 or more is allowed"
        )


def _small(frames: np.ndarray) -> np.ndarray:
    """Float32 frames of at most 127 pixels on the shorter side, each the mean of a square.

    Enough to tell the shapes apart, with less noise and work; smaller pictures stay as they are.
    """
    height, width = frames.shape[1:3]
    step = max(1, min(height, width) // _ENOUGH_PX)
    bottom, right = height - height % step, width - width % step
    total = np.zeros((len(frames), bottom // step, right // step, 3), np.float32)
    for row, column in itertools.product(range(step), repeat=2):
        total += frames[:, row:bottom:step, column:right:step]
    return total / step**2


def _inner(mask: np.ndarray) -> np.ndarray:
    """The mask [T, H, W] without its rim, where a blurred edge mixes the colours."""
    for _ in range(max(1, min(mask.shape[1:]) // 32)):
        mask = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
        rows = mask[:, :-2] & mask[:, 1:-1] & mask[:, 2:]
        mask = rows[:, :, :-2] & rows[:, :, 1:-1] & rows[:, :, 2:]
    return mask


def _ground(pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    """Colour of the border, float32 [3], and whether the border is plain throughout the clip."""
    width = max(1, min(pixels.shape[1:3]) // 32)
    strips = (
        pixels[:, :width],
        pixels[:, -width:],
        pixels[:, width:-width, :width],
        pixels[:, width:-width, -width:],
    )
    border = np.concatenate([strip.reshape(-1, 3) for strip in strips])
    ground = np.median(border, axis=0)
    near = squared_norm(border - ground) < _PLAIN_DISTANCE**2
    return ground, bool(near.mean() >= _PLAIN_SHARE)


def _find_blob(mask: np.ndarray) -> _Blob:
    """The foreground of one frame, float32 [H, W] in [0, 1], around its densest place."""
    area = float(mask.sum())
    if area < 1.0:
        return _Blob(area, 0.0, 0.0, 0.0, math.inf)
    xs = np.arange(mask.shape[1], dtype=np.float32) + 0.5
    ys = np.arange(mask.shape[0], dtype=np.float32)[:, None] + 0.5
    x = float((mask * xs).sum()) / area
    y = float((mask * ys).sum()) / area
    reach = 4.0 * area / math.pi  # square of twice the radius of a disc of this area
    inside, spread = 0.0, 0.0
    for _ in range(3):
        squared = np.square(xs - x) + np.square(ys - y)
        window = np.where(squared < reach, mask, np.float32(0.0))
        inside = float(window.sum())
        if inside == 0.0:
            break
        spread = float((window * squared).sum()) / inside**2
        x = float((window * xs).sum()) / inside
        y = float((window * ys).sum()) / inside
    return _Blob(area, x, y, inside / area, spread)


def _ends(path: np.ndarray) -> np.ndarray:
    """Displacement [2] between the mean of the first and of the last places of a path [N, 2]."""
    count = min(3, len(path))
    return path[-count:].mean(0) - path[:count].mean(0)


def _direction(path: np.ndarray) -> str | None:
    """The word for a path [N, 2] in shares of the side, y down; None unless straight and steady."""
    if len(path) < 2 or np.abs(np.diff(path, axis=0)).max() > _MAX_JUMP:
        return None
    excursion = np.sqrt(np.square(path - path[: min(3, len(path))].mean(0)).sum(1)).max()
    if excursion <= _STILL_BELOW:
        return "still"
    shift = _ends(path)
    axis = int(np.abs(shift).argmax())
    length = float(abs(shift[axis]))
    along = path[:, axis] * np.sign(shift[axis])
    backward = float((np.maximum.accumulate(along) - along).max())
    sideways = float(np.ptp(path[:, 1 - axis]))
    if (
        length < _MOVES_ABOVE
        or backward > _BACKWARD_SHARE * length
        or sideways > _SIDEWAYS_SHARE * length
    ):
        return None
    return (("left", "right"), ("up", "down"))[axis][int(shift[axis] > 0)]


def _shape(masks: np.ndarray, blobs: list[_Blob]) -> tuple[str | None, float]:
    """The template that the masks [N, H, W] overlap best, or None, and its mean overlap."""
    height, width = masks.shape[1:]
    side = max(height, width)
    overlaps = np.empty((len(blobs), len(SHAPES)))
    for row, (mask, blob) in enumerate(zip(masks, blobs, strict=True)):
        for column, shape in enumerate(SHAPES):
            radius = math.sqrt(blob.area / _TEMPLATE_AREA[shape]) / side
            template = coverage(shape, (blob.x / side, blob.y / side), radius, side)[
                :height, :width
            ]
            common = float(np.minimum(mask, template).sum())
            overlaps[row, column] = common / (blob.area + float(template.sum()) - common)
    mean = overlaps.mean(0)
    best = int(mean.argmax())
    lead = mean[best] - np.delete(mean, best).max()
    votes = float((overlaps.argmax(1) == best).mean())
    clear = mean[best] >= _MIN_OVERLAP and lead >= _OVERLAP_MARGIN and votes >= _SHAPE_VOTES
    return (SHAPES[best] if clear else None), float(mean[best])


def _rounded(rgb: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (round(float(value)) for value in rgb)
    return red, green, blue

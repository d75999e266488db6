"""What the judge of the demo's clips sees is what is there, through small flaws too."""

from __future__ import annotations

import math
import random

import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kandinsky5.demo.adherence import measure
from kandinsky5.demo.scenes import BACKGROUNDS, Scene, random_scene, render
from tests.demo.clips import GRID, MOVING, as_pixels, noisy, scene_of, spread, words

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "still": "still"}


def misread(cells, frames: int, size_px: int, change=lambda clip: clip) -> list[tuple]:
    """The cells whose changed clip is not read as what it shows."""
    wrong = []
    for cell in cells:
        observed = measure(change(render(scene_of(cell), frames, size_px)))
        if words(observed) != cell:
            wrong.append((cell, observed))
    return wrong


def saved_and_read(clip: np.ndarray, path) -> np.ndarray:
    """The clip after H.264 at CRF 16."""
    height, width = clip.shape[1:3]
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (width, height),
        fps=24,
        codec="libx264",
        quality=None,
        macro_block_size=None,
        output_params=["-crf", "16", "-threads", "1"],
    )
    writer.send(None)
    for frame in clip:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    reader = imageio_ffmpeg.read_frames(str(path))
    next(reader)
    return np.stack([np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in reader])


def blurred(clip: np.ndarray, sigma_px: float) -> np.ndarray:
    reach = math.ceil(3 * sigma_px)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma_px) ** 2)
    pixels = clip.astype(np.float32)
    for axis in (1, 2):
        size = pixels.shape[axis]
        places = np.clip(np.arange(-reach, size + reach), 0, size - 1)
        padded = np.take(pixels, places, axis)
        pixels = sum(
            weight * np.take(padded, range(shift, shift + size), axis)
            for shift, weight in enumerate(weights / weights.sum())
        )
    return as_pixels(pixels)


def ringing(clip: np.ndarray) -> np.ndarray:
    """Edges overshoot on both sides, as a decoder's do."""
    return as_pixels(1.5 * clip.astype(np.float32) - 0.5 * blurred(clip, 2.0))


def flickering(clip: np.ndarray) -> np.ndarray:
    """Each frame a little brighter or darker than the one before."""
    return as_pixels(clip + np.random.default_rng(4).uniform(-6, 6, (len(clip), 1, 1, 1)))


@pytest.mark.parametrize(
    ("size_px", "frames", "every"), [(64, 25, 1), (64, 49, 7), (128, 25, 1), (128, 49, 11)]
)
def test_reads_every_scene_from_its_true_pixels(size_px: int, frames: int, every: int) -> None:
    assert misread(GRID[::every], frames, size_px) == []


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([(64, 25), (96, 13), (72, 49)]))
def test_reads_random_scenes(rng: random.Random, form: tuple[int, int]) -> None:
    scene = random_scene(rng)
    size_px, frames = form
    assert words(measure(render(scene, frames, size_px))) == words(scene)


@pytest.mark.parametrize(
    "change",
    [
        lambda clip: blurred(clip, 1.0),
        lambda clip: blurred(clip, 1.8),
        ringing,
        noisy,
        flickering,
        lambda clip: noisy(blurred(clip, 1.2)),
        lambda clip: as_pixels(clip + np.array([15.0, -10.0, 12.0])),
        lambda clip: as_pixels(clip + np.array([-18.0, 12.0, -15.0])),
        lambda clip: as_pixels(clip * 0.92),
    ],
    ids="blur more-blur ringing noise flicker blur+noise warmer cooler darker".split(),
)
def test_reads_scenes_through_small_flaws(change) -> None:
    assert misread(spread(24), 25, 64, change) == []


def test_reads_scenes_through_h264(tmp_path) -> None:
    assert misread(spread(20), 25, 64, lambda c: saved_and_read(c, tmp_path / "a.mp4")) == []
    assert misread(GRID[::47], 25, 128, lambda c: saved_and_read(c, tmp_path / "b.mp4")) == []


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64)])
def test_reads_a_picture_that_is_not_square(height: int, width: int) -> None:
    for cell in spread(20):
        square = render(scene_of(cell), 25, 64)
        room = np.empty((25, height, width, 3), np.uint8)
        room[:] = BACKGROUNDS[cell[3]]
        room[:, -64:, -64:] = square
        assert words(measure(room)) == cell


def test_a_clip_played_backwards_moves_the_other_way() -> None:
    for cell in MOVING:
        observed = measure(render(scene_of(cell), 25, 64)[::-1])
        assert words(observed) == (cell[0], cell[1], OPPOSITE[cell[2]], cell[3])


def test_a_clip_that_stands_is_still_whatever_was_asked() -> None:
    for cell in MOVING:
        clip = render(scene_of(cell), 25, 64)
        observed = measure(np.repeat(clip[10:11], 25, axis=0))
        assert words(observed) == (cell[0], cell[1], "still", cell[3])


def test_displacement_is_told_in_shares_of_the_side() -> None:
    scene = Scene("red", "circle", "up", "dark", 0.16, (0.5, 0.75), 0.4)
    displacement = measure(render(scene, 49, 64)).displacement
    assert displacement == pytest.approx((0.0, -0.4 * 46 / 48), abs=0.005)

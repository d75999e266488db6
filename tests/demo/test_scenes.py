"""The demo's world: what is drawn, where it goes and how it is put into words."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kandinsky5.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    RADIUS,
    SHAPES,
    TRAVEL,
    Scene,
    coverage,
    describe,
    random_scene,
    render,
)

AREAS = {"circle": math.pi, "square": 4 * 0.886**2, "triangle": 3 * math.sqrt(3) * 0.75**2}
NOUNS = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
}
MOTIONS = {
    "left": ("left",),
    "right": ("right",),
    "up": (" up",),
    "down": ("down",),
    "still": ("still", "not move", "in place"),
}
randoms = st.randoms(use_true_random=False)


@settings(max_examples=150, deadline=None)
@given(randoms, st.sampled_from(SHAPES))
def test_a_random_scene_stays_inside_the_picture(rng: random.Random, shape: str) -> None:
    """All but the last hundredth of a long triangle's tip is seen all the way."""
    scene = random_scene(rng, shape=shape)
    whole = coverage(shape, (0.5, 0.5), scene.radius, 128).sum()
    for progress in (0.0, 0.5, 1.0):
        seen = coverage(shape, scene.centre(progress), scene.radius, 128).sum()
        assert seen == pytest.approx(whole, rel=0.01)


@settings(max_examples=100, deadline=None)
@given(randoms)
def test_a_random_scene_keeps_to_the_tables_and_ranges(rng: random.Random) -> None:
    scene = random_scene(rng)
    assert scene.colour in COLOURS and scene.shape in SHAPES
    assert scene.direction in DIRECTIONS and scene.background in BACKGROUNDS
    assert RADIUS[0] <= scene.radius <= RADIUS[1]
    moves = scene.direction != "still"
    assert TRAVEL[0] <= scene.travel <= TRAVEL[1] if moves else scene.travel == 0.0


def test_what_is_given_is_kept() -> None:
    for index in range(20):
        scene = random_scene(
            random.Random(index),
            colour="purple",
            shape="square",
            direction="up",
            background="light",
        )
        assert (scene.colour, scene.shape) == ("purple", "square")
        assert (scene.direction, scene.background) == ("up", "light")


def test_random_scenes_use_every_word() -> None:
    rng = random.Random(1)
    scenes = [random_scene(rng) for _ in range(200)]
    assert {scene.colour for scene in scenes} == set(COLOURS)
    assert {scene.shape for scene in scenes} == set(SHAPES)
    assert {scene.direction for scene in scenes} == set(DIRECTIONS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)


@pytest.mark.parametrize("size_px", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_its_area_wherever_it_stands(shape: str, size_px: int) -> None:
    rng = random.Random(7)
    for _ in range(50):
        radius = rng.uniform(*RADIUS)
        centre = (rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6))
        area = coverage(shape, centre, radius, size_px).sum() / size_px**2
        assert area == pytest.approx(AREAS[shape] * radius**2, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_lies_around_its_centre(shape: str) -> None:
    mask = coverage(shape, (0.37, 0.61), 0.17, 64)
    places = (np.arange(64) + 0.5) / 64
    assert (mask.sum(0) * places).sum() / mask.sum() == pytest.approx(0.37, abs=0.003)
    assert (mask.sum(1) * places).sum() / mask.sum() == pytest.approx(0.61, abs=0.003)
    assert mask.dtype == np.float32 and mask.min() == 0.0 and mask.max() == 1.0


def test_shapes_have_their_outlines() -> None:
    circle, square, triangle = (coverage(shape, (0.5, 0.5), 0.2, 64) > 0.5 for shape in SHAPES)
    assert np.array_equal(circle, circle.T) and np.array_equal(square, square.T)
    rows, columns = np.flatnonzero(square.any(1)), np.flatnonzero(square.any(0))
    assert square[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert not circle[rows[0], columns[0]]
    widths = triangle.sum(1)[triangle.any(1)]
    assert (np.diff(widths) >= 0).all(), "apex up, base down"
    assert widths[0] <= 2 < widths[-1]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_scene_goes_where_its_word_says(direction: str) -> None:
    scene = random_scene(random.Random(3), direction=direction)
    (x0, y0), (x1, y1) = scene.centre(0.0), scene.centre(1.0)
    dx, dy = DIRECTIONS[direction]
    assert (x1 - x0, y1 - y0) == pytest.approx((dx * scene.travel, dy * scene.travel))


@pytest.mark.parametrize("frames", [1, 25])
def test_renders_the_colours_of_the_tables(frames: int) -> None:
    scene = Scene("yellow", "square", "right", "light", 0.17, (0.3, 0.5), 0.4)
    clip = render(scene, frames, 64)
    assert clip.shape == (frames, 64, 64, 3) and clip.dtype == np.uint8
    assert tuple(clip[0, 0, 0]) == BACKGROUNDS["light"]
    assert tuple(clip[0, 32, 19]) == COLOURS["yellow"]
    if frames > 1:
        assert tuple(clip[-1, 32, 44]) == COLOURS["yellow"]
        assert tuple(clip[-1, 32, 19]) == BACKGROUNDS["light"]


@settings(max_examples=200, deadline=None)
@given(randoms)
def test_a_caption_tells_colour_shape_and_direction(rng: random.Random) -> None:
    scene = random_scene(rng)
    caption = describe(scene, rng).lower()
    assert [colour for colour in COLOURS if colour in caption] == [scene.colour]
    assert [s for s in SHAPES if any(word in caption for word in NOUNS[s])] == [scene.shape]
    told = [d for d in DIRECTIONS if any(word in caption for word in MOTIONS[d])]
    assert told == [scene.direction]
    named = [background for background in BACKGROUNDS if background in caption]
    assert named in ([], [scene.background])


def test_captions_vary_and_name_the_background_more_often_than_not() -> None:
    rng = random.Random(2)
    scene = random_scene(rng, background="dark")
    captions = [describe(scene, rng) for _ in range(300)]
    assert len(set(captions)) > 100
    assert 0.5 < sum("dark" in caption for caption in captions) / 300 < 0.7


def test_the_same_seed_gives_the_same_scene_caption_and_pixels() -> None:
    def drawn(seed: str) -> tuple[Scene, str, bytes]:
        rng = random.Random(seed)
        scene = random_scene(rng)
        return scene, describe(scene, rng), render(scene, 5, 64).tobytes()

    assert drawn("a") == drawn("a")
    assert drawn("a") != drawn("b")

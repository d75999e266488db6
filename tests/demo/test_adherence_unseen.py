"""What the judge of the demo's clips does not see: shapes, ways and colours that no word describes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kandinsky5.demo.adherence import measure
from kandinsky5.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, render
from tests.demo.clips import GRID, MOVING, STILL, as_pixels, noisy, scene_of, words


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_clip_shows_only_its_background(background: str) -> None:
    clip = np.empty((25, 64, 64, 3), np.uint8)
    clip[:] = BACKGROUNDS[background]
    for seen in (clip, noisy(clip)):
        assert words(measure(seen)) == (None, None, None, background)


def test_noise_shows_nothing() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (25, 64, 64, 3), dtype=np.uint8)
    assert words(measure(clip)) == (None, None, None, None)


def test_a_single_frame_has_no_direction() -> None:
    assert words(measure(render(scene_of(GRID[0]), 25, 64)[:1]))[2] is None


def crossed(first: np.ndarray, second: np.ndarray, at: float) -> np.ndarray:
    cut = round(len(first) * at)
    return np.concatenate([first[:cut], second[cut:]])


def farthest_from_ground(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Both clips' shapes in one picture."""
    ground = first[0, 0, 0].astype(int)
    nearer = np.abs(first - ground).sum(-1) < np.abs(second - ground).sum(-1)
    return np.where(nearer[..., None], second, first)


@pytest.mark.parametrize("at", [0.3, 0.5, 0.7])
def test_a_shape_that_becomes_another_is_no_shape(at: float) -> None:
    for cell in MOVING + STILL:
        scene = scene_of(cell)
        other = SHAPES[(SHAPES.index(cell[1]) + 1) % 3]
        changed = Scene(**{**vars(scene), "shape": other})
        observed = measure(crossed(render(scene, 25, 64), render(changed, 25, 64), at))
        assert observed.shape is None


@pytest.mark.parametrize("at", [0.3, 0.5, 0.7])
def test_a_colour_that_becomes_another_is_no_colour(at: float) -> None:
    names = list(COLOURS)
    for cell in MOVING + STILL:
        scene = scene_of(cell)
        for step in (1, 3):
            other = names[(names.index(cell[0]) + step) % len(names)]
            changed = Scene(**{**vars(scene), "colour": other})
            observed = measure(crossed(render(scene, 25, 64), render(changed, 25, 64), at))
            assert observed.colour is None


def test_a_shape_that_jumps_to_its_goal_does_not_move_there() -> None:
    for cell in MOVING:
        clip = render(scene_of(cell), 25, 64)
        first, last = np.repeat(clip[:1], 25, axis=0), np.repeat(clip[-1:], 25, axis=0)
        for at in (0.1, 0.5, 0.9):
            assert measure(crossed(first, last, at)).direction is None
        fade = np.linspace(0, 1, 25)[:, None, None, None]
        assert measure(as_pixels(first * (1 - fade) + last * fade)).direction is None


def test_a_shape_that_goes_there_and_back_has_no_direction() -> None:
    for cell in MOVING:
        clip = render(scene_of(cell), 25, 64)
        assert measure(np.concatenate([clip[::2], clip[::-2]])).direction is None
        assert measure(np.concatenate([clip[::2], clip[:12:-2]])).direction is None


def test_a_slanting_way_has_no_direction() -> None:
    for cell in STILL:
        ground = np.empty((25, 64, 64, 3), np.uint8)
        ground[:] = BACKGROUNDS[cell[3]]
        shape = render(Scene(*cell, 0.16, (0.3, 0.3), 0.0), 1, 64)[0]
        for index in range(25):
            ground[index, index:, index:] = shape[: 64 - index, : 64 - index]
        assert measure(ground).direction is None


@pytest.mark.parametrize("same_colour", [True, False])
def test_two_shapes_are_neither_a_shape_nor_a_way(same_colour: bool) -> None:
    for cell in MOVING + STILL:
        colour = cell[0] if same_colour else next(c for c in COLOURS if c != cell[0])
        first = Scene(*cell, 0.15, (0.25, 0.25), 0.4)
        second = Scene(colour, *cell[1:], 0.15, (0.75, 0.75), 0.4)
        if cell[2] in ("left", "up"):
            first, second = second, first
        both = farthest_from_ground(render(first, 25, 64), render(second, 25, 64))
        observed = measure(both)
        assert observed.shape is None and observed.direction is None
        assert same_colour or observed.colour is None


def test_a_shape_that_leaves_a_trail_is_not_right() -> None:
    for cell in MOVING:
        clip = render(scene_of(cell), 25, 64)
        trail = np.stack([clip[0], *itertools.accumulate(clip, farthest_from_ground)][1:])
        observed = measure(trail)
        assert observed.shape is None and observed.direction is None


@pytest.mark.parametrize("gone", [0.3, 0.7])
def test_a_shape_that_comes_late_or_fades_is_not_right(gone: float) -> None:
    for cell in MOVING + STILL:
        clip = render(scene_of(cell), 25, 64)
        ground = np.broadcast_to(clip[0, 0, 0], clip.shape)
        late, early = crossed(ground, clip, gone), crossed(clip, ground, 1 - gone)
        fade = np.linspace(1.5, -gone, 25).clip(0, 1)[:, None, None, None]
        for seen in (late, early, as_pixels(ground + fade * (clip.astype(float) - ground))):
            assert measure(seen).direction is None and measure(seen).shape is None


def test_a_picture_without_a_plain_background_shows_nothing() -> None:
    clip = render(scene_of(GRID[0]), 25, 64)
    flashing = clip.copy()
    flashing[::2] = 255 - flashing[::2]
    halves = clip.copy()
    halves[:, :, 32:] = 200
    assert words(measure(flashing)) == words(measure(halves)) == (None,) * 4


@pytest.mark.parametrize(
    "rgb", [(255, 140, 0), (0, 200, 220), (250, 120, 180), (128, 128, 128), (130, 80, 30)]
)
def test_a_colour_of_no_word_has_none(rgb: tuple[int, int, int]) -> None:
    clip = render(Scene("white", "circle", "right", "dark", 0.17, (0.3, 0.5), 0.4), 25, 64)
    share = (clip.astype(np.float32) - 30) / 218
    observed = measure(as_pixels(30 + share.clip(0) * (np.array(rgb) - 30)))
    assert (observed.colour, observed.shape, observed.direction) == (None, "circle", "right")


def test_an_outline_of_no_word_has_none() -> None:
    y, x = np.mgrid[:64, :64] - 31.5
    angle, distance = np.arctan2(y, x), np.hypot(x, y)
    outlines = {
        "star": distance < 10 * (1 + 0.5 * np.cos(5 * angle)),
        "ring": (distance < 12) & (distance > 6),
        "bar": (abs(x) < 18) & (abs(y) < 5),
        "triangle upside down": np.maximum(-y, 0.866 * abs(x) + 0.5 * y) < 8,
        "diamond": abs(x) + abs(y) < 13,
    }
    for name, outline in outlines.items():
        frame = np.where(outline[..., None], COLOURS["red"], BACKGROUNDS["dark"]).astype(np.uint8)
        assert measure(np.repeat(frame[None], 25, axis=0)).shape is None, name


def test_an_outline_between_two_words_has_none() -> None:
    y, x = np.mgrid[:64, :64] - 31.5
    outline = (abs(x) ** 3.4 + abs(y) ** 3.4) ** (1 / 3.4) < 10
    frame = np.where(outline[..., None], COLOURS["red"], BACKGROUNDS["dark"]).astype(np.uint8)
    assert measure(np.repeat(frame[None], 25, axis=0)).shape is None


def test_two_shapes_that_go_side_by_side_are_not_one() -> None:
    for gap in (0.33, 0.36):
        first = Scene("red", "circle", "right", "dark", 0.15, (0.25, 0.5 - gap / 2), 0.4)
        second = Scene("red", "circle", "right", "dark", 0.15, (0.25, 0.5 + gap / 2), 0.4)
        both = farthest_from_ground(render(first, 25, 64), render(second, 25, 64))
        observed = measure(both)
        assert observed.shape is None and observed.direction is None


@pytest.mark.parametrize("radius", [0.03, 0.4])
def test_a_speck_or_a_thing_that_fills_the_picture_is_nothing(radius: float) -> None:
    clip = render(Scene("red", "circle", "still", "dark", radius, (0.5, 0.5), 0.0), 25, 64)
    assert words(measure(clip)) == (None, None, None, "dark")


def test_a_shape_too_faint_to_see_is_nothing() -> None:
    clip = render(Scene("red", "circle", "right", "dark", 0.17, (0.3, 0.5), 0.4), 25, 64)
    ground = clip[0, 0, 0].astype(float)
    assert words(measure(as_pixels(ground + 0.2 * (clip - ground))))[:3] == (None, None, None)


@pytest.mark.parametrize("rgb", [(20, 20, 160), (250, 200, 60), (110, 110, 110)])
def test_a_background_neither_dark_nor_light_has_no_word(rgb: tuple[int, int, int]) -> None:
    clip = np.empty((25, 64, 64, 3), np.uint8)
    clip[:] = rgb
    observed = measure(clip)
    assert observed.background is None and observed.background_rgb == rgb

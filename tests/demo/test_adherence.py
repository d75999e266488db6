"""What the judge of the demo's clips sees: everything that is there, and nothing that is not."""

from __future__ import annotations

import itertools
import math
import random

import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kandinsky5.demo.adherence import (
    Observation,
    SceneWords,
    first_frame_psnr,
    judge,
    measure,
    words_of,
)
from kandinsky5.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Scene,
    random_scene,
    render,
)

GRID = list(itertools.product(COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS))
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "still": "still"}


def scene_of(cell: tuple[str, str, str, str], key: object = 0) -> Scene:
    colour, shape, direction, background = cell
    rng = random.Random(f"{cell}/{key}")
    return random_scene(rng, colour=colour, shape=shape, direction=direction, background=background)


def words(seen: Observation | Scene) -> tuple[str | None, ...]:
    return seen.colour, seen.shape, seen.direction, seen.background


def misread(cells, frames: int, size_px: int, change=lambda clip: clip) -> list[tuple]:
    """The cells whose changed clip is not read as what it shows."""
    wrong = []
    for cell in cells:
        observed = measure(change(render(scene_of(cell), frames, size_px)))
        if words(observed) != cell:
            wrong.append((cell, observed))
    return wrong


def spread(count: int) -> list[tuple[str, str, str, str]]:
    """``count`` cells in which every word comes up."""
    cells = random.Random(count).sample(GRID, count)
    for column, table in enumerate((COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS)):
        assert {cell[column] for cell in cells} == set(table)
    return cells


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


def noisy(clip: np.ndarray) -> np.ndarray:
    return as_pixels(clip + np.random.default_rng(3).normal(0.0, 8.0, clip.shape))


def flickering(clip: np.ndarray) -> np.ndarray:
    """Each frame a little brighter or darker than the one before."""
    return as_pixels(clip + np.random.default_rng(4).uniform(-6, 6, (len(clip), 1, 1, 1)))


def as_pixels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


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


MOVING = [cell for cell in spread(60) if cell[2] != "still"][:16]
STILL = [cell for cell in GRID if cell[2] == "still"][::5]


def test_a_clip_played_backwards_moves_the_other_way() -> None:
    for cell in MOVING:
        observed = measure(render(scene_of(cell), 25, 64)[::-1])
        assert words(observed) == (cell[0], cell[1], OPPOSITE[cell[2]], cell[3])


def test_a_clip_that_stands_is_still_whatever_was_asked() -> None:
    for cell in MOVING:
        clip = render(scene_of(cell), 25, 64)
        observed = measure(np.repeat(clip[10:11], 25, axis=0))
        assert words(observed) == (cell[0], cell[1], "still", cell[3])


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


def test_displacement_is_told_in_shares_of_the_side() -> None:
    scene = Scene("red", "circle", "up", "dark", 0.16, (0.5, 0.75), 0.4)
    displacement = measure(render(scene, 49, 64)).displacement
    assert displacement == pytest.approx((0.0, -0.4 * 46 / 48), abs=0.005)


def test_judges_each_word_by_itself() -> None:
    seen = Observation(colour="red", shape="circle", direction="left", background="dark")
    right = judge(SceneWords("red", "circle", "left", "dark"), seen)
    assert right.colour and right.shape and right.direction and right.background
    assert right.all_right
    for field, other in {
        "colour": "blue",
        "shape": "square",
        "direction": "still",
        "background": "light",
    }.items():
        asked = {"colour": "red", "shape": "circle", "direction": "left", "background": "dark"}
        verdict = judge(SceneWords(**{**asked, field: other}), seen)
        kept = {name: getattr(verdict, name) for name in asked}
        assert kept == {name: name != field for name in asked}
        assert not verdict.all_right


def test_what_is_not_seen_is_not_right() -> None:
    verdict = judge(SceneWords("red", "circle", "left", "dark"), Observation())
    assert not (verdict.colour or verdict.shape or verdict.direction or verdict.background)


def test_a_background_that_was_not_asked_for_is_not_judged() -> None:
    seen = Observation(colour="red", shape="circle", direction="left", background=None)
    verdict = judge(SceneWords("red", "circle", "left"), seen)
    assert verdict.background is None and verdict.all_right


def test_asks_for_the_background_only_when_the_prompt_names_it() -> None:
    scene = scene_of(("red", "circle", "left", "dark"))
    assert words_of(scene, "A red disc goes left, Dark background.").background == "dark"
    assert words_of(scene, "a red disc goes left") == SceneWords("red", "circle", "left", None)


def test_psnr_of_the_first_frame() -> None:
    clip = np.full((3, 16, 16, 3), 100, np.uint8)
    assert first_frame_psnr(clip, clip[0]) == math.inf
    assert first_frame_psnr(clip, clip[0] + 10) == pytest.approx(20 * math.log10(25.5))
    clip[1:] = 0
    assert first_frame_psnr(clip, clip[0]) == math.inf


def test_refuses_what_is_not_a_clip() -> None:
    for frames in (np.zeros((5, 64, 64, 3)), np.zeros((64, 64, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            measure(frames)
    with pytest.raises(ValueError, match="image"):
        first_frame_psnr(np.zeros((1, 64, 64, 3), np.uint8), np.zeros((32, 64, 3), np.uint8))

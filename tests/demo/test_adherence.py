"""How the judge of the demo's clips judges what it saw, word by word."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kandinsky5.demo.adherence import (
    Observation,
    SceneWords,
    first_frame_psnr,
    judge,
    measure,
    words_of,
)
from tests.demo.clips import scene_of


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

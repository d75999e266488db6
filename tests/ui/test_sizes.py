"""Free sizes: the slider keeps the aspect, and whatever comes is a size that the model can make."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kandinsky5.errors import UserError
from kandinsky5.presets import PRESETS
from kandinsky5.ui.sizes import (
    LEAST_PERCENT,
    MOST_PERCENT,
    Frame,
    Scaled,
    percent_of,
    size_line,
)

SD, HD, I2V = "lite-t2v-5s-sft", "pro-t2v-5s-hd", "lite-i2v-5s"


def frame(preset: str = SD, width: Any = 768, height: Any = 512, **more: Any) -> Frame:
    values = {"attention": "auto", "image": None, "images": None, **more}
    return Frame.of(preset, width, height, **values)


def test_many_moves_of_the_slider_come_back_to_the_size_they_began_with():
    kept: Scaled | None = None
    size = (1280, 768)
    for percent in (90, 61, 33, 25, 140, 77, 97):
        kept = frame(HD, *size).scaled(percent, kept)
        size = kept.size_px
    percent = percent_of(PRESETS[HD], 1280, 768)
    assert frame(HD, *size).scaled(percent, kept).size_px == (1280, 768)


def test_a_move_that_was_told_an_earlier_size_still_keeps_the_aspect():
    kept = frame().scaled(50, None)
    for told in ((768, 512), kept.size_px):
        later = frame(SD, *told).scaled(40, kept)
        assert later.aspect_px == (768, 512)


def test_a_size_set_otherwise_is_scaled_from_what_it_is_now():
    kept = frame().scaled(50, None)
    assert frame(SD, 512, 512).scaled(50, kept).aspect_px == (512, 512)


@given(
    preset=st.sampled_from([SD, HD, "demo-t2v", "image-t2i"]),
    width=st.integers(64, 2048),
    height=st.integers(64, 2048),
    percent=st.integers(LEAST_PERCENT, MOST_PERCENT),
)
def test_whatever_is_scaled_or_swapped_is_legal_and_said_to_be(preset, width, height, percent):
    asked = frame(preset, width, height)
    for size in (asked.scaled(percent, None).size_px, asked.swapped()):
        assert frame(preset, *size).settled() == (size, ())


@given(
    width=st.integers(256, 1024),
    height=st.integers(256, 1024),
    percent=st.integers(60, 120),
)
def test_a_scaled_size_has_the_aspect_and_the_area_as_far_as_multiples_allow(
    width, height, percent
):
    asked = frame(SD, width, height)
    before, _ = asked.settled()
    assert before is not None
    made = asked.scaled(percent, None).size_px
    share = percent / 100 * math.sqrt(PRESETS[SD].area_px / (before[0] * before[1]))
    for side, old in zip(made, before, strict=True):
        assert abs(side - old * share) <= 8


def test_nabla_snaps_to_128_and_says_so():
    assert frame(SD, 700, 512).settled()[0] == (704, 512)
    size, notices = frame(SD, 700, 512, attention="nabla").settled()
    assert size == (640, 512)
    assert notices == ("width 700 set to 640: sides are multiples of 128",)


def test_sides_are_swapped():
    assert frame().swapped() == (512, 768)
    assert frame(SD, 641, 512).swapped() == (512, 640)


def test_without_a_size_the_picture_decides_and_can_be_scaled(tmp_path):
    picture = str(tmp_path / "wide.png")
    Image.new("RGB", (320, 160)).save(picture)
    assert frame(I2V, None, None).settled() == (None, ())
    asked = frame(I2V, None, None, image=picture)
    size, _ = asked.settled()
    assert size is not None and size[0] / size[1] == pytest.approx(2, abs=0.1)
    half = asked.scaled(50, None).size_px
    assert half[0] == pytest.approx(size[0] / 2, abs=16)
    assert frame(I2V, None, None, images=[picture, picture]).others == 1


def test_a_picture_left_over_from_another_mode_says_nothing():
    assert frame(SD, image="/nowhere.png").picture is None


@pytest.mark.parametrize("side", [30, 10**6, float("nan"), "wide", -1])
def test_a_side_that_cannot_be_is_refused_and_the_buttons_still_work(side):
    asked = frame(SD, side, 512)
    with pytest.raises(UserError) as caught:
        asked.settled()
    assert caught.value.field == "width"
    assert asked.swapped() == (512, 768)
    assert LEAST_PERCENT <= percent_of(PRESETS[SD], side, 512) <= MOST_PERCENT


def test_what_is_said_is_shown_as_text():
    assert size_line("") == ""
    assert "Got &lt;b&gt;" in size_line("got <b>")

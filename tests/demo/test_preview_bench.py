"""What a person would call the colour in a preview, and what the benchmark of previews counts."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
import torch

from kandinsky5.demo.bench import Pair
from kandinsky5.demo.preview_bench import Seen, demo_preview, shape_colour, summary, webp_frames
from kandinsky5.demo.scenes import BACKGROUNDS, COLOURS, random_scene, render
from kandinsky5.errors import UserError
from kandinsky5.model.loading import load_video_vae
from kandinsky5.pipeline.preview import encode_webp
from kandinsky5.pipeline.tiny_preview import choose_previewer
from kandinsky5.presets import DEMO_FOLDER

CPU = torch.device("cpu")


def drawn(colour: str, background: str, frames: int = 5, **words: str) -> np.ndarray:
    scene = random_scene(random.Random(1), colour=colour, background=background, **words)
    return render(scene, frames, 64)


@pytest.mark.parametrize(("colour", "background"), list(itertools.product(COLOURS, BACKGROUNDS)))
def test_colours_are_named_however_pale_or_blurred(colour, background) -> None:
    frames = drawn(colour, background)
    assert shape_colour(webp_frames(encode_webp(torch.from_numpy(frames)))) == colour
    ground = np.array(BACKGROUNDS[background], np.float32)
    share = 0.9 if colour == "white" else 0.6
    pale = (share * frames + (1 - share) * ground).astype(np.uint8)
    blurred = np.mean([frames, np.roll(frames, 3, 1), np.roll(frames, 3, 2)], axis=0)
    assert {shape_colour(pale), shape_colour(blurred.astype(np.uint8))} == {colour}


def test_pale_yellow_is_not_white() -> None:
    frames = drawn("yellow", "dark").astype(np.float32)
    assert shape_colour((frames * 0.6 + drawn("white", "dark") * 0.4).astype(np.uint8)) == "yellow"
    assert shape_colour((frames * 0.1 + drawn("white", "dark") * 0.9).astype(np.uint8)) == "white"


def test_where_nothing_stands_out_there_is_no_colour() -> None:
    plain = np.full((3, 32, 32, 3), BACKGROUNDS["light"], np.uint8)
    assert shape_colour(plain) is None
    plain[:, 10:20, 10:20] += 6
    assert shape_colour(plain) is None
    plain[:, 10:20, 10:20] = 90  # a grey thing has none of the words
    assert shape_colour(plain) is None


def pair(colour: str, background: str = "dark") -> Pair:
    scene = random_scene(random.Random(1), colour=colour, background=background)
    return Pair(scene, colour, 1)


def test_rates_are_told_by_step_and_over_all_of_them() -> None:
    watched = [
        [Seen(3, "red"), Seen(4, "red")],
        [Seen(3, "white"), Seen(4, "yellow")],
        [Seen(3, None), Seen(4, "blue")],
        [Seen(3, "green"), Seen(4, "red")],
    ]
    report = summary([pair("red"), pair("yellow"), pair("blue", "light"), pair("green")], watched)
    assert report["right_by_step"] == {"3": 0.5, "4": 0.75}
    assert (report["worst_step"], report["right_throughout"]) == (0.5, 0.25)
    assert report["failures"] == {"yellow on dark: white": 1, "blue on light: nothing": 1}


def test_the_demo_s_previews_have_the_colours_of_its_videos() -> None:
    vae = load_video_vae(DEMO_FOLDER / "vae", device=CPU, dtype=torch.float32)
    previewer, notice = choose_previewer(DEMO_FOLDER / "vae", vae.config, device=CPU)
    assert previewer is not None and notice is None
    for colour, background in zip(COLOURS, itertools.cycle(BACKGROUNDS), strict=False):
        frames = torch.from_numpy(drawn(colour, background, frames=9)).permute(3, 0, 1, 2)[None]
        with torch.inference_mode():
            mean, _ = vae.encode(frames.float() / 127.5 - 1.0)
        latent = (mean[0] * vae.config.scaling_factor).permute(1, 2, 3, 0)
        assert shape_colour(webp_frames(previewer.picture(latent))) == colour


def test_a_run_is_looked_at_from_thirty_per_cent_of_its_steps_on() -> None:
    report = demo_preview(runs=1, steps=4)
    assert list(report["right_by_step"]) == ["2", "3", "4"]
    assert 0 < report["largest_bytes"] < 300_000
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("wrong", [{"mode": "t2i"}, {"runs": 0}])
def test_what_cannot_be_asked_is_refused(wrong) -> None:
    with pytest.raises(UserError):
        demo_preview(**wrong)

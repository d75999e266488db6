"""Previews: steady colours, every frame, small files, and no work where none is due."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky5.events import PreviewReady
from kandinsky5.model.vae import VideoVAEConfig
from kandinsky5.pipeline import preview
from kandinsky5.pipeline.preview import (
    HUNYUAN_VIDEO_COLOURS,
    LatentColours,
    LinearPreviewer,
    PreviewFeed,
    clean_estimate,
    colours_of,
    preview_size,
    read_colours,
    write_colours,
)
from kandinsky5.pipeline.preview_pace import MAX_PREVIEWS, PreviewEvery
from kandinsky5.presets import FRAMES_PER_SECOND

DEMO_VAE = Path(__file__).resolve().parents[2] / "kandinsky5" / "demo" / "model" / "vae"
CHANNELS_ARE_COLOURS = LatentColours(((1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0)), (0.0, 0.0, 0.0))


def latent(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def frames_of(webp: bytes) -> list[np.ndarray]:
    with Image.open(io.BytesIO(webp)) as picture:
        frames = []
        for index in range(getattr(picture, "n_frames", 1)):
            picture.seek(index)
            frames.append(np.asarray(picture.convert("RGB")))
    return frames


def test_every_latent_frame_is_a_frame_of_the_picture_at_the_video_s_pace():
    webp = LinearPreviewer(HUNYUAN_VIDEO_COLOURS).picture(latent(7, 8, 12, 16))
    with Image.open(io.BytesIO(webp)) as picture:
        assert (picture.format, picture.n_frames) == ("WEBP", 7)
        picture.load()
        assert picture.info["duration"] == pytest.approx(1000 * 4 / FRAMES_PER_SECOND, abs=1)
        assert picture.info["loop"] == 0


def test_a_single_frame_stands_still():
    webp = LinearPreviewer(HUNYUAN_VIDEO_COLOURS).picture(latent(1, 8, 8, 16))
    assert len(frames_of(webp)) == 1


def test_a_frame_s_colours_depend_on_nothing_but_itself():
    previewer = LinearPreviewer(CHANNELS_ARE_COLOURS)
    clip = latent(3, 8, 8, 3).tanh()
    alone = previewer.pixels(clip)
    clip[1:] *= 100.0  # other frames become glaring
    among_others = previewer.pixels(clip)
    assert torch.equal(alone[0], among_others[0])
    assert not torch.equal(alone[1], among_others[1])


def test_colours_are_those_of_the_factors():
    grey_red = torch.tensor([1.0, 0.0, -1.0]).expand(1, 4, 4, 3)
    pixels = LinearPreviewer(CHANNELS_ARE_COLOURS).pixels(grey_red)
    assert pixels.unique(dim=1).flatten().unique().tolist() == [0, 128, 255]
    assert pixels[0, 0, 0].tolist() == [255, 128, 0]


def test_left_is_left_and_top_is_top():
    corner = torch.full((1, 4, 6, 3), -1.0)
    corner[0, 0, 0] = 1.0
    pixels = LinearPreviewer(CHANNELS_ARE_COLOURS, max_pixels=24).pixels(corner)
    assert pixels.shape == (1, 4, 6, 3)
    assert pixels[0, 0, 0].tolist() == [255, 255, 255]
    assert int(pixels.sum()) == 3 * 255


def test_not_a_number_is_grey():
    broken = torch.full((1, 2, 2, 3), math.nan)
    assert LinearPreviewer(CHANNELS_ARE_COLOURS).pixels(broken).unique().tolist() == [128]


def test_a_latent_of_other_channels_is_refused():
    with pytest.raises(ValueError, match=r"\[T, H, W, 3\]"):
        LinearPreviewer(CHANNELS_ARE_COLOURS).picture(latent(1, 2, 2, 16))


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(31, 64, 96), (61, 96, 176), (1, 256, 256), (7, 8, 8)]
)
def test_the_pixels_of_all_frames_are_bounded_and_the_shape_is_kept(frames, height, width):
    size = preview_size(frames, height, width, 400_000)
    assert frames * size[0] * size[1] <= 400_000
    assert size[0] <= 8 * height and size[1] <= 8 * width
    assert size[1] / size[0] == pytest.approx(width / height, rel=0.02)


def test_five_seconds_at_the_trained_size_stay_below_300_kilobytes():
    smooth = torch.nn.functional.interpolate(
        latent(1, 16, 8, 8, 12), size=(31, 64, 96), mode="trilinear"
    )
    rough = 0.5 * latent(31, 64, 96, 16, seed=1)  # as an estimate half-way through
    webp = LinearPreviewer(HUNYUAN_VIDEO_COLOURS).picture(smooth[0].permute(1, 2, 3, 0) * 2 + rough)
    assert len(frames_of(webp)) == 31
    assert len(webp) <= 300_000


@pytest.mark.parametrize("frames", [31, 61])
def test_noise_stays_below_300_kilobytes_too(frames):
    webp = LinearPreviewer(HUNYUAN_VIDEO_COLOURS).picture(3 * latent(frames, 64, 96, 16))
    assert len(frames_of(webp)) == frames
    assert len(webp) <= 300_000


def test_what_is_small_enough_is_encoded_once_at_full_quality(monkeypatch):
    tried = []
    encoded = preview._encoded
    monkeypatch.setattr(
        preview,
        "_encoded",
        lambda pictures, quality: tried.append(quality) or encoded(pictures, quality),
    )
    LinearPreviewer(HUNYUAN_VIDEO_COLOURS).picture(latent(3, 8, 12, 16))
    assert tried == [preview.WEBP_QUALITY]
    monkeypatch.setattr(preview, "MAX_BYTES", 0)
    LinearPreviewer(HUNYUAN_VIDEO_COLOURS).picture(latent(3, 8, 12, 16))
    assert tried[1:] == [preview.WEBP_QUALITY, *preview.LESSER_QUALITIES]


def test_the_clean_estimate_is_exact_for_a_straight_flow_on_both_sides_of_a_step():
    clean, noise = latent(2, 3, 3, 16), latent(2, 3, 3, 16, seed=1)
    velocity = noise - clean
    for time in (1.0, 0.7, 0.1):
        estimate = clean_estimate((1 - time) * clean + time * noise, velocity, time)
        torch.testing.assert_close(estimate, clean, atol=1e-6, rtol=0)


def test_a_given_first_frame_is_shown_as_it_is():
    x, given = latent(3, 2, 2, 16), latent(1, 2, 2, 16, seed=1)
    before = x.clone()
    estimate = clean_estimate(x, torch.ones_like(x), 0.5, given)
    assert torch.equal(estimate[:1], given)
    assert torch.equal(estimate[1:], x[1:] - 0.5)
    assert torch.equal(x, before)


class CountingPreviewer:
    def __init__(self) -> None:
        self.asked = 0

    def picture(self, clean: torch.Tensor) -> bytes:
        self.asked += 1
        return b"picture"


def steps_with_previews(total: int, every: PreviewEvery, step_s: float) -> list[int]:
    now, events = [0.0], []
    feed = PreviewFeed(CountingPreviewer(), events.append, every=every, clock=lambda: now[0])
    for step in range(1, total + 1):
        now[0] += step_s
        feed.step_done(step, total, lambda: latent(1, 2, 2, 16))
    assert all(event == PreviewReady(event.step, total, b"picture") for event in events)
    return [event.step for event in events]


@pytest.mark.parametrize(
    ("every", "step_s", "expected"),
    [
        (PreviewEvery(), 60.0, [1, 2, 3, 4, 5, 6, 7, 8]),
        (PreviewEvery(steps=3), 60.0, [1, 4, 7, 8]),
        (PreviewEvery(seconds=2.0), 1.0, [1, 3, 5, 7, 8]),
        (PreviewEvery(steps=3, seconds=100.0), 1.0, [1, 8]),
    ],
)
def test_previews_come_every_few_steps_and_seconds_and_after_the_last(every, step_s, expected):
    assert steps_with_previews(8, every, step_s) == expected


@pytest.mark.parametrize("total", [1, 2, 59, 60, 61, 118, 119, 1000])
def test_a_run_of_any_length_has_a_bounded_number_of_previews(total):
    steps = steps_with_previews(total, PreviewEvery(seconds=0.0), 1.0)
    assert len(steps) <= MAX_PREVIEWS
    assert steps[-1] == total


def test_no_estimate_is_made_when_no_preview_is_due():
    previewer, now = CountingPreviewer(), [0.0]
    every = PreviewEvery(seconds=10.0)
    feed = PreviewFeed(previewer, lambda event: None, every=every, clock=lambda: now[0])
    feed.step_done(1, 9, lambda: latent(1, 2, 2, 16))

    def not_wanted() -> torch.Tensor:
        raise AssertionError("an estimate was made for nothing")

    feed.step_done(2, 9, not_wanted)
    assert previewer.asked == 1


@pytest.mark.parametrize("values", [{"steps": 0}, {"seconds": -1.0}, {"seconds": math.nan}])
def test_a_pace_that_means_nothing_is_refused(values):
    with pytest.raises(ValueError):
        PreviewEvery(**values)


def test_the_published_vae_has_the_published_colours_and_an_unknown_one_none(tmp_path):
    assert colours_of(tmp_path, VideoVAEConfig()) == HUNYUAN_VIDEO_COLOURS
    assert colours_of(tmp_path, VideoVAEConfig(block_out_channels=(8, 8, 8, 8))) is None


def test_fitted_colours_count_before_the_published_ones(tmp_path):
    fitted = LatentColours(((0.5, 0.25, 0.125),) * 16, (0.0, 0.1, 0.2))
    write_colours(tmp_path / "preview.json", fitted, made_by="a test")
    assert colours_of(tmp_path, VideoVAEConfig()) == fitted


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 2}, "version 2"),
        ({"factors": [[1, 2, 3]]}, "1 channels, the latent has 2"),
        ({"factors": [[1, 2], [1, 2]]}, "three finite"),
        ({"factors": None}, "not usable"),
        ({"bias": [math.nan, 0, 0]}, "three finite"),
        ({"bias": "red"}, "not usable"),
    ],
)
def test_a_file_of_colours_that_cannot_be_used_is_refused(tmp_path, change, reason):
    values = {"version": 1, "factors": [[1, 2, 3], [4, 5, 6]], "bias": [0, 0, 0], **change}
    (tmp_path / "preview.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=reason):
        read_colours(tmp_path / "preview.json", channels=2)


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", "[" * 100_000])
def test_a_file_that_holds_no_colours_is_refused(tmp_path, text):
    (tmp_path / "preview.json").write_text(text)
    with pytest.raises(ValueError, match=r"preview\.json"):
        read_colours(tmp_path / "preview.json", channels=16)


def test_the_demo_s_vae_has_colours_of_its_own():
    config = VideoVAEConfig.from_dict(json.loads((DEMO_VAE / "config.json").read_text()))
    colours = colours_of(DEMO_VAE, config)
    assert colours is not None and colours != HUNYUAN_VIDEO_COLOURS
    assert colours.channels == config.latent_channels

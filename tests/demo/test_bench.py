"""The adherence benchmark, with a painter in the model's place that obeys, or does not."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from kandinsky5.demo.bench import demo_adherence, planned_pairs, read_clip
from kandinsky5.demo.scenes import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Scene, render
from kandinsky5.errors import UserError
from kandinsky5.request import GenerationRequest, GenerationResult

SEED = 500


class Painter:
    """Draws the scene behind a request's seed, as ``change`` would have it."""

    def __init__(self, pairs: int, change=lambda index, scene: scene) -> None:
        self.scenes = [pair.scene for pair in planned_pairs(pairs, SEED)]
        self.change = change
        self.requests: list[GenerationRequest] = []
        self.images: list[np.ndarray] = []

    def run(self, request: GenerationRequest, *, out: Path) -> GenerationResult:
        self.requests.append(request)
        if request.image:
            self.images.append(np.asarray(Image.open(request.image)))
        index = request.seed - SEED
        write_mp4(out, render(self.change(index, self.scenes[index]), 25, 64))
        return GenerationResult(
            str(out), 25, 64, 64, request.seed, 20, 40, 0, {"total": 0.0}, 0, 1_000_000 + index
        )


def write_mp4(path: Path, clip: np.ndarray) -> None:
    writer = imageio_ffmpeg.write_frames(
        str(path),
        clip.shape[2:0:-1],
        fps=24,
        quality=None,
        macro_block_size=None,
        output_params=["-crf", "16", "-threads", "1"],
    )
    writer.send(None)
    for frame in clip:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def test_a_painter_that_obeys_gets_full_marks(tmp_path: Path) -> None:
    painter = Painter(8)
    report = demo_adherence(pairs=8, seed=SEED, pipeline=painter, keep=tmp_path, steps=3)
    rates = [report[key] for key in ("colour", "direction", "shape", "background", "all_right")]
    assert rates == [1.0] * 5
    assert report["pairs"] == 8 and report["failures"] == []
    assert report["peak_rss_bytes"] == 1_000_007
    assert set(report["rates_by_word"].values()) == {1.0}
    assert "first_frame_psnr_db" not in report
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert {"hardware", "versions", "command", "seconds_per_clip"} <= set(report)
    assert {request.preset for request in painter.requests} == {"demo-t2v"}
    assert {request.steps for request in painter.requests} == {3}
    assert [request.seed for request in painter.requests] == list(range(SEED, SEED + 8))


def test_keeps_the_clips_and_a_contact_sheet_when_asked(tmp_path: Path) -> None:
    demo_adherence(pairs=5, seed=SEED, pipeline=Painter(5), keep=tmp_path / "new")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["000.mp4", "001.mp4", "002.mp4", "003.mp4", "004.mp4", "contact.png"]
    with Image.open(tmp_path / "new" / "contact.png") as sheet:
        assert sheet.width >= 4 * 3 * 64 and sheet.height >= 2 * 64


def test_each_wrong_word_is_counted_and_told() -> None:
    def disobey(index: int, scene: Scene) -> Scene:
        if index == 1:
            return replace(scene, colour=other(COLOURS, scene.colour))
        if index == 2:
            return replace(scene, shape=other(SHAPES, scene.shape))
        if index == 4:
            return replace(scene, shape=other(SHAPES, scene.shape), direction="still")
        return scene

    painter = Painter(6, disobey)
    assert painter.scenes[4].direction != "still"
    report = demo_adherence(pairs=6, seed=SEED, pipeline=painter)
    assert (report["colour"], report["shape"], report["direction"]) == (0.8333, 0.6667, 0.8333)
    assert report["all_right"] == 0.5
    assert [failure["clip"] for failure in report["failures"]] == [1, 2, 4]
    first = report["failures"][0]
    assert first["prompt"] == painter.requests[1].prompt and first["seed"] == SEED + 1
    assert first["expected"]["colour"] != first["observed"]["colour"]
    assert report["rates_by_word"][painter.scenes[1].colour] < 1.0


def other(table, word: str) -> str:
    return next(entry for entry in table if entry != word)


def test_image_to_video_gives_the_first_frame_and_compares_it() -> None:
    painter = Painter(3)
    report = demo_adherence(pairs=3, seed=SEED, mode="i2v", pipeline=painter)
    assert {request.preset for request in painter.requests} == {"demo-i2v"}
    for image, scene in zip(painter.images, painter.scenes, strict=True):
        assert np.array_equal(image, render(scene, 25, 64)[0])
    psnr = report["first_frame_psnr_db"]
    assert 25 < psnr["worst"] <= psnr["mean"] < 60
    assert not any(Path(request.image).exists() for request in painter.requests)


def test_a_first_frame_that_is_not_the_image_shows_in_the_numbers() -> None:
    shifted = Painter(2, lambda index, scene: replace(scene, start=(0.1, 0.1)))
    report = demo_adherence(pairs=2, seed=SEED, mode="i2v", pipeline=shifted)
    assert report["first_frame_psnr_db"]["mean"] < 20


def test_every_word_is_asked_about_equally_often() -> None:
    for count in (60, 77):
        scenes = [pair.scene for pair in planned_pairs(count, 20_000)]
        for kind, table in {
            "colour": COLOURS,
            "shape": SHAPES,
            "direction": DIRECTIONS,
            "background": BACKGROUNDS,
        }.items():
            counts = Counter(getattr(scene, kind) for scene in scenes)
            assert set(counts) == set(table)
            assert max(counts.values()) - min(counts.values()) <= 1


def test_questions_are_repeatable_and_change_with_the_seed() -> None:
    assert planned_pairs(20, 1) == planned_pairs(20, 1)
    assert len({pair.prompt for pair in planned_pairs(60, 1)}) > 50
    assert {p.prompt for p in planned_pairs(60, 1)} != {p.prompt for p in planned_pairs(60, 2)}


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    scene = planned_pairs(1, SEED)[0].scene
    clip = render(scene, 13, 64)
    write_mp4(tmp_path / "a.mp4", clip)
    frames = read_clip(tmp_path / "a.mp4")
    assert frames.shape == clip.shape and frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - clip).mean() < 3


@pytest.mark.parametrize("wrong", [{"mode": "t2i"}, {"pairs": 0}, {"steps": 0}])
def test_refuses_what_it_cannot_run(wrong: dict) -> None:
    with pytest.raises(UserError) as caught:
        demo_adherence(**{"pairs": 1, "seed": SEED, "pipeline": Painter(1), **wrong})
    assert caught.value.field == next(iter(wrong))

"""How often the built-in model paints what its prompt asks for, judged by the pixels of its videos.

Each clip goes the whole way of a job, from an unseen prompt to the mp4, and is read back from that
file: judged is what a person would see.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw

from kandinsky5.circumstances import circumstances
from kandinsky5.demo.adherence import (
    Observation,
    SceneWords,
    Verdict,
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
    describe,
    random_scene,
    render,
)
from kandinsky5.errors import UserError
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, GenerationResult

log = logging.getLogger(__name__)

MODES = ("t2v", "i2v")
_PSNR_OF_EQUAL_DB = 100.0  # JSON knows no infinity


class ClipMaker(Protocol):
    """What :class:`kandinsky5.pipeline.pipeline.Pipeline` offers, as far as it is used here."""

    def run(self, request: GenerationRequest, *, out: Path) -> GenerationResult: ...


@dataclass(frozen=True)
class Pair:
    """One question to the model: a scene, its caption and the seed of the noise."""

    scene: Scene
    prompt: str
    seed: int


@dataclass(frozen=True)
class Clip:
    """One answer: the frames, uint8 [T, H, W, 3], and what they were found to show."""

    pair: Pair
    frames: np.ndarray
    expected: SceneWords
    observed: Observation
    verdict: Verdict
    seconds: float
    peak_rss_bytes: int
    first_frame_psnr_db: float | None


def demo_adherence(
    *,
    pairs: int = 60,
    seed: int = 20_000,
    mode: str = "t2v",
    steps: int | None = None,
    keep: str | Path | None = None,
    pipeline: ClipMaker | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Render unseen prompt and seed pairs and tell how many words of the prompts the clips keep.

    Args:
        pairs: how many clips; colours, shapes, directions and backgrounds come evenly.
        seed: of the questions; clip ``i`` has the noise seed ``seed + i``.
        mode: "t2v", or "i2v" with the scene's first frame as the given image.
        steps: of the schedule; None for the preset's.
        keep: folder that keeps the mp4s and a contact sheet; None keeps nothing.
        pipeline: makes the clips; None for a new :class:`~kandinsky5.pipeline.pipeline.Pipeline`.
        overrides: further fields of :class:`~kandinsky5.request.GenerationRequest`.

    Returns:
        JSON-ready: ``pairs``; rates 0 … 1 ``colour``, ``direction``, ``shape``, and ``background``
        where the prompt names it; ``rates_by_word``; ``first_frame_psnr_db`` {mean, worst} for i2v;
        ``failures``; ``seconds_per_clip`` {first, mean, worst}, where mean and worst leave out the
        first clip, which loads the model; ``peak_rss_bytes``; ``hardware``; ``versions``;
        ``command``.

    Raises:
        UserError: a mode or number that cannot be used; and what the pipeline raises.
    """
    if mode not in MODES:
        raise UserError("mode", mode, f"one of {', '.join(MODES)}")
    if not 1 <= pairs <= 100_000:
        raise UserError("pairs", pairs, "a number from 1 to 100000")
    if pipeline is None:
        from kandinsky5.pipeline.pipeline import Pipeline

        pipeline = Pipeline()
    with tempfile.TemporaryDirectory(prefix="k1-adherence-") as scratch:
        folder = Path(scratch) if keep is None else Path(keep)
        folder.mkdir(parents=True, exist_ok=True)
        clips = []
        for index, pair in enumerate(planned_pairs(pairs, seed)):
            fields = {**overrides, "preset": f"demo-{mode}", "steps": steps}
            clip = _make(pipeline, pair, fields, folder / f"{index:03d}.mp4", Path(scratch))
            log.info("%d of %d: %s -> %s", index + 1, pairs, pair.prompt, clip.verdict)
            clips.append(clip)
        if keep is not None:
            contact_sheet(clips).save(folder / "contact.png")
    return {"benchmark": "demo-adherence", "mode": mode, **summary(clips), **circumstances()}


def planned_pairs(count: int, seed: int) -> list[Pair]:
    """The questions of a run: every word about equally often, drawn apart from training's."""
    order = random.Random(f"unseen/{seed}")
    columns = [_evenly(words, count, order) for words in (COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS)]
    questions = []
    for index, (colour, shape, direction, background) in enumerate(zip(*columns, strict=True)):
        rng = random.Random(f"unseen/{seed}/{index}")
        scene = random_scene(
            rng, colour=colour, shape=shape, direction=direction, background=background
        )
        questions.append(Pair(scene, describe(scene, rng), seed + index))
    return questions


def read_clip(path: Path) -> np.ndarray:
    """All frames of a video file, uint8 [T, H, W, 3]."""
    reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")
    try:
        width, height = next(reader)["size"]
        frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    finally:
        reader.close()
    return np.stack(frames)


def summary(clips: Sequence[Clip]) -> dict[str, Any]:
    """Rates, failures, times and, where an image was given, how well the first frame keeps it."""
    verdicts = [clip.verdict for clip in clips]
    named = [v.background for v in verdicts if v.background is not None]
    seconds = [clip.seconds for clip in clips]
    report: dict[str, Any] = {
        "pairs": len(clips),
        "colour": _rate([v.colour for v in verdicts]),
        "direction": _rate([v.direction for v in verdicts]),
        "shape": _rate([v.shape for v in verdicts]),
        "background": _rate(named),
        "all_right": _rate([v.all_right for v in verdicts]),
        "rates_by_word": _rates_by_word(clips),
        "failures": [
            _failure(index, clip) for index, clip in enumerate(clips) if not clip.verdict.all_right
        ],
        "seconds_per_clip": {
            "first": round(seconds[0], 2),
            "mean": round(float(np.mean(seconds[1:] or seconds)), 2),
            "worst": round(max(seconds[1:] or seconds), 2),
        },
        "peak_rss_bytes": max(clip.peak_rss_bytes for clip in clips),
    }
    ratios = [c.first_frame_psnr_db for c in clips if c.first_frame_psnr_db is not None]
    if ratios:
        report["first_frame_psnr_db"] = {
            "mean": round(float(np.mean(ratios)), 2),
            "worst": round(min(ratios), 2),
        }
    return report


def contact_sheet(clips: Sequence[Clip], columns: int = 4) -> Image.Image:
    """First, middle and last frame of every clip with the words asked for; failures on red."""
    frames, height, width = clips[0].frames.shape[:3]
    label_px, gap_px = 14, 4
    cell_width, cell_height = 3 * width + 2 * gap_px, height + label_px + gap_px
    rows = -(-len(clips) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    for index, clip in enumerate(clips):
        x, y = index % columns * cell_width, index // columns * cell_height
        if not clip.verdict.all_right:
            draw.rectangle((x, y, x + cell_width - 1, y + cell_height - 1), fill=(235, 60, 60))
        for place, frame in enumerate((0, frames // 2, frames - 1)):
            picture = Image.fromarray(clip.frames[min(frame, len(clip.frames) - 1)])
            sheet.paste(picture, (x + gap_px // 2 + place * (width + gap_px // 2), y + gap_px // 2))
        words = clip.expected
        label = f"{index} {words.colour} {words.shape} {words.direction} {words.background or ''}"
        draw.text((x + gap_px // 2, y + height + gap_px // 2), label, fill=(0, 0, 0))
    return sheet


def _make(
    pipeline: ClipMaker, pair: Pair, fields: dict[str, Any], out: Path, scratch: Path
) -> Clip:
    """Ask for one clip, read it back and judge it."""
    request, image = request_for(pair, fields, scratch)
    started = time.perf_counter()
    result = pipeline.run(request, out=out)
    seconds = time.perf_counter() - started
    frames = read_clip(Path(result.output))
    expected, observed = words_of(pair.scene, pair.prompt), measure(frames)
    psnr = None
    if image is not None:
        psnr = min(first_frame_psnr(frames, image), _PSNR_OF_EQUAL_DB)
    verdict = judge(expected, observed)
    return Clip(pair, frames, expected, observed, verdict, seconds, result.peak_rss_bytes, psnr)


def request_for(
    pair: Pair, fields: dict[str, Any], scratch: Path
) -> tuple[GenerationRequest, np.ndarray | None]:
    """The request for one clip, and the picture it begins with where the preset takes one.

    Args:
        fields: of the request; the preset among them.
        scratch: folder for that picture.
    """
    image = None
    if PRESETS[fields["preset"]].takes_image:
        side_px = fields.get("width") or PRESETS[fields["preset"]].sizes_px[0][0]
        image = render(pair.scene, 1, side_px)[0]
        image_path = scratch / "given.png"
        Image.fromarray(image).save(image_path)
        fields = {**fields, "image": str(image_path)}
    return GenerationRequest(prompt=pair.prompt, seed=pair.seed, **fields), image


def _evenly(words: Sequence[str] | dict[str, Any], count: int, order: random.Random) -> list[str]:
    """``count`` words, none more than once oftener than another, shuffled."""
    words = list(words)
    order.shuffle(words)
    drawn = (words * -(-count // len(words)))[:count]
    order.shuffle(drawn)
    return drawn


def _rate(right: Sequence[bool]) -> float | None:
    return round(sum(right) / len(right), 4) if right else None


def _rates_by_word(clips: Sequence[Clip]) -> dict[str, float]:
    """For each word of the vocabulary, how often it was kept when it was asked for."""
    kept: dict[str, list[bool]] = {}
    for clip in clips:
        for kind in ("colour", "shape", "direction", "background"):
            right = getattr(clip.verdict, kind)
            if right is not None:
                kept.setdefault(getattr(clip.expected, kind), []).append(right)
    return {word: round(sum(right) / len(right), 4) for word, right in sorted(kept.items())}


def _failure(index: int, clip: Clip) -> dict[str, Any]:
    return {
        "clip": index,
        "prompt": clip.pair.prompt,
        "seed": clip.pair.seed,
        "expected": dataclasses.asdict(clip.expected),
        "observed": dataclasses.asdict(clip.observed),
    }

"""How early the live preview of the built-in model shows the colour that was asked for."""

from __future__ import annotations

import io
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kandinsky5.circumstances import circumstances
from kandinsky5.demo.bench import MODES, Pair, planned_pairs, request_for
from kandinsky5.demo.colour import cielab
from kandinsky5.demo.scenes import COLOURS
from kandinsky5.errors import UserError
from kandinsky5.events import PipelineEvent, PreviewReady
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.pipeline.preview_pace import PreviewEvery

log = logging.getLogger(__name__)

FROM_SHARE = 0.3
"""Of the steps; from there on the colour shall be right."""
LEAST_CONTRAST = 15.0
"""Distance in CIELAB at which something stands out from the background at a glance."""
CORE_SHARE = 0.7
"""Of the greatest distance from the background; what is beyond it is the thing, not its blurred rim."""
HUES = tuple(word for word in COLOURS if word != "white")
LEAST_CHROMA, WHITE_LIGHTNESS = 20.0, 70.0
"""CIELAB: below the first there is no hue to speak of; a grey darker than the second is no white."""
BIG_PX = 128
"""Larger previews are looked at in every second pixel, and so on."""


@dataclass(frozen=True)
class Seen:
    """What the preview after a step showed: a word of :data:`~.scenes.COLOURS`, or None for nothing."""

    step: int
    colour: str | None


def demo_preview(
    *,
    runs: int = 60,
    mode: str = "t2v",
    seed: int = 20_000,
    steps: int | None = None,
    shift: float | None = None,
) -> dict[str, Any]:
    """Paint unseen prompts and look at every preview, decoded from the WebP that a person would see.

    Args:
        runs: how many; colours, shapes, directions and backgrounds come evenly.
        mode: "t2v" or "i2v".
        seed: of the questions, as for ``demo-adherence``.
        steps, shift: of the schedule; None for the preset's.

    Returns:
        JSON-ready: ``right_by_step``, the share of the runs whose preview after that step shows the colour
        asked for, for each step from 30 % of them on; ``worst_step``, the least of these;
        ``right_throughout``, the share of the runs that are right in all; ``failures`` at the first;
        ``largest_bytes`` of a preview.

    Raises:
        UserError: a mode or number that cannot be used.
    """
    if mode not in MODES:
        raise UserError("mode", mode, f"one of {', '.join(MODES)}")
    if not 1 <= runs <= 10_000:
        raise UserError("runs", runs, "a number from 1 to 10000")
    pipeline = Pipeline()
    fields = {"preset": f"demo-{mode}", "steps": steps, "shift": shift}
    pairs = planned_pairs(runs, seed)
    watched, largest = [], 0
    with tempfile.TemporaryDirectory(prefix="k1-preview-") as scratch:
        for pair in pairs:
            previews = _previews(pipeline, pair, fields, Path(scratch))
            largest = max(largest, *(len(preview.webp) for preview in previews))
            watched.append(
                [
                    Seen(preview.step, shape_colour(webp_frames(preview.webp)))
                    for preview in previews
                    if preview.step >= FROM_SHARE * preview.total
                ]
            )
            log.info("%s: %s", pair.prompt, [seen.colour for seen in watched[-1]])
    return {
        "benchmark": "demo-preview",
        "mode": mode,
        "runs": runs,
        **summary(pairs, watched),
        "largest_bytes": largest,
        **circumstances(),
    }


def summary(pairs: Sequence[Pair], watched: Sequence[Sequence[Seen]]) -> dict[str, Any]:
    """Rates by step and over all of them; what was seen instead at the first."""
    right = np.array(
        [
            [seen.colour == pair.scene.colour for seen in steps]
            for pair, steps in zip(pairs, watched, strict=True)
        ]
    )
    first = [steps[0] for steps in watched]
    wrong = Counter(
        f"{pair.scene.colour} on {pair.scene.background}: {seen.colour or 'nothing'}"
        for pair, seen in zip(pairs, first, strict=True)
        if seen.colour != pair.scene.colour
    )
    rates = [round(float(rate), 4) for rate in right.mean(axis=0)]
    return {
        "right_by_step": {
            str(seen.step): rate for seen, rate in zip(watched[0], rates, strict=True)
        },
        "worst_step": min(rates),
        "right_throughout": round(float(right.all(axis=1).mean()), 4),
        "failures": dict(wrong.most_common()),
    }


def webp_frames(webp: bytes) -> np.ndarray:
    """All frames of an animated WebP, uint8 [T, H, W, 3]."""
    with Image.open(io.BytesIO(webp)) as picture:
        frames = []
        for index in range(getattr(picture, "n_frames", 1)):
            picture.seek(index)
            frames.append(np.asarray(picture.convert("RGB")))
    return np.stack(frames)


def shape_colour(frames: np.ndarray) -> str | None:
    """The word for the colour of what stands out from the background, however blurred; None for nothing.

    Args:
        frames: uint8 [T, H, W, 3].

    Returns:
        The word of :data:`~.scenes.COLOURS` whose hue in CIELAB is nearest, for a pale red is no white;
        white where it has hardly a hue and is light.
    """
    step = max(1, max(frames.shape[1:3]) // BIG_PX)
    lab = cielab(frames[:, ::step, ::step].reshape(-1, 3).astype(np.float32))
    grid = lab.reshape(len(frames), *frames[0, ::step, ::step].shape)
    border = [grid[:, 0], grid[:, -1], grid[:, :, 0], grid[:, :, -1]]
    ground = np.median(np.concatenate(border, axis=1).reshape(-1, 3), axis=0)
    distance = np.sqrt(np.square(lab - ground).sum(axis=1))
    greatest = float(np.quantile(distance, 0.98))
    if not math.isfinite(greatest) or greatest < LEAST_CONTRAST:
        return None
    core = np.median(lab[distance > CORE_SHARE * greatest], axis=0)
    if math.hypot(core[1], core[2]) < LEAST_CHROMA:
        return "white" if core[0] >= WHITE_LIGHTNESS else None
    table = cielab(np.array([COLOURS[word] for word in HUES], np.float32))
    turns = np.angle(_hue(table) / _hue(core[None]))
    return HUES[int(np.abs(turns).argmin())]


def _hue(lab: np.ndarray) -> np.ndarray:
    """CIELAB [N, 3] → the plane of hues, complex [N]."""
    plane: np.ndarray = lab[:, 1] + 1j * lab[:, 2]
    return plane


def _previews(
    pipeline: Pipeline, pair: Pair, fields: dict[str, Any], scratch: Path
) -> list[PreviewReady]:
    """The preview after every step of a run."""
    previews: list[PreviewReady] = []

    def emit(event: PipelineEvent) -> None:
        if isinstance(event, PreviewReady):
            previews.append(event)

    request, _ = request_for(pair, fields, scratch)
    pipeline.run(request, out=scratch / "clip.mp4", emit=emit, previews=PreviewEvery(seconds=0.0))
    return previews

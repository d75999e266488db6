"""What a live preview costs: time and bytes of one picture of a whole video, at the sizes people paint."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F

from kandinsky5.circumstances import circumstances
from kandinsky5.errors import UserError
from kandinsky5.pipeline.preview import (
    HUNYUAN_VIDEO_COLOURS,
    MAX_PIXELS,
    LinearPreviewer,
    Previewer,
    preview_size,
)
from kandinsky5.presets import SPATIAL_COMPRESSION
from kandinsky5.request import LATENT_FRAMES_PER_SECOND

CHANNELS = 16
MOST_MS, MOST_BYTES = 60.0, 300_000
NOISES = (0.0, 0.3, 1.0)
"""Standard deviation of what is laid over the scene; the scene's own is 1. The last is worse than any clean
estimate: noise is what WebP compresses worst."""
WARM_UP = 3


def preview_cost(
    *, height: int = 512, width: int = 768, seconds: float = 5.0, runs: int = 30, seed: int = 0
) -> dict[str, Any]:
    """Make previews of random scenes and time them, wall and processor, with one person's patience as limit.

    Args:
        height, width: of the video in pixels, multiples of 16.
        seconds: of the video.
        runs: pictures of each kind; three more go before them.
        seed: of the scenes.

    Returns:
        JSON-ready: for each amount of noise ``wall_ms`` and ``cpu_ms`` (median, worst) and ``bytes``;
        ``reached``: median wall time and bytes of all kinds are within their limits.

    Raises:
        UserError: a number that cannot be used.
        RuntimeError: a picture has not the frames or the size it should have.
    """
    if not 1 <= runs <= 10_000:
        raise UserError("runs", runs, "a number from 1 to 10000")
    if min(height, width) < 16 or max(height, width) > 4096 or height % 16 or width % 16:
        raise UserError("size", f"{width}x{height}", "multiples of 16 up to 4096")
    if not 0 < seconds <= 60:
        raise UserError("seconds", seconds, "a number from 0 to 60")
    frames = round(seconds * LATENT_FRAMES_PER_SECOND) + 1
    shape = (frames, height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION)
    generator = torch.Generator().manual_seed(seed)
    previewer = LinearPreviewer(HUNYUAN_VIDEO_COLOURS)
    cases: list[dict[str, Any]] = []
    for noise in NOISES:
        clean = scene(shape, noise, generator)
        _check(previewer.picture(clean), shape)
        cases.append({"noise": noise, **_timed(previewer, clean, runs)})
    return {
        "benchmark": "preview-cost",
        "latent": [*shape, CHANNELS],
        "threads": torch.get_num_threads(),
        "runs": runs,
        "cases": cases,
        "limits": {"wall_ms": MOST_MS, "bytes": MOST_BYTES},
        "reached": {
            "wall_ms": all(case["wall_ms"]["median"] <= MOST_MS for case in cases),
            "bytes": all(case["bytes"] <= MOST_BYTES for case in cases),
        },
        **circumstances(),
    }


def scene(shape: tuple[int, int, int], noise: float, generator: torch.Generator) -> torch.Tensor:
    """Smooth in time and space with noise over it: [T, H, W, 16] float32."""
    coarse = torch.randn(1, CHANNELS, *(max(2, side // 8) for side in shape), generator=generator)
    # Corners meet, so that no two frames are the same: WebP would make one of them.
    smooth = F.interpolate(coarse, shape, mode="trilinear", align_corners=True)[0]
    smooth = smooth.permute(1, 2, 3, 0)
    smooth = smooth / smooth.std()
    return smooth + noise * torch.randn(*shape, CHANNELS, generator=generator)


def _timed(previewer: Previewer, clean: torch.Tensor, runs: int) -> dict[str, Any]:
    walls, processor, size = [], [], 0
    for run in range(WARM_UP + runs):
        began, used = time.perf_counter(), time.process_time()
        size = len(previewer.picture(clean))
        if run >= WARM_UP:
            walls.append(1e3 * (time.perf_counter() - began))
            processor.append(1e3 * (time.process_time() - used))
    return {
        "wall_ms": _spread(walls),
        "cpu_ms": _spread(processor),
        "bytes": size,
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 1), "worst": round(max(values), 1)}


def _check(webp: bytes, shape: tuple[int, int, int]) -> None:
    """Count what stands in the file: WebP's chunk ``VP8X`` has the size less one, an ``ANMF`` is a frame."""
    height, width = (1 + int.from_bytes(webp[at : at + 3], "little") for at in (27, 24))
    found = (webp.count(b"ANMF"), height, width)
    wanted = (shape[0], *preview_size(*shape, MAX_PIXELS))
    if found != wanted:
        raise RuntimeError(f"a preview of {found} frames, height, width where {wanted} were due")

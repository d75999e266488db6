"""Decoding within a limit of memory that is kept: each rung of the ladder ends with the same frames."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_runs import frames_of, quick

from kandinsky5.demo.scenes import random_scene, render
from kandinsky5.events import ignore
from kandinsky5.memory.plan import lowered
from kandinsky5.model.bench import LiveBytes
from kandinsky5.model.loading import load_video_vae
from kandinsky5.model.vae import VideoVAE
from kandinsky5.output.state import save_latents
from kandinsky5.pipeline import pipeline as pipeline_module
from kandinsky5.pipeline.accept import accept_latents
from kandinsky5.pipeline.codec import decoded
from kandinsky5.pipeline.job import Listeners
from kandinsky5.pipeline.models import Models
from kandinsky5.pipeline.pipeline import Pipeline
from vae_tiling import TilePlan

DEMO_VAE = Path(__file__).resolve().parents[2] / "kandinsky5/demo/model/vae"
CPU = torch.device("cpu")
WIDTH, HEIGHT, FRAMES = 256, 64, 5
REQUEST = quick(
    width=WIDTH, height=HEIGHT, seconds=FRAMES / 24, seed=1, prompt="x", vae_tiling="auto", crf=0
)


class Limited(LiveBytes):
    """As much memory as a limit says."""

    def __init__(self, vae: torch.nn.Module, limit_bytes: float) -> None:
        super().__init__(vae)
        self._limit_bytes = limit_bytes

    def __torch_dispatch__(self, *arguments: Any, **options: Any) -> Any:
        result = super().__torch_dispatch__(*arguments, **options)
        if self.now_bytes > self._limit_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    return load_video_vae(DEMO_VAE, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def latents(vae: VideoVAE) -> torch.Tensor:
    """Of a shape that stands still: [t, h, w, C], scaled."""
    drawn = render(random_scene(random.Random(3), direction="still"), FRAMES, WIDTH)
    top = (WIDTH - HEIGHT) // 2
    frames = torch.from_numpy(drawn[:, top : top + HEIGHT]).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.inference_mode():
        return vae.encode(frames)[0][0].permute(1, 2, 3, 0) * vae.config.scaling_factor


@pytest.fixture(scope="module")
def whole(vae: VideoVAE, latents: torch.Tensor) -> np.ndarray:
    """The untiled decode, uint8."""
    z = (latents / vae.config.scaling_factor).permute(3, 0, 1, 2)[None]
    with torch.inference_mode():
        pixels = vae.decode(z)[0].permute(1, 2, 3, 0)
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def rungs(tmp_path_factory: pytest.TempPathFactory, latents: torch.Tensor) -> list[TilePlan]:
    """All ways down from the plan of a machine with plenty of memory."""
    folder = tmp_path_factory.mktemp("rungs")
    listeners = Listeners(ignore, lambda: False)
    plan = accept_latents(REQUEST, listeners, out=folder / "out.mp4", models_dirs=()).plan
    tiles = []
    while plan is not None:
        if not tiles or tiles[-1] != plan.decode_tiles:
            tiles.append(plan.decode_tiles)
        plan = lowered(plan, "decode")
    return tiles


@pytest.fixture(scope="module")
def ways(
    vae: VideoVAE, latents: torch.Tensor, rungs: list[TilePlan]
) -> list[tuple[np.ndarray, int]]:
    """Frames and most bytes alive of every rung."""
    done = []
    for plan in rungs:
        with Limited(vae, float("inf")) as memory:
            frames = np.concatenate(list(decoded(vae, latents, plan, device=CPU)))
        done.append((frames, memory.peak_bytes))
    return done


def test_the_ladder_goes_from_all_at_once_over_one_tile_to_ever_smaller_ones(rungs) -> None:
    assert [(rung.at_once, rung.tiles) for rung in rungs] == [
        (True, 1),
        (False, 1),
        (False, 2),
        (False, 3),
    ]


@pytest.mark.parametrize("rung", range(4))
def test_every_rung_gives_the_untiled_frames_within_a_level(ways, whole, rung) -> None:
    frames, _ = ways[rung]
    assert frames.shape == whole.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert np.abs(frames.astype(int) - whole.astype(int)).max() <= 1


@pytest.mark.parametrize("rung", [0, 1, 2, 4], ids=["at once", "one tile", "tiles", "the CPU"])
def test_a_limit_leads_to_the_first_rung_that_keeps_it(
    tmp_path, monkeypatch, latents, rungs, ways, whole, rung
) -> None:
    """A card that has just what this rung needs; with less than all need it is the CPU."""
    peaks = [peak for _, peak in ways]
    limit_bytes = min(peaks) / 2 if rung >= len(rungs) else peaks[rung]
    first = next((i for i, peak in enumerate(peaks) if peak <= limit_bytes), None)
    assert first == (rung if rung < len(rungs) else None), peaks
    save_latents(tmp_path / "latents.safetensors", latents, REQUEST)
    kept = (tmp_path / "latents.safetensors").read_bytes()
    tried: list[tuple[str, TilePlan]] = []
    paint = pipeline_module.paint

    def painted(job, given, z, device, metadata):
        tried.append((device.type, job.plan.decode_tiles))
        if device.type != "cuda":
            return paint(job, given, z, device, metadata)
        with Limited(given, limit_bytes):
            return paint(job, given, z, CPU, metadata)

    accepted = accept_latents

    def on_a_card(*arguments, **options):
        job = accepted(*arguments, **options)
        job.device = torch.device("cuda")
        return job

    monkeypatch.setattr(pipeline_module, "paint", painted)
    monkeypatch.setattr(pipeline_module, "accept_latents", on_a_card)
    vae_of = Models.vae
    monkeypatch.setattr(
        Models, "vae", lambda models, job, *where: vae_of(models, job, CPU, torch.float32)
    )
    monkeypatch.setattr(Models, "make_room", lambda models, job: None)
    out = tmp_path / "out.mp4"
    result = Pipeline().decode(tmp_path / "latents.safetensors", out=out)
    assert (result.frames, result.width, result.height) == (FRAMES, WIDTH, HEIGHT)
    assert frames_of(out).shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert np.abs(frames_of(out).astype(int) - whole).mean() < 2  # the video file is lossy
    on_card = [plan for device, plan in tried if device == "cuda"]
    assert [plan for i, plan in enumerate(on_card) if i == 0 or plan != on_card[i - 1]] == rungs[
        : min(rung + 1, 3)
    ]
    assert (tried[-1][0] == "cpu") == (rung >= len(rungs))
    assert (tmp_path / "latents.safetensors").read_bytes() == kept

"""Which previewer a VAE gets, and that a preview stays cheap and harms no run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from kandinsky5.model.tiny_decoder import TinyDecoder, load_tiny_decoder, work_macs
from kandinsky5.model.vae import VideoVAEConfig
from kandinsky5.pipeline import tiny_preview
from kandinsky5.pipeline.preview import LinearPreviewer
from kandinsky5.pipeline.tiny_preview import (
    DECODER_FILE,
    MAX_MACS,
    TinyPreviewer,
    affordable_levels,
    choose_previewer,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEMO_VAE = Path(__file__).resolve().parents[2] / "kandinsky5" / "demo" / "model" / "vae"
PUBLISHED_WIDTHS = (256, 128, 64, 64)
SMALL = VideoVAEConfig(block_out_channels=(16, 32, 64, 64))


def put_decoder(path: Path, channels: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(TinyDecoder(channels, (4, 4, 4, 4)).state_dict(), path)


class Other:
    def picture(self, clean: torch.Tensor) -> bytes:
        return b"the other way"


def test_the_published_vae_gets_linear_previews_and_an_unknown_one_none(tmp_path):
    previewer, notice = choose_previewer(tmp_path, VideoVAEConfig(), device=CPU)
    assert isinstance(previewer, LinearPreviewer) and notice is None
    assert choose_previewer(tmp_path, SMALL, device=CPU) == (None, None)


def test_a_decoder_in_the_vae_s_folder_is_used(tmp_path):
    put_decoder(tmp_path / DECODER_FILE)
    previewer, notice = choose_previewer(tmp_path, SMALL, device=CPU)
    assert isinstance(previewer, TinyPreviewer) and notice is None
    with Image.open(io.BytesIO(previewer.picture(torch.randn(3, 8, 8, 16)))) as picture:
        assert (picture.format, picture.size) == ("WEBP", (64, 64))


def test_a_published_decoder_is_only_for_its_own_latents_and_for_a_gpu(tmp_path, monkeypatch):
    models = tmp_path / "models"
    put_decoder(models / "vae_approx" / "taehv.safetensors")
    loaded = []
    monkeypatch.setattr(
        tiny_preview,
        "load_tiny_decoder",
        lambda path, *, channels, device: (
            loaded.append(path) or load_tiny_decoder(path, channels=channels, device=CPU)
        ),
    )
    options = {"models_dirs": [models]}
    assert isinstance(
        choose_previewer(tmp_path, VideoVAEConfig(), device=CPU, **options)[0], LinearPreviewer
    )
    assert choose_previewer(tmp_path, SMALL, device=GPU, **options)[0] is None
    assert loaded == []
    assert isinstance(
        choose_previewer(tmp_path, VideoVAEConfig(), device=GPU, **options)[0], TinyPreviewer
    )
    assert loaded == [models / "vae_approx" / "taehv.safetensors"]


def test_a_decoder_that_cannot_be_used_is_told_and_the_linear_way_taken(tmp_path):
    put_decoder(tmp_path / DECODER_FILE, channels=48)
    previewer, notice = choose_previewer(tmp_path, VideoVAEConfig(), device=CPU)
    assert isinstance(previewer, LinearPreviewer)
    assert notice is not None and "for 48 channels" in notice


def test_colours_that_cannot_be_used_are_told(tmp_path):
    (tmp_path / "preview.json").write_text("{}")
    previewer, notice = choose_previewer(tmp_path, VideoVAEConfig(), device=CPU)
    assert isinstance(previewer, LinearPreviewer) and "preview.json" in (notice or "")


def test_what_a_machine_cannot_afford_is_not_decoded():
    five_seconds = (31, 64, 96)
    assert affordable_levels(PUBLISHED_WIDTHS, five_seconds, MAX_MACS["cpu"]) is None
    levels = affordable_levels(PUBLISHED_WIDTHS, five_seconds, MAX_MACS["cuda"])
    assert levels is not None
    assert work_macs(PUBLISHED_WIDTHS, *five_seconds, levels) <= MAX_MACS["cuda"]
    slow = TinyPreviewer(TinyDecoder(16, (4, 4, 4, 4)), Other())
    assert slow.picture(torch.zeros(1, 2000, 2000, 16)) == b"the other way"


def test_without_memory_it_falls_back_for_good():
    class Greedy(TinyDecoder):
        asked = 0

        def forward(self, latents: torch.Tensor, levels: int = 3) -> torch.Tensor:
            Greedy.asked += 1
            raise torch.OutOfMemoryError("none left")

    previewer = TinyPreviewer(Greedy(16, (4, 4, 4, 4)), Other())
    for _ in range(2):
        assert previewer.picture(torch.zeros(2, 4, 4, 16)) == b"the other way"
    assert Greedy.asked == 1
    assert TinyPreviewer(Greedy(16, (4, 4, 4, 4)), None).picture(torch.zeros(2, 4, 4, 16)) == b""


def test_the_demo_s_preview_shows_the_colours_of_its_own_decodes():
    from kandinsky5.demo.scenes import COLOURS, Scene, render
    from kandinsky5.model.loading import load_video_vae

    config = VideoVAEConfig.from_dict(json.loads((DEMO_VAE / "config.json").read_text()))
    previewer, notice = choose_previewer(DEMO_VAE, config, device=CPU)
    assert isinstance(previewer, TinyPreviewer) and notice is None
    vae = load_video_vae(DEMO_VAE, device=CPU, dtype=torch.float32)
    for colour in ("red", "blue", "yellow"):
        frames = render(Scene(colour, "circle", "still", "dark", 0.18, (0.5, 0.5), 0.0), 5, 64)
        video = (torch.from_numpy(frames).float() / 127.5 - 1).permute(3, 0, 1, 2)[None]
        with torch.inference_mode():
            clean = vae.encode(video)[0][0] * config.scaling_factor
        with Image.open(io.BytesIO(previewer.picture(clean.permute(1, 2, 3, 0)))) as picture:
            seen = np.asarray(picture.convert("RGB"))[28:36, 28:36].reshape(-1, 3).mean(0)
        nearest = min(COLOURS, key=lambda name: float(np.abs(seen - COLOURS[name]).sum()))
        assert nearest == colour, f"{colour} looks like {seen}"

"""Train the built-in demo model: a video VAE, then a diffusion transformer, on shapes drawn here.

    python tools/train_demo.py --work DIR            # all stages, each resuming where it stopped
    python tools/train_demo.py --work DIR --stage vae-frames

Stages: ``vae-frames`` (single pictures), ``vae-clips`` (moving ones), ``text`` (random text towers with
their tokenizers), ``latents`` (the training set, encoded), ``dit``, ``export`` (into kandinsky5/demo).
Everything is drawn from --seed; a stage killed at any moment goes on from its last saved state. Uses a GPU
when there is one.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kandinsky5.demo.scenes import BACKGROUNDS, Scene, random_scene, render  # noqa: E402
from kandinsky5.model.vae import VideoVAE, VideoVAEConfig  # noqa: E402

log = logging.getLogger("train_demo")

SIZE_PX = 64
FRAMES = 25
VAE_CONFIG = VideoVAEConfig(
    block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8, scaling_factor=1.0
)


@dataclass(frozen=True)
class Stage:
    """How long a stage trains and how fast it learns."""

    name: str
    steps: int
    batch: int
    learning_rate: float
    warmup: int = 100


VAE_FRAMES = Stage("vae-frames", steps=3600, batch=8, learning_rate=5e-4)
VAE_CLIPS = Stage("vae-clips", steps=1400, batch=2, learning_rate=4e-4)


class Run:
    """A model in training: its optimiser, its place in the schedule and its saved state."""

    def __init__(self, stage: Stage, model: torch.nn.Module, folder: Path, device: str) -> None:
        self.stage, self.model, self.device = stage, model, device
        self.path = folder / f"{stage.name}.pt"
        self.optimiser = torch.optim.AdamW(
            model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
        )
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.step = 0
        if self.path.exists():
            state = torch.load(self.path, map_location=device, weights_only=True)
            model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.average, self.step = state["average"], state["step"]

    def train(self, loss_of: Callable[[int], torch.Tensor], *, save_every: int = 200) -> None:
        """Run the steps that are left; ``loss_of(step)`` gives the loss of that step's own batch."""
        shown, started = 0.0, time.monotonic()
        while self.step < self.stage.steps:
            for group in self.optimiser.param_groups:
                group["lr"] = self.stage.learning_rate * self._rate()
            loss = loss_of(self.step)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            decay = min(0.999, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    self.average[name].lerp_(p, 1 - decay)
            self.step += 1
            shown += loss.item()
            if self.step % 50 == 0:
                rate = (time.monotonic() - started) / 50
                log.info("%s %d loss %.5f, %.2f s a step", self.stage.name, self.step, shown / 50, rate)
                shown, started = 0.0, time.monotonic()
            if self.step % save_every == 0 or self.step == self.stage.steps:
                self.save()

    def save(self) -> None:
        """Write the whole state under a temporary name, then rename."""
        temporary = self.path.with_suffix(".tmp")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "average": self.average,
                "step": self.step,
            },
            temporary,
        )
        temporary.replace(self.path)

    def averaged(self) -> torch.nn.Module:
        """The model with its exponentially averaged weights."""
        self.model.load_state_dict(self.average)
        return self.model

    def _rate(self) -> float:
        warm = min(1.0, (self.step + 1) / self.stage.warmup)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / self.stage.steps)))


def scenes_of_step(seed: int, stage: str, step: int, count: int) -> Iterator[tuple[Scene, random.Random]]:
    """The scenes of one training step, the same whenever it is run."""
    rng = random.Random(f"{seed}/{stage}/{step}")
    for _ in range(count):
        yield random_scene(rng), rng


def video_tensor(frames: np.ndarray, device: str) -> torch.Tensor:
    """uint8 [..., T, H, W, 3] → float32 [..., 3, T, H, W] in [−1, 1]."""
    pixels = torch.from_numpy(frames).to(device).float() / 127.5 - 1.0
    return pixels.movedim(-1, -4)


def shape_weight(video: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
    """Weights [B, 1, T, H, W] that make a pixel of the shape count five times one of the background."""
    backgrounds = torch.tensor([BACKGROUNDS[s.background] for s in scenes], device=video.device)
    backgrounds = (backgrounds / 127.5 - 1.0).view(-1, 3, 1, 1, 1)
    return 1.0 + 4.0 * ((video - backgrounds).abs().amax(1, keepdim=True) > 0.06)


def vae_loss(
    vae: VideoVAE, video: torch.Tensor, weight: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Weighted L1 + squared error of the reconstruction, a little KL, a little latent noise."""
    mean, logvar = vae.encode(video)
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    latent = mean + (torch.exp(0.5 * logvar) + 0.05 * mean.detach().std()) * noise
    if latent.shape[2] > 1 and torch.rand((), generator=generator) < 0.5:
        latent = jolted(latent, generator)
    error = vae.decode(latent) - video
    return ((error.abs() + 2.0 * error.square()) * weight).sum() / weight.sum() / 3 + 2e-5 * kl


def jolted(latent: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Latents with their first frames' mean and spread moved a little, as image-to-video runs do at their end."""
    scale = latent.detach().std()
    first = torch.arange(latent.shape[2], device=latent.device).view(1, 1, -1, 1, 1) < 4
    gain, offset = torch.rand(2, generator=generator).tolist()
    centre = latent.mean(dim=(1, 3, 4), keepdim=True)
    moved = (latent - centre) * (0.9 + 0.3 * gain) + centre + scale * (0.15 * offset - 0.05)
    return torch.where(first, moved, latent)


def train_vae(stage: Stage, frames: int, run: Run, seed: int) -> None:
    """Train ``run.model`` on pictures (frames = 1) or on windows of clips at real speed."""
    generator = torch.Generator()

    def loss_of(step: int) -> torch.Tensor:
        scenes, videos = [], []
        for scene, rng in scenes_of_step(seed, stage.name, step, stage.batch):
            first = rng.randrange(FRAMES - frames + 1)
            scenes.append(scene)
            videos.append(render(scene, FRAMES, SIZE_PX)[first : first + frames])
        video = video_tensor(np.stack(videos), run.device)
        generator.manual_seed(seed * 1_000_003 + step)
        with torch.autocast(run.device, torch.bfloat16):
            return vae_loss(run.model, video, shape_weight(video, scenes), generator)

    run.train(loss_of)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [−1, 1]."""
    return -10.0 * math.log10(F.mse_loss(a.clamp(-1, 1), b).item() / 4.0)


def load_vae(folder: Path, device: str, seed: int) -> VideoVAE:
    """The VAE after both of its stages, trained as far as is missing."""
    torch.manual_seed(seed)
    vae = VideoVAE(VAE_CONFIG).to(device)
    frames = Run(VAE_FRAMES, vae, folder, device)
    train_vae(VAE_FRAMES, 1, frames, seed)
    frames.averaged()
    clips = Run(VAE_CLIPS, vae, folder, device)
    train_vae(VAE_CLIPS, 13, clips, seed)
    return clips.averaged().eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the saved states")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.work.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = load_vae(args.work, device, args.seed)
    rng = random.Random("check")
    videos = [render(random_scene(rng), FRAMES, SIZE_PX) for _ in range(8)]
    with torch.no_grad():
        scores = []
        for video in videos:
            truth = video_tensor(video, device)[None]
            scores.append(psnr(vae.decode(vae.encode(truth)[0]), truth))
    log.info("VAE reconstruction %.1f dB (worst %.1f)", sum(scores) / 8, min(scores))


if __name__ == "__main__":
    main()

"""The demo's VAE: single pictures first, then windows of clips at real speed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_run import FRAMES, SIZE_PX, Run, Stage, scenes_of_step

from kandinsky5.demo.scenes import BACKGROUNDS, Scene, render
from kandinsky5.model.vae import CausalConv3d, VideoVAE, VideoVAEConfig

VAE_CONFIG = VideoVAEConfig(
    block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8, scaling_factor=1.0
)
VAE_FRAMES = Stage("vae-frames", steps=3600, batch=8, learning_rate=5e-4)
VAE_CLIPS = Stage("vae-clips", steps=600, batch=3, learning_rate=1.5e-4)
CLIP_FRAMES = 9
LATENT_NOISE = 0.08
"""Share of the latents' own spread: what the transformer will leave of its error must not show."""


def trained_vae(folder: Path, device: str, seed: int) -> VideoVAE:
    """The VAE after both of its stages, trained as far as is missing."""
    torch.manual_seed(seed)
    vae = VideoVAE(VAE_CONFIG).to(device)
    frames = Run(VAE_FRAMES, vae, folder, device)
    train_vae(VAE_FRAMES, 1, frames, seed)
    frames.averaged()
    see_one_frame_only(vae)
    clips = Run(VAE_CLIPS, vae, folder, device)
    train_vae(VAE_CLIPS, CLIP_FRAMES, clips, seed)
    return clips.averaged().eval()


@torch.no_grad()
def see_one_frame_only(vae: VideoVAE) -> None:
    """Gather each temporal kernel on its last tap.

    Single pictures teach only the sum of a kernel's three taps. All of it on the present frame makes every
    frame as good as a single picture, and motion within a latent frame is what is left to learn.
    """
    for module in vae.modules():
        if isinstance(module, CausalConv3d):
            weight = module.conv.weight
            weight[:, :, -1] = weight.sum(dim=2)
            weight[:, :, :-1] = 0.0


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
    latent = mean + (torch.exp(0.5 * logvar) + LATENT_NOISE * mean.detach().std()) * noise
    error = vae.decode(latent) - video
    return ((error.abs() + 2.0 * error.square()) * weight).sum() / weight.sum() / 3 + 2e-5 * kl


def train_vae(stage: Stage, frames: int, run: Run[VideoVAE], seed: int) -> None:
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

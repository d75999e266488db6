"""Train the preview's tiny decoder for a VAE whose colours no linear map can read.

    python tools/fit_tiny_preview.py --vae kandinsky5/demo/model/vae

It learns from the VAE's own decodes of the demo's scenes and of blends of two of them: an unfinished estimate
is a mean over what the video may still become, red or green say. Noise on the latents makes it cope with the
rest. The result goes to ``preview/tiny_decoder.safetensors`` in the VAE's folder, where the pipeline looks.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fit_preview import FRAMES, TEMPORAL, as_clip, clips_of

from kandinsky5.demo.scenes import BACKGROUNDS, COLOURS, random_scene, render
from kandinsky5.model.loading import load_video_vae
from kandinsky5.model.tiny_decoder import TinyDecoder, load_tiny_decoder
from kandinsky5.model.vae import VideoVAE
from kandinsky5.pipeline.tiny_preview import DECODER_FILE

log = logging.getLogger("fit_tiny_preview")

WIDTHS = (32, 24, 16, 12)
BATCH = 4
LATENT_NOISE = 0.15
"""Standard deviation at most; a scaled latent has about 1."""
COLOUR_BLENDS = 0.8
"""Share of the blends in which the shapes differ; in the others the backgrounds do."""
PLAIN_DISTANCE = 0.15
SHAPE_WEIGHT = 4.0
"""A pixel of the shape counts so many times more than one of the background."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--vae", type=Path, required=True, help="folder with config and weights")
    parser.add_argument("--scenes", type=int, default=160, help="clips of the demo's scenes")
    parser.add_argument("--blends", type=int, default=160, help="and blends of two of them")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--start", type=Path, help="go on from this decoder instead of anew")
    parser.add_argument("--size-px", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    vae = load_video_vae(options.vae, device=torch.device("cpu"), dtype=torch.float32)
    clips = clips_of(options.scenes, 0, size_px=options.size_px, seed=options.seed)
    samples = [sample_of(vae, clip) for clip in clips]
    samples += blends_of(vae, options.blends, size_px=options.size_px, seed=options.seed)
    log.info("%d clips encoded and decoded", len(samples))
    torch.manual_seed(options.seed)
    if options.start is None:
        model = TinyDecoder(vae.config.latent_channels, WIDTHS)
    else:
        model = load_tiny_decoder(
            options.start, channels=vae.config.latent_channels, device=torch.device("cpu")
        ).float()
        model.requires_grad_(True)
    train(model, samples, options.steps, options.seed, options.learning_rate)
    path = options.vae / DECODER_FILE
    path.parent.mkdir(exist_ok=True)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, path, {"made_by": "tools/fit_tiny_preview.py"})
    path.chmod(0o644)  # safetensors writes for the owner alone
    log.info("%s: %d bytes", path, path.stat().st_size)


@torch.inference_mode()
def sample_of(vae: VideoVAE, clip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scaled latents [T, H, W, C], the last of the frames each stands for [T, 3, 8H, 8W] in 0 … 1)."""
    mean, _ = vae.encode(clip)
    return decoded(vae, mean)


@torch.inference_mode()
def blends_of(
    vae: VideoVAE, count: int, *, size_px: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Samples as of :func:`sample_of`, of latents in between those of two scenes that differ in a word."""
    rng = random.Random(f"blends/{seed}")
    for _ in range(count):
        scene = random_scene(rng)
        if rng.random() < COLOUR_BLENDS:
            colour = rng.choice([word for word in COLOURS if word != scene.colour])
            other = dataclasses.replace(scene, colour=colour)
        else:
            background = rng.choice([word for word in BACKGROUNDS if word != scene.background])
            other = dataclasses.replace(scene, background=background)
        mean, end = (
            vae.encode(as_clip(render(each, FRAMES, size_px)))[0] for each in (scene, other)
        )
        yield decoded(vae, torch.lerp(mean, end, rng.random()))


def decoded(vae: VideoVAE, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`sample_of`, of an unscaled latent [1, C, T, H, W]."""
    frames = vae.decode(mean)[0].float().clamp(-1.0, 1.0)
    pixels = (frames[:, ::TEMPORAL] + 1.0) / 2.0
    return (mean[0] * vae.config.scaling_factor).permute(1, 2, 3, 0), pixels.permute(1, 0, 2, 3)


def train(
    model: TinyDecoder,
    samples: list[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    seed: int,
    learning_rate: float,
) -> None:
    """Adam with a cosine schedule on L1 plus squared error."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
    shown = 0.0
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.randint(len(samples), (BATCH,), generator=generator).tolist()
        losses = [loss_of(model, samples[index], generator) for index in chosen]
        loss = torch.stack(losses).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        shown += loss.item()
        if (step + 1) % 50 == 0:
            log.info("step %d loss %.4f", step + 1, shown / 50)
            shown = 0.0


def loss_of(
    model: TinyDecoder, sample: tuple[torch.Tensor, torch.Tensor], generator: torch.Generator
) -> torch.Tensor:
    """Weighted L1 + 2·squared error of one clip (latents, pixels)."""
    latents, pixels = sample
    strength = LATENT_NOISE * torch.rand(1, generator=generator)
    noisy = latents + strength * torch.randn(latents.shape, generator=generator)
    border = torch.cat([pixels[:, :, 0], pixels[:, :, -1]], dim=-1)
    plain = border.median(dim=-1).values[..., None, None]
    weight = 1.0 + SHAPE_WEIGHT * ((pixels - plain).abs().amax(1, keepdim=True) > PLAIN_DISTANCE)
    error = model(noisy).permute(0, 3, 1, 2) - pixels
    return ((error.abs() + 2.0 * error.square()) * weight).sum() / weight.sum() / 3.0


if __name__ == "__main__":
    main()

"""Fit the live preview's colours to a VAE: least squares from its latents to its own decoded pixels.

    python tools/fit_preview.py --vae kandinsky5/demo/model/vae --scenes 192 --fields 0
    python tools/fit_preview.py --vae models/Kandinsky-5.0-T2V-Lite/vae --scenes 0 --fields 48 --size-px 128

The result goes to ``preview.json`` in the VAE's folder, where the pipeline looks for it. Clips are the demo's
scenes or fields of smooth random colours; their colours are not compared with the originals but with what
the VAE makes of them, since that is what the user will see.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kandinsky5.demo.scenes import random_scene, render
from kandinsky5.model.loading import load_video_vae
from kandinsky5.model.vae import VideoVAE
from kandinsky5.pipeline.preview import COLOURS_FILE, LatentColours, write_colours

log = logging.getLogger("fit_preview")

FRAMES = 25
TEMPORAL, SPATIAL = 4, 8
RIDGE = 1e-3
"""Times the number of samples: keeps factors small along directions that the clips hardly use, where an
unfinished estimate would otherwise turn into noise."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--vae", type=Path, required=True, help="folder with config and weights")
    parser.add_argument("--scenes", type=int, default=192, help="clips of the demo's scenes")
    parser.add_argument("--fields", type=int, default=0, help="clips of smooth random colours")
    parser.add_argument("--size-px", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device(options.device)
    vae = load_video_vae(options.vae, device=device, dtype=torch.float32)
    clips = clips_of(options.scenes, options.fields, size_px=options.size_px, seed=options.seed)
    fit = ColourFit(vae.config.latent_channels)
    for index, clip in enumerate(clips, start=1):
        fit.add(*samples_of(vae, clip.to(device)))
        if index % 24 == 0:
            log.info("%d clips", index)
    colours, explained = fit.solve()
    write_colours(
        options.vae / COLOURS_FILE,
        colours,
        made_by="tools/fit_preview.py",
        clips={"scenes": options.scenes, "fields": options.fields, "size_px": options.size_px},
        seed=options.seed,
        explained_variance=[round(share, 5) for share in explained],
    )
    log.info("explained variance of red, green, blue: %s", [f"{x:.4f}" for x in explained])


def clips_of(scenes: int, fields: int, *, size_px: int, seed: int) -> Iterator[torch.Tensor]:
    """Clips, float32 [1, 3, FRAMES, size_px, size_px] in [−1, 1]."""
    rng = random.Random(seed)
    for _ in range(scenes):
        yield as_clip(render(random_scene(rng), FRAMES, size_px))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(fields):
        grid = torch.randn(1, 3, 3, 4, 4, generator=generator)
        smooth = F.interpolate(grid, (FRAMES, size_px, size_px), mode="trilinear")
        yield (1.2 * smooth).tanh()


def as_clip(frames: np.ndarray) -> torch.Tensor:
    """uint8 [T, H, W, 3] → float32 [1, 3, T, H, W] in [−1, 1]."""
    return (torch.from_numpy(frames).float() / 127.5 - 1.0).permute(3, 0, 1, 2)[None]


@torch.inference_mode()
def samples_of(vae: VideoVAE, clip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scaled latents [N, C], the mean colours of the pixels each of them stands for [N, 3])."""
    mean, _ = vae.encode(clip)
    decoded = vae.decode(mean)[0].float().clamp(-1.0, 1.0)
    # The first latent frame stands for one frame, each other one for four.
    first = F.avg_pool3d(decoded[:, :1], (1, SPATIAL, SPATIAL))
    rest = F.avg_pool3d(decoded[:, 1:], (TEMPORAL, SPATIAL, SPATIAL))
    colours = torch.cat([first, rest], dim=1)
    latents = mean[0].float() * vae.config.scaling_factor
    return latents.flatten(1).T.cpu(), colours.flatten(1).T.cpu()


class ColourFit:
    """Least squares with a little ridge, summed up clip by clip in float64."""

    def __init__(self, channels: int) -> None:
        self._gram = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)
        self._cross = torch.zeros(channels + 1, 3, dtype=torch.float64)
        self._square = torch.zeros(3, dtype=torch.float64)

    def add(self, latents: torch.Tensor, colours: torch.Tensor) -> None:
        """Samples [N, C] and their colours [N, 3]."""
        ones = torch.ones(len(latents), 1, dtype=torch.float64)
        inputs, wanted = torch.cat([latents.double(), ones], dim=1), colours.double()
        self._gram += inputs.T @ inputs
        self._cross += inputs.T @ wanted
        self._square += wanted.square().sum(0)

    def solve(self) -> tuple[LatentColours, list[float]]:
        """The colours, and the share of each colour's variance that they explain."""
        count = self._gram[-1, -1]
        ridge = RIDGE * count * torch.eye(len(self._gram), dtype=torch.float64)
        ridge[-1, -1] = 0.0
        solution = torch.linalg.solve(self._gram + ridge, self._cross)
        residual = (
            self._square
            - 2 * (solution * self._cross).sum(0)
            + (solution * (self._gram @ solution)).sum(0)
        )
        variance = self._square - self._cross[-1].square() / count
        rows = [
            (round(red, 6), round(green, 6), round(blue, 6))
            for red, green, blue in solution.tolist()
        ]
        return LatentColours(tuple(rows[:-1]), rows[-1]), (1 - residual / variance).tolist()


if __name__ == "__main__":
    main()

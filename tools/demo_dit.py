"""The demo's transformer: flow matching on the latents of a few thousand clips.

Text-to-video and image-to-video share the weights: in part of the steps the first latent frame is given
clean, with the mask that says so.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from demo_run import SIZE_PX, Run, Stage
from demo_vae import video_tensor
from safetensors.torch import load_file, save_file

from kandinsky5.demo.scenes import BACKGROUNDS, Scene, describe, random_scene, render
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.loading import ModelFiles
from kandinsky5.model.text import Conditioning, TextEncoders
from kandinsky5.model.vae import VideoVAE
from kandinsky5.templates import PROMPT_TEMPLATES

log = logging.getLogger("train_demo")

Words = tuple[str, str, str, str]
"""Colour, shape, direction and background of a scene."""

DIT_CONFIG = DiTConfig(
    in_text_dim=128,
    in_text_dim2=64,
    time_dim=128,
    model_dim=192,
    ff_dim=768,
    num_text_blocks=1,
    num_visual_blocks=6,
    axes_dims=(16, 24, 24),
)
STAGES = (
    (Stage("dit", steps=5000, batch=16, learning_rate=1e-3, warmup=200), 1.5),
    (Stage("dit-noise", steps=4500, batch=16, learning_rate=7e-4, warmup=100), 8.0),
)
"""Each stage with the shift of its training times: first how a shape looks, then, near pure noise, which
shape it is and where it goes. A clip is so redundant that at t = 0.9 its way can already be seen."""

CLIPS = {25: 3200, 49: 320}
"""Clips of the training set by their pixel frames."""
CAPTIONS = 4
"""Wordings of each clip; a wording serves every clip that it is true of."""
NO_PROMPT_SHARE = 0.1
GIVEN_FRAME_SHARE = 0.4


@dataclass(frozen=True)
class Clip:
    """Where a clip's latents lie and how it may be described."""

    frames: int
    index: int
    scene: Scene
    captions: tuple[str, ...]

    @property
    def words(self) -> Words:
        return (self.scene.colour, self.scene.shape, self.scene.direction, self.scene.background)


@torch.inference_mode()
def encoded_clips(
    vae: VideoVAE, folder: Path, device: str, seed: int
) -> tuple[dict[int, torch.Tensor], list[Clip], float]:
    """Latents [N, t, h, w, 16] by pixel frames, scaled to unit spread; the clips; the scale."""
    path = folder / "latents.safetensors"
    clips, scenes = [], defaultdict(list)
    for frames, count in CLIPS.items():
        for index in range(count):
            rng = random.Random(f"{seed}/clip/{frames}/{index}")
            scene = random_scene(rng)
            captions = tuple(describe(scene, rng) for _ in range(CAPTIONS))
            scenes[frames].append(scene)
            clips.append(Clip(frames, index, scene, captions))
    if not path.exists():
        encoded = {
            str(frames): _encoded(vae, members, frames, device)
            for frames, members in scenes.items()
        }
        temporary = path.with_suffix(".tmp")
        save_file(encoded, temporary)
        temporary.replace(path)
    latents = {int(frames): values.to(device) for frames, values in load_file(path).items()}
    scale = 1.0 / latents[25].std().item()
    return {frames: values * scale for frames, values in latents.items()}, clips, scale


def _encoded(vae: VideoVAE, scenes: list[Scene], frames: int, device: str) -> torch.Tensor:
    """Unscaled posterior means of the scenes' clips, float32 [N, t, h, w, 16] on the CPU."""
    encoded = []
    for start in range(0, len(scenes), 8):
        videos = [render(scene, frames, SIZE_PX) for scene in scenes[start : start + 8]]
        with torch.autocast(device, torch.bfloat16):
            mean, _ = vae.encode(video_tensor(np.stack(videos), device))
        encoded.append(mean.float().permute(0, 2, 3, 4, 1).cpu())
    log.info("encoded %d clips of %d frames", len(scenes), frames)
    return torch.cat(encoded).contiguous()


def encoded_captions(folder: Path, clips: list[Clip], device: str) -> dict[str, Conditioning]:
    """The conditioning of every caption, and of no caption at all, by the demo's own text towers."""
    files = ModelFiles(
        transformer=folder,
        vae=folder,
        text_encoder=folder / "text_encoder",
        tokenizer=folder / "tokenizer",
        text_encoder_2=folder / "text_encoder_2",
        tokenizer_2=folder / "tokenizer_2",
    )
    encoders = TextEncoders.load(files, device=torch.device(device), dtype=torch.float32)
    encoded = {}
    for caption in sorted({"", *(caption for clip in clips for caption in clip.captions)}):
        conditioning = encoders.encode(
            caption, caption, template=PROMPT_TEMPLATES["demo"], max_tokens=64, clip_tokens=77
        )
        encoded[caption] = Conditioning(conditioning.text.clone(), conditioning.pooled.clone())
    return encoded


class Batches:
    """Batches of clips of one length with captions of one token count, so that nothing need be padded.

    A caption is drawn first, then any clip that it is true of: no wording belongs to one clip, so none can
    be learned by heart.
    """

    def __init__(self, clips: list[Clip], conditionings: dict[str, Conditioning]) -> None:
        self._clips: dict[tuple[int, Words], list[Clip]] = defaultdict(list)
        self._captions: dict[tuple[int, int], list[tuple[str, Words]]] = defaultdict(list)
        for clip in clips:
            self._clips[clip.frames, clip.words].append(clip)
            for caption in clip.captions:
                key = (clip.frames, conditionings[caption].text.shape[0])
                self._captions[key].append((caption, clip.words))
        self._sizes = {key: len(members) for key, members in self._captions.items()}

    def draw(self, rng: random.Random, count: int) -> list[tuple[Clip, str]]:
        frames, length = rng.choices(list(self._sizes), weights=list(self._sizes.values()))[0]
        chosen = rng.choices(self._captions[frames, length], k=count)
        batch = [(self._clip(rng, frames, caption, words), caption) for caption, words in chosen]
        if rng.random() < NO_PROMPT_SHARE:
            return [(clip, "") for clip, _ in batch]
        return batch

    def _clip(self, rng: random.Random, frames: int, caption: str, words: Words) -> Clip:
        """A clip that the caption is true of; where it names no background, before either."""
        if not any(background in caption for background in BACKGROUNDS):
            other = (*words[:3], rng.choice(list(BACKGROUNDS)))
            if self._clips.get((frames, other)):
                words = other
        return rng.choice(self._clips[frames, words])


def train_dit(
    dit: DiffusionTransformer3D, vae: VideoVAE, folder: Path, device: str, seed: int
) -> tuple[DiffusionTransformer3D, float]:
    """Train (or go on training) and give back the averaged model and the VAE's scaling factor."""
    latents, clips, scale = encoded_clips(vae, folder, device, seed)
    conditionings = encoded_captions(folder, clips, device)
    batches = Batches(clips, conditionings)
    compiled = torch.compile(dit, dynamic=None)
    for stage, time_shift in STAGES:
        run = Run(stage, dit, folder, device)
        loss_of = partial(
            step_loss, compiled, stage, time_shift, latents, conditionings, batches, seed
        )
        run.train(loss_of)
        run.averaged()
    return dit.eval(), scale


def step_loss(
    dit: Callable[..., torch.Tensor],
    stage: Stage,
    time_shift: float,
    latents: dict[int, torch.Tensor],
    conditionings: dict[str, Conditioning],
    batches: Batches,
    seed: int,
    step: int,
) -> torch.Tensor:
    """The loss of one step, the same whenever the step is run."""
    rng = random.Random(f"{seed}/{stage.name}/{step}")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    batch = batches.draw(rng, stage.batch)
    clean = torch.stack([latents[clip.frames][clip.index] for clip, _ in batch])
    texts = [conditionings[caption] for _, caption in batch]
    frame_given = rng.random() < GIVEN_FRAME_SHARE
    time = torch.rand(stage.batch, generator=generator)
    time = time_shift * time / (1 + (time_shift - 1) * time)
    return flow_loss(dit, clean, texts, time.to(clean.device), frame_given, generator)


def flow_loss(
    dit: Callable[..., torch.Tensor],
    clean: torch.Tensor,
    texts: list[Conditioning],
    time: torch.Tensor,
    frame_given: bool,
    generator: torch.Generator,
) -> torch.Tensor:
    """Squared error of the velocity noise − clean at the given times (rectified flow, arXiv 2209.03003)."""
    device = clean.device
    noise = torch.randn(clean.shape, generator=generator).to(device)
    t = time.view(-1, 1, 1, 1, 1)
    noisy = (1 - t) * clean + t * noise
    mask = torch.zeros_like(clean[..., :1])
    if frame_given:
        noisy = torch.cat([clean[:, :1], noisy[:, 1:]], dim=1)
        mask[:, 0] = 1.0
    inputs = torch.cat([noisy, torch.zeros_like(noisy), mask], dim=-1)
    text = torch.stack([c.text for c in texts]).to(device)
    pooled = torch.stack([c.pooled for c in texts]).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        velocity = dit(inputs, text, pooled, time).float()
    error = (velocity - (noise - clean)).square()
    return error[:, 1:].mean() if frame_given else error.mean()

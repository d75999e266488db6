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
DIT = Stage("dit", steps=11000, batch=16, learning_rate=1e-3, warmup=200)
DIT_CONTINUED = Stage("dit-continued", steps=6000, batch=16, learning_rate=7e-4, warmup=200)
"""From weights that are there already (``--start``)."""
TIME_SHIFT = 8.0
"""Shift of the training times. A clip is so redundant that at t = 0.9 its way can already be seen: what it
shows and where it goes is decided, and must be learned, nearer to pure noise."""


@dataclass(frozen=True)
class ClipSet:
    """A part of the training set: clips of one length, so far off the middle (see ``random_scene``)."""

    name: str
    frames: int
    count: int
    wander: float


CLIP_SETS = (
    ClipSet("25", 25, 3200, 1.0),
    ClipSet("49", 49, 320, 1.0),
    ClipSet("25-centred", 25, 1800, 0.2),
    ClipSet("49-centred", 49, 180, 0.2),
)
CENTRED = {"25-centred", "49-centred"}
"""From text alone the model learns scenes near the middle, so that a prompt leaves little to chance; from a
picture it learns scenes anywhere."""
CAPTIONS = 2
"""Wordings of each clip; a wording serves every clip that it is true of."""
NO_PROMPT_SHARE = 0.1
GIVEN_FRAME_SHARE = 0.4


@dataclass(frozen=True)
class Clip:
    """Where a clip's latents lie and how it may be described."""

    of: str
    index: int
    scene: Scene
    captions: tuple[str, ...]

    @property
    def words(self) -> Words:
        return (self.scene.colour, self.scene.shape, self.scene.direction, self.scene.background)


def drawn_clips(part: ClipSet, seed: int) -> list[Clip]:
    """The clips of a set, the same for the same seed."""
    clips = []
    for index in range(part.count):
        rng = random.Random(f"{seed}/clip/{part.name}/{index}")
        scene = random_scene(rng, wander=part.wander)
        captions = tuple(describe(scene, rng) for _ in range(CAPTIONS))
        clips.append(Clip(part.name, index, scene, captions))
    return clips


@torch.inference_mode()
def encoded_clips(
    vae: VideoVAE, folder: Path, device: str, seed: int
) -> tuple[dict[str, torch.Tensor], list[Clip], float]:
    """Latents [N, t, h, w, 16] by set, scaled to unit spread; the clips; the scale."""
    latents, clips = {}, []
    for part in CLIP_SETS:
        drawn = drawn_clips(part, seed)
        path = folder / f"latents-{part.name}.safetensors"
        if not path.exists():
            scenes = [clip.scene for clip in drawn]
            temporary = path.with_suffix(".tmp")
            save_file({"latents": _encoded(vae, scenes, part.frames, device)}, temporary)
            temporary.replace(path)
        latents[part.name] = load_file(path)["latents"].to(device)
        clips += drawn
    scale = 1.0 / latents["25"].std().item()
    return {name: values * scale for name, values in latents.items()}, clips, scale


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
        self._clips: dict[tuple[str, Words], list[Clip]] = defaultdict(list)
        self._captions: dict[tuple[str, int], list[tuple[str, Words]]] = defaultdict(list)
        for clip in clips:
            self._clips[clip.of, clip.words].append(clip)
            for caption in clip.captions:
                key = (clip.of, conditionings[caption].text.shape[0])
                self._captions[key].append((caption, clip.words))
        self._sizes = {key: len(members) for key, members in self._captions.items()}

    def draw(self, rng: random.Random, count: int) -> list[tuple[Clip, str]]:
        of, length = rng.choices(list(self._sizes), weights=list(self._sizes.values()))[0]
        chosen = rng.choices(self._captions[of, length], k=count)
        batch = [(self._clip(rng, of, caption, words), caption) for caption, words in chosen]
        if rng.random() < NO_PROMPT_SHARE:
            return [(clip, "") for clip, _ in batch]
        return batch

    def _clip(self, rng: random.Random, of: str, caption: str, words: Words) -> Clip:
        """A clip that the caption is true of; where it names no background, before either."""
        if not any(background in caption for background in BACKGROUNDS):
            other = (*words[:3], rng.choice(list(BACKGROUNDS)))
            if self._clips.get((of, other)):
                words = other
        return rng.choice(self._clips[of, words])


def train_dit(
    stage: Stage, dit: DiffusionTransformer3D, vae: VideoVAE, folder: Path, seed: int
) -> tuple[DiffusionTransformer3D, float]:
    """Train (or go on training) and give back the averaged model and the VAE's scaling factor."""
    device = next(dit.parameters()).device.type
    latents, clips, scale = encoded_clips(vae, folder, device, seed)
    conditionings = encoded_captions(folder, clips, device)
    from_picture = Batches(clips, conditionings)
    from_text = Batches([clip for clip in clips if clip.of in CENTRED], conditionings)
    compiled = torch.compile(dit, dynamic=None)
    generator = torch.Generator()

    def loss_of(step: int) -> torch.Tensor:
        rng = random.Random(f"{seed}/{stage.name}/{step}")
        generator.manual_seed(seed * 1_000_003 + step)
        frame_given = rng.random() < GIVEN_FRAME_SHARE
        batch = (from_picture if frame_given else from_text).draw(rng, stage.batch)
        clean = torch.stack([latents[clip.of][clip.index] for clip, _ in batch])
        texts = [conditionings[caption] for _, caption in batch]
        time = torch.rand(stage.batch, generator=generator).to(device)
        time = TIME_SHIFT * time / (1 + (TIME_SHIFT - 1) * time)
        return flow_loss(compiled, clean, texts, time, frame_given, generator)

    run = Run(stage, dit, folder, device)
    run.train(loss_of)
    return run.averaged().eval(), scale


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

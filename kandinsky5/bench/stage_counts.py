"""Device memory that the stages of a plan really allocate, counted without a device.

The pipeline's own code runs, with its streamers and slots, on tensors of PyTorch's meta device
(:mod:`kandinsky5.bench.device_bytes`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from int8 import Int8Linear
from kandinsky5.bench.blocks import config_of
from kandinsky5.bench.device_bytes import META, DeviceBytes, weights_bytes
from kandinsky5.bench.text_counts import encode_text_bytes, expand_bytes
from kandinsky5.memory.plan import MemoryPlan
from kandinsky5.model import nabla
from kandinsky5.model.attention import NablaParams
from kandinsky5.model.dit import DiffusionTransformer3D, StepConditioning
from kandinsky5.model.image_vae import ImageVAE, ImageVAEConfig
from kandinsky5.model.reader import TransformerReader
from kandinsky5.model.text import Conditioning
from kandinsky5.model.vae import VideoVAE, VideoVAEConfig
from kandinsky5.model.vae_loading import VAE
from kandinsky5.pipeline.codec import decoded, encode_image
from kandinsky5.pipeline.denoise import Guidance, denoise, schedule
from kandinsky5.pipeline.planning import placement_of
from kandinsky5.pipeline.transformer import TransformerTenant
from kandinsky5.presets import PRESETS

GUIDANCE, SHIFT = 5.0, 5.0
BLOCKS_COMPUTED = 1
"""Of a transformer: slots and resident blocks are there from the beginning, so one shows the most."""
FRAMES_RUN = 3
"""Latent frames that are decoded: all behind the second one take the same."""


def encode_image_bytes(plan: MemoryPlan) -> int:
    """Most bytes alive while the input picture is encoded, the VAE's weights included."""
    job, tiles = plan.job, plan.encode_tiles
    assert tiles is not None
    vae = _empty_vae(plan)
    pixels = torch.empty(1, 3, 1, job.height_px, job.width_px)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(), DeviceBytes(vae) as live:
        encode_image(vae, pixels, generator, META, tiles)
    return weights_bytes(vae) + live.peak_bytes


def prepare_bytes(plan: MemoryPlan) -> int:
    """Most bytes alive while what a schedule takes from its prompts is computed."""
    with _MeasuredTenant(plan) as (tenant, live):
        tenant.prepare(_prompts(plan), schedule(plan.job.steps, SHIFT)[:-1].tolist())
    return live.peak_bytes


def denoise_bytes(plan: MemoryPlan) -> int:
    """Most bytes alive in a step of the denoising loop."""
    job = plan.job
    prompts = _prompts(plan)
    negative = prompts[1] if job.guided else None
    guidance = Guidance(prompts[0], negative, GUIDANCE if job.guided else 1.0)
    cells = (job.latent_frames, job.height_px // 8, job.width_px // 8)
    with _MeasuredTenant(plan) as (tenant, live), _chosen_blocks_by_their_output():
        _compute_few(tenant.model.visual_transformer_blocks)
        nabla_of_preset = PRESETS[job.preset].nabla if job.sparse else None
        tenant.sparse = None if nabla_of_preset is None else NablaParams(**vars(nabla_of_preset))
        denoise(
            tenant.enter(),
            torch.empty(*cells, tenant.config.in_visual_dim, device=META),
            guidance,
            schedule(1, SHIFT),
            conditioning=_Fetched(plan),
        )
    return live.peak_bytes


def decode_bytes(plan: MemoryPlan) -> int:
    """Most bytes alive while the result is decoded, the VAE's weights included."""
    job, tiles = plan.job, plan.decode_tiles
    vae = _empty_vae(plan)
    latents = torch.empty(*tiles.latent_shape, job.models.vae.latent_channels)
    pieces = min(FRAMES_RUN, tiles.latent_shape[0])

    def before_piece(done: int, total: int) -> None:
        if job.models.vae.is_video and done == pieces:
            raise _Enough

    with torch.inference_mode(), DeviceBytes(vae) as live:
        try:
            for _ in decoded(vae, latents, tiles, device=META, before_piece=before_piece):
                pass
        except _Enough:
            pass
    return weights_bytes(vae) + live.peak_bytes


COUNTS: Mapping[str, Callable[[MemoryPlan], int]] = {
    "expand": expand_bytes,
    "encode text": encode_text_bytes,
    "encode image": encode_image_bytes,
    "prepare": prepare_bytes,
    "denoise": denoise_bytes,
    "decode": decode_bytes,
}
"""Stage of a plan → what it allocates."""


class _MeasuredTenant:
    """A plan's transformer without weights, and what is counted while it is used."""

    def __init__(self, plan: MemoryPlan) -> None:
        quantised = plan.denoise.weights == "int8"
        linear = partial(Int8Linear, dtype=torch.bfloat16) if quantised else nn.Linear
        with META:
            model = DiffusionTransformer3D(config_of(plan.job.models.transformer), linear=linear)
        model = model.to(torch.bfloat16).eval()
        reader = cast(TransformerReader, _NothingRead(model))
        placement = dataclasses.replace(placement_of(plan), kept=False)  # nothing to be kept
        self._tenant = TransformerTenant(reader, device=META, placement=placement)
        self._live = DeviceBytes(model)
        self._mode = torch.inference_mode()

    def __enter__(self) -> tuple[TransformerTenant, DeviceBytes]:
        self._mode.__enter__()
        return self._tenant, self._live.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._tenant.close()
        self._live.__exit__(*exception)
        self._mode.__exit__(*exception)


class _NothingRead:
    """Stands for a checkpoint: the model is there, its numbers are not wanted."""

    def __init__(self, model: DiffusionTransformer3D) -> None:
        self.model = model

    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Leaves the targets as they are."""

    def close(self) -> None:
        """Nothing is open."""


class _Fetched:
    """A prepared schedule whose vectors come to the device step by step."""

    def __init__(self, plan: MemoryPlan) -> None:
        self._job = plan.job

    def branches(self, step: int, skips: Sequence[bool]) -> Sequence[StepConditioning]:
        shape = self._job.models.transformer
        dim, dtype = shape.model_dim, torch.bfloat16
        return [
            StepConditioning(
                torch.empty(self._job.text_tokens, dim, dtype=dtype, device=META),
                tuple(torch.empty(1, 9 * dim, device=META) for _ in range(shape.visual_blocks)),
                torch.empty(1, 2 * dim, device=META),
            )
            for _ in range(self._job.branches)
        ]


def _compute_few(blocks: nn.ModuleList) -> None:
    """Let all but a few blocks hand on what they are given: they are alike, and each takes seconds to count.

    Their weights come and go all the same.
    """
    for block in blocks[BLOCKS_COMPUTED:]:
        block.forward = lambda visual, *others: visual  # type: ignore[assignment]


@contextmanager
def _chosen_blocks_by_their_output() -> Iterator[None]:
    """NABLA's attention, as the other is."""
    before = nabla.plain_blocks
    nabla.plain_blocks = lambda query, *others: torch.empty_like(query)
    try:
        yield
    finally:
        nabla.plain_blocks = before


class _Enough(Exception):
    """The rest is known."""


def _prompts(plan: MemoryPlan) -> list[Conditioning]:
    shape, tokens = plan.job.models.transformer, plan.job.text_tokens
    text, pooled = torch.empty(tokens, shape.text_dim), torch.empty(shape.pooled_dim)
    return [Conditioning(text, pooled) for _ in range(plan.job.branches)]


def _empty_vae(plan: MemoryPlan) -> VAE:
    vae = plan.job.models.vae
    with META:
        if vae.is_video:
            made: VAE = VideoVAE(
                VideoVAEConfig(latent_channels=vae.latent_channels, **_widths(plan))
            )
        else:
            made = ImageVAE(ImageVAEConfig(latent_channels=vae.latent_channels, **_widths(plan)))
    return made.to(torch.bfloat16).eval()


def _widths(plan: MemoryPlan) -> dict[str, Any]:
    vae = plan.job.models.vae
    return {"block_out_channels": vae.widths, "layers_per_block": vae.layers}

"""Device memory that the stages of a plan really allocate, counted without a device.

The pipeline's own code runs, with its streamers and slots, on tensors of PyTorch's meta device: shapes and
lifetimes are real, numbers are not computed. Attention counts by its output: fused kernels allocate no more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from int8 import Int8Linear
from kandinsky5.bench.blocks import config_of
from kandinsky5.memory.layout import BlockLayout
from kandinsky5.memory.plan import MemoryPlan
from kandinsky5.memory.source import DiskSource
from kandinsky5.memory.streamer import Streamer
from kandinsky5.model import nabla
from kandinsky5.model.attention import NablaParams
from kandinsky5.model.bench import LiveBytes
from kandinsky5.model.dit import DiffusionTransformer3D, StepConditioning
from kandinsky5.model.image_vae import ImageVAE, ImageVAEConfig
from kandinsky5.model.reader import TransformerReader
from kandinsky5.model.text import Conditioning
from kandinsky5.model.text_shapes import clip_config, empty_clip, empty_qwen
from kandinsky5.model.vae import VideoVAE, VideoVAEConfig
from kandinsky5.model.vae_loading import VAE
from kandinsky5.pipeline.codec import decoded, encode_image
from kandinsky5.pipeline.denoise import Guidance, denoise, schedule
from kandinsky5.pipeline.planning import placement_of
from kandinsky5.pipeline.transformer import TransformerTenant
from kandinsky5.presets import PRESETS

META = torch.device("meta")
GUIDANCE, SHIFT = 5.0, 5.0
BLOCKS_COMPUTED = 1
"""Of a transformer: slots and resident blocks are there from the beginning, so one shows the most."""
FRAMES_RUN = 3
"""Latent frames that are decoded: all behind the second one take the same."""
_QUESTIONS = frozenset(
    (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.item.default,
        torch.ops.aten.is_nonzero.default,
    )
)
"""How a program asks for a number, such as whether all of a tensor is finite."""
_MOVES = (torch.ops.aten.to, torch.ops.aten._to_copy)


def encode_text_bytes(plan: MemoryPlan) -> int:
    """Most bytes alive while the longest prompt is encoded, weights included.

    Raises:
        ValueError: a plan with weights in NF4, or with a picture that the encoder sees.
    """
    job, use = plan.job, plan.text.encode
    if use.weights == "nf4" or job.encoder_sees:
        raise ValueError("only an encoder in its own format that reads text alone can be counted")
    qwen, clip = empty_qwen(job.models.text_encoder), empty_clip(clip_config())
    positions = job.template_tokens + job.text_tokens
    weights_bytes = _weights_bytes(clip)
    with torch.inference_mode(), DeviceBytes(qwen, clip) as live:
        read = torch.empty(1, positions, qwen.config.hidden_size, dtype=torch.bfloat16, device=META)
        if use.source == "resident":
            weights_bytes += _weights_bytes(qwen)
            qwen(inputs_embeds=read, use_cache=False)
        else:
            layouts = [BlockLayout.of(layer) for layer in qwen.layers]
            source = DiskSource(layouts, lambda index, slab: None, ring=1)
            with Streamer(qwen.layers, source, device=META, slots=use.slots):
                qwen(inputs_embeds=read, use_cache=False)
    return weights_bytes + live.peak_bytes


def encode_image_bytes(plan: MemoryPlan) -> int:
    """Most bytes alive while the input picture is encoded, the VAE's weights included."""
    job, tiles = plan.job, plan.encode_tiles
    assert tiles is not None
    vae = _empty_vae(plan)
    pixels = torch.empty(1, 3, 1, job.height_px, job.width_px)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(), DeviceBytes(vae) as live:
        encode_image(vae, pixels, generator, META, tiles)
    return _weights_bytes(vae) + live.peak_bytes


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
    return _weights_bytes(vae) + live.peak_bytes


COUNTS: Mapping[str, Callable[[MemoryPlan], int]] = {
    "encode text": encode_text_bytes,
    "encode image": encode_image_bytes,
    "prepare": prepare_bytes,
    "denoise": denoise_bytes,
    "decode": decode_bytes,
}
"""Stage of a plan → what it allocates."""


class DeviceBytes(LiveBytes):
    """Counts what is on the meta device, apart from empty models; says yes to questions about numbers.

    What goes to main memory is there as memory that is never touched.
    """

    def __init__(self, *apart_from: nn.Module) -> None:
        super().__init__(nn.ModuleList(apart_from))
        self._attention = _AttentionByItsOutput()

    def __enter__(self) -> DeviceBytes:
        super().__enter__()
        self._attention.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._attention.__exit__(*exception)
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _QUESTIONS and args[0].is_meta:
            return True
        if func.overloadpacket in _MOVES and args[0].is_meta:
            given = (*args[1:], *(kwargs or {}).values())
            if any(isinstance(value, torch.device) and value.type == "cpu" for value in given):
                dtypes = [value for value in given if isinstance(value, torch.dtype)]
                dtype = (dtypes or [args[0].dtype])[0]
                return torch.empty(args[0].shape, dtype=dtype, device="cpu")
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type == META.type:
            super()._add(storage)


class _AttentionByItsOutput(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


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
    """NABLA's attention, as :class:`_AttentionByItsOutput` has the other."""
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


def _weights_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())

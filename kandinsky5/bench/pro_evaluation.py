"""Evaluations of a whole transformer on a GPU with random weights: seconds, reserved bytes (B1, B2, B6, B9).

No time is told unless every number of the result is finite.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from int8 import Int8Linear
from kandinsky5.bench.blocks import FORMATS, config_of, shape_of
from kandinsky5.bench.random_file import INT8_STD, WEIGHT_STD
from kandinsky5.circumstances import circumstances
from kandinsky5.errors import UserError
from kandinsky5.family import TransformerShape
from kandinsky5.memory.residency import Residency
from kandinsky5.model.chunks import ActivationChunks
from kandinsky5.model.dit import DiffusionTransformer3D, StepConditioning
from kandinsky5.model.reader import TransformerReader
from kandinsky5.pipeline.transformer import Placement, TransformerTenant

TEXT_TOKENS = 256
LATENTS = {
    "512x768x121": (31, 64, 96),
    "512x768x241": (61, 64, 96),
    "768x1280x121": (31, 96, 160),
    "1024x1024x121": (31, 128, 128),
    "1024x1024x241": (61, 128, 128),
    "1024x1024x1": (1, 128, 128),
}
"""Height, width and frames → the latent's frames, height and width."""
SECONDS_LIMITS = {"bf16": ("B1", 5.6), "int8": ("B2", 5.0)}
"""One evaluation of Pro at 512x768x121."""
RESERVED_LIMITS_GB = {"512x768x121": 4.0, "768x1280x121": 8.0, "1024x1024x241": 14.0}
RATIO_LIMIT, IMAGE_LIMIT_GB = 1.10, 3.0
DRAWN_VALUES = 1 << 24
WAYS = ("resident", "streamed", "both")


@dataclass(frozen=True)
class Measured:
    """One way of holding the weights.

    Attributes:
        step_s: mean of the timed evaluations.
        reserved_bytes: most device memory reserved; 0 on a CPU.
        h2d_bytes: of weights, for each evaluation.
        output: velocity of the last one.
    """

    step_s: float
    reserved_bytes: int
    h2d_bytes: int
    output: torch.Tensor


def pro_evaluation(
    *,
    model: str = "pro",
    weights: str = "bf16",
    size: str = "512x768x121",
    way: str = "both",
    branches: int = 1,
    steps: int = 2,
    tokens: int = 4096,
    heads: int | None = None,
    cap_gb: float | None = None,
) -> dict[str, Any]:
    """Time whole evaluations: embeddings, all blocks, output layer.

    Args:
        model, weights: ``pro``, ``lite`` or ``image``; ``bf16`` or ``int8``.
        size: a key of :data:`LATENTS`.
        way: ``resident``, ``streamed`` (two slots, page-locked RAM) or ``both``.
        branches: 2 for a guided step.
        steps: timed, after one that is not.
        tokens: per chunk of the activations.
        heads: per group of self-attention; None for all at once.
        cap_gb: most device memory that the process may have.

    Returns:
        JSON-ready: seconds, reserved bytes and TFLOP/s of each way, ``streamed_over_resident``, ``reached``
        for those of B1, B2, B6 and B9 that this size and model are, the circumstances.

    Raises:
        UserError: no CUDA device, or a value that cannot be used.
        RuntimeError: numbers that are not finite, or two ways that differ.
    """
    if not torch.cuda.is_available():
        raise UserError("bench", "pro-evaluation", "a machine with a CUDA device")
    if size not in LATENTS or way not in WAYS or weights not in FORMATS:
        allowed = f"a size of {', '.join(LATENTS)}; {', '.join(WAYS)}; {', '.join(FORMATS)}"
        raise UserError("bench", [size, way, weights], allowed)
    if min(branches, steps, tokens, 1 if heads is None else heads) < 1 or branches > 2:
        allowed = "1 or 2 branches; at least 1 step, token and head"
        raise UserError("bench", [branches, steps, tokens, heads], allowed)
    shape, device = shape_of(model), torch.device("cuda", torch.cuda.current_device())
    if cap_gb is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gb * 1e9 / total), device)
    chunks = ActivationChunks(tokens=tokens, heads=heads)
    found = {
        name: evaluated(
            shape,
            weights,
            LATENTS[size],
            Placement(resident=None if name == "resident" else 0, chunks=chunks),
            device=device,
            branches=branches,
            steps=steps,
        )
        for name in (WAYS[:2] if way == "both" else (way,))
    }
    outputs = [measured.output for measured in found.values()]
    if any(not torch.equal(outputs[0], other) for other in outputs[1:]):
        raise RuntimeError("the ways give different numbers, so their times mean nothing")
    operations = branches * flops(shape, LATENTS[size])
    return {
        "benchmark": "pro-evaluation",
        "model": model,
        "weights": weights,
        "size": size,
        "branches": branches,
        "chunk_tokens": tokens,
        "chunk_heads": heads,
        "cap_gb": cap_gb,
        **{name: _row(measured, operations) for name, measured in found.items()},
        "reached": reached(model, weights, size, branches, found),
        **circumstances(),
    }


@torch.inference_mode()
def evaluated(
    shape: TransformerShape,
    weights: str,
    latent: tuple[int, int, int],
    placement: Placement,
    *,
    device: torch.device,
    branches: int,
    steps: int,
) -> Measured:
    """Run evaluations as a job does, from a reader that makes weights up."""
    reader = RandomReader(shape, weights)
    tenant = TransformerTenant(cast(TransformerReader, reader), device=device, placement=placement)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*latent, shape.input_channels, generator=generator).to(device)
    rows = [_conditioning(shape, generator, device) for _ in range(branches)]
    try:
        running = tenant.enter()
        positions = running.positions(x, rope_scale=(1.0, 1.0, 1.0))
        running.expect(1 + steps)
        running.evaluate(x, rows, positions)
        _synchronise(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        before, begun = running.traffic, time.perf_counter()
        for _ in range(steps):
            output = running.evaluate(x, rows, positions)[0]
        _synchronise(device)
        step_s = (time.perf_counter() - begun) / steps
        moved = (running.traffic - before).h2d_bytes // steps
        reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
        if not output.isfinite().all():
            raise RuntimeError("the result has NaN or infinite numbers, so its time means nothing")
        return Measured(step_s, reserved, moved, output.cpu())
    finally:
        tenant.close()
        Residency().release()


class RandomReader:
    """Stands for a checkpoint: tensors are filled with numbers drawn once, the same for the same name.

    Args:
        shape, weights: the model and the format of its layers.
    """

    def __init__(self, shape: TransformerShape, weights: str) -> None:
        linear = nn.Linear if weights == "bf16" else partial(Int8Linear, dtype=torch.bfloat16)
        with torch.device("meta"):
            model = DiffusionTransformer3D(config_of(shape), linear=linear)
        self.model = model.to(torch.bfloat16).eval()
        generator = torch.Generator().manual_seed(0)
        floats = torch.randn(DRAWN_VALUES, generator=generator).mul_(WEIGHT_STD).bfloat16()
        whole = torch.empty(DRAWN_VALUES, dtype=torch.int8)
        self._drawn = {
            torch.bfloat16: floats,
            torch.int8: whole.random_(-127, 128, generator=generator),
        }

    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill the targets."""
        for name, target in targets.items():
            if name.endswith("norm.weight"):
                target.fill_(1.0)
            elif target.dtype == torch.float32:
                target.fill_(WEIGHT_STD / INT8_STD)
            else:
                flat, drawn = target.view(-1), self._drawn[target.dtype]
                begin = sum(name.encode()) * 4096 % DRAWN_VALUES
                for first in range(0, flat.numel(), DRAWN_VALUES):
                    part = flat[first : first + DRAWN_VALUES]
                    rest = min(part.numel(), DRAWN_VALUES - begin)
                    part[:rest].copy_(drawn[begin : begin + rest])
                    part[rest:].copy_(drawn[: part.numel() - rest])

    def close(self) -> None:
        """Nothing is open."""


def flops(shape: TransformerShape, latent: tuple[int, int, int]) -> float:
    """Operations of one evaluation: linear layers and dense attention of the visual blocks."""
    tokens, dim = latent[0] * latent[1] * latent[2] // 4, shape.model_dim
    linear = 2.0 * tokens * (6 * dim * dim + 2 * dim * shape.ff_dim)
    return shape.visual_blocks * (linear + 4.0 * tokens * dim * (tokens + TEXT_TOKENS))


def reached(
    model: str, weights: str, size: str, branches: int, found: Mapping[str, Measured]
) -> dict[str, bool]:
    """The targets that this case can tell of, and whether they are met."""
    met = {}
    resident, streamed = (found.get(name) for name in WAYS[:2])
    if (model, size, branches) == ("pro", "512x768x121", 1) and resident is not None:
        name, limit_s = SECONDS_LIMITS[weights]
        met[name] = resident.step_s <= limit_s
    # What a stage needs is what a guided step needs: its second evaluation lives beside the first.
    if (model, branches) == ("pro", 2) and size in RESERVED_LIMITS_GB and streamed is not None:
        met["B6"] = streamed.reserved_bytes <= RESERVED_LIMITS_GB[size] * 1e9
    if model == "image" and resident is not None and streamed is not None:
        small = streamed.reserved_bytes <= IMAGE_LIMIT_GB * 1e9
        met["B9"] = small and streamed.step_s <= RATIO_LIMIT * resident.step_s
    return met


def _row(measured: Measured, operations: float) -> dict[str, Any]:
    return {
        "step_s": round(measured.step_s, 4),
        "tflop_per_s": round(operations / measured.step_s / 1e12, 1),
        "reserved_bytes": measured.reserved_bytes,
        "h2d_bytes": measured.h2d_bytes,
    }


def _conditioning(
    shape: TransformerShape, generator: torch.Generator, device: torch.device
) -> StepConditioning:
    dim = shape.model_dim
    text = torch.randn(TEXT_TOKENS, dim, generator=generator).to(device, torch.bfloat16)
    drawn = (0.1 * torch.randn(1, 9 * dim, generator=generator)).to(device)
    return StepConditioning(text, (drawn,) * shape.visual_blocks, drawn[:, : 2 * dim])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""How much memory an evaluation of the transformer needs beside its weights, counted without a device.

Tensors on PyTorch's meta device have shapes and no contents, so the largest model runs in seconds; what is
alive at each moment is added up. Attention counts by its output, which is all that the fused kernels of a
GPU allocate: PyTorch's own stand-in would replay it with all S×S products.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kandinsky5.circumstances import circumstances
from kandinsky5.errors import UserError
from kandinsky5.family import TRANSFORMERS, TransformerShape
from kandinsky5.memory.activations import EvaluationSize, activation_bytes
from kandinsky5.model.chunks import WHOLE, ActivationChunks
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig, StepConditioning

TARGET_UNITS = 5.0
"""Most [tokens, model_dim] tensors alive in the first case (A7 of the project's targets)."""
CHUNKS = ActivationChunks(tokens=2048, heads=8)
TEXT_TOKENS = 256


@dataclass(frozen=True)
class Case:
    """An evaluation to be counted: model, video, and how many branches go through a block together."""

    model: str
    width_px: int
    height_px: int
    frames: int
    branches: int = 1
    chunks: ActivationChunks = CHUNKS

    @property
    def latent(self) -> tuple[int, int, int]:
        return (self.frames - 1) // 4 + 1, self.height_px // 8, self.width_px // 8

    @property
    def tokens(self) -> int:
        frames, height, width = self.latent
        return frames * (height // 2) * (width // 2)


def activations(*, tokens: int | None = None, heads: int | None = None) -> dict[str, Any]:
    """Peak of live activation bytes for Pro and Lite, in bfloat16.

    Args:
        tokens: visual tokens per chunk; None takes those of :data:`CHUNKS`.
        heads: heads per group of self-attention, likewise.

    Raises:
        UserError: a chunk below 1.
    """
    for name, size in (("tokens", tokens), ("heads", heads)):
        if size is not None and size < 1:
            raise UserError(name, size, "at least 1")
    chunks = ActivationChunks(tokens or CHUNKS.tokens, heads or CHUNKS.heads)
    cases = (
        Case("pro", 768, 512, 121, 1, chunks),
        Case("pro", 768, 512, 121, 1, WHOLE),
        Case("pro", 768, 512, 121, 2, chunks),
        Case("pro", 1280, 768, 121, 2, chunks),
        Case("pro", 1024, 1024, 241, 2, chunks),
        Case("lite", 768, 512, 121, 2, chunks),
    )
    counted = [count(case) for case in cases]
    return {
        "benchmark": "activations",
        "target_units": TARGET_UNITS,
        "units": counted[0]["units"],
        "reached": counted[0]["units"] <= TARGET_UNITS,
        "cases": counted,
        **circumstances(),
    }


def count(case: Case) -> dict[str, Any]:
    """The case, its peak in bytes and in [tokens, model_dim] tensors, and what the memory plan expects."""
    shape = TRANSFORMERS[case.model]
    unit_bytes = 2 * case.tokens * shape.model_dim
    inputs_bytes, peak_bytes = peak_of_evaluation(shape, case)
    size = EvaluationSize(
        tokens=case.tokens,
        model_dim=shape.model_dim,
        ff_dim=shape.ff_dim,
        heads=shape.heads,
        head_dim=shape.head_dim,
        branches=case.branches,
    )
    chunks = {"chunk_tokens": case.chunks.tokens, "chunk_heads": case.chunks.heads}
    return {
        "model": case.model,
        "video": f"{case.width_px}x{case.height_px}, {case.frames} frames",
        "tokens": case.tokens,
        "branches": case.branches,
        **chunks,
        "unit_bytes": unit_bytes,
        "inputs_bytes": inputs_bytes,
        "peak_bytes": peak_bytes,
        "planned_bytes": inputs_bytes + activation_bytes(size, **chunks),
        "units": round(peak_bytes / unit_bytes, 3),
    }


def peak_of_evaluation(shape: TransformerShape, case: Case) -> tuple[int, int]:
    """Bytes of the latent and the conditionings, and most bytes alive at once, these included.

    One visual block is run: all are alike, and from one to the next goes only what is written in place.
    """
    config = DiTConfig(
        in_visual_dim=shape.output_channels,
        out_visual_dim=shape.output_channels,
        time_dim=shape.time_dim,
        model_dim=shape.model_dim,
        ff_dim=shape.ff_dim,
        num_text_blocks=0,
        num_visual_blocks=1,
        axes_dims=shape.axes_dims,
        visual_cond=shape.input_channels != shape.output_channels,
    )
    with torch.inference_mode(), torch.device("meta"):
        model = DiffusionTransformer3D(config, attention=_output_alone).to(torch.bfloat16)
        model.chunks = case.chunks
        with LiveBytes(apart_from=model) as live:
            x = torch.empty(*case.latent, config.input_channels)
            branches = [_conditioning(shape) for _ in range(case.branches)]
            inputs_bytes = live.now_bytes
            positions = model.positions(x)
            model.evaluate(positions.order.arranged(x), branches, positions)
    return inputs_bytes, live.peak_bytes


def _conditioning(shape: TransformerShape) -> StepConditioning:
    return StepConditioning(
        text=torch.empty(TEXT_TOKENS, shape.model_dim, dtype=torch.bfloat16),
        visual=tuple(torch.empty(1, 9 * shape.model_dim) for _ in range(shape.visual_blocks)),
        out=torch.empty(1, 2 * shape.model_dim),
    )


def _output_alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that come into being inside and are still alive.

    Memory that several tensors share counts once.

    Args:
        apart_from: a model whose weights do not count.
    """

    def __init__(self, apart_from: torch.nn.Module) -> None:
        super().__init__()
        self.now_bytes = 0
        self.peak_bytes = 0
        self._weights = {w.untyped_storage()._cdata for w in apart_from.state_dict().values()}
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size_bytes = storage._cdata, storage.nbytes()
        if key in self._alive or key in self._weights:
            return

        def forget(_: object) -> None:
            del self._alive[key]
            self.now_bytes -= size_bytes

        self._alive[key] = weakref.ref(storage, forget)
        self.now_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

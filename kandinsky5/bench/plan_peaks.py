"""What a memory plan predicts for the device while it denoises and decodes, against what is allocated then.

The denoising loop itself runs, with its streamer and slots, on tensors of PyTorch's meta device: shapes and
lifetimes are real, numbers are not computed. Attention counts by its output: fused kernels allocate no more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from int8 import Int8Linear
from kandinsky5.bench.blocks import config_of
from kandinsky5.bench.decode_work import rolling_cost
from kandinsky5.circumstances import circumstances
from kandinsky5.family import MODEL_SETS
from kandinsky5.memory.budget import ALLOCATOR_SLACK, DEVICE_RESERVE_BYTES, GB, Budget
from kandinsky5.memory.demand import PlanChoices, PlanRequest
from kandinsky5.memory.plan import MemoryPlan, make_plan
from kandinsky5.memory.stage import StagePlan
from kandinsky5.model.bench import LiveBytes
from kandinsky5.model.dit import DiffusionTransformer3D, StepConditioning
from kandinsky5.model.reader import TransformerReader
from kandinsky5.model.text import Conditioning
from kandinsky5.pipeline.denoise import Guidance, denoise, schedule
from kandinsky5.pipeline.planning import placement_of
from kandinsky5.pipeline.transformer import TransformerTenant
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, settle

META = torch.device("meta")
WITHIN = 0.10
GUIDANCE = 5.0
STEPS = 1
WAITING = ", waiting"
"""How a plan names another stage's model that stays on the device meanwhile."""
_QUESTIONS = frozenset(
    (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.item.default,
        torch.ops.aten.is_nonzero.default,
    )
)
"""How a program asks for a number, such as whether all of a tensor is finite."""


@dataclass(frozen=True)
class PeakCase:
    """A job and a budget.

    Attributes:
        preset, width_px, height_px: the job; its size is the preset's where None.
        vram_gb, ram_gb: the budget.
        weights, source, resident_blocks: choices; None leaves them to the plan.
        blocks: visual blocks; None for all, fewer are quicker to count.
    """

    preset: str
    vram_gb: float
    ram_gb: float
    weights: str | None = None
    source: str | None = None
    resident_blocks: int | None = None
    blocks: int | None = None
    width_px: int | None = None
    height_px: int | None = None


CASES = (
    PeakCase("pro-t2v-5s-sd", 8, 32, "int8", "pinned", 0, blocks=6),
    PeakCase("pro-t2v-5s-sd", 24, 64, "bf16", "pinned", 2, blocks=6),
    PeakCase("pro-t2v-10s-hd", 24, 32, "bf16", "disk", 0, blocks=3),
    PeakCase("lite-t2v-5s-sft", 6, 32, "bf16", "pinned", 2, blocks=6),
    PeakCase("lite-t2v-10s-sft", 24, 64, "bf16", "resident", blocks=6),
    PeakCase("image-t2i", 4, 32, "bf16", "pinned", 2, blocks=6),
)
"""With few blocks, as all are alike and each takes seconds to count."""


def plan_peaks() -> dict[str, Any]:
    """Predicted and counted peaks of several jobs and budgets.

    Returns:
        JSON-ready: ``cases``, ``reached`` {within_10_percent}, the circumstances.
    """
    rows = [count(case) for case in CASES]
    return {
        "benchmark": "plan-peaks",
        "cases": rows,
        "reached": {"within_10_percent": all(largest_error(row) <= WITHIN for row in rows)},
        **circumstances(),
    }


def count(case: PeakCase) -> dict[str, Any]:
    """One case: bytes as planned and as counted, and by what share the plan is above the count."""
    plan = planned(case)
    counts = {"denoise": counted_bytes(plan)}
    if plan.job.models.vae.is_video:
        counts["decode"] = decoding_bytes(plan)
    stages = {}
    for item in plan.stages:
        if item.name in counts:
            predicted, counted = bare_bytes(item), counts[item.name]
            stages[item.name] = {
                "planned_bytes": predicted,
                "counted_bytes": counted,
                "error": round(predicted / counted - 1.0, 4),
            }
    denoise = plan.denoise
    told = (
        "weights",
        "source",
        "resident_blocks",
        "streamed_blocks",
        "chunk_tokens",
        "chunk_heads",
    )
    return {
        "preset": case.preset,
        "video": f"{plan.job.width_px}x{plan.job.height_px}, {plan.job.frames} frames",
        "vram_gb": case.vram_gb,
        "tokens": plan.job.tokens,
        **{name: getattr(denoise, name) for name in told},
        "tiles": plan.decode_tiles.tiles,
        "stages": stages,
    }


def largest_error(row: dict[str, Any]) -> float:
    """Of a row's stages, in either direction."""
    return max(abs(stage["error"]) for stage in row["stages"].values())


def planned(case: PeakCase) -> MemoryPlan:
    """The plan of a case, for a card."""
    preset = PRESETS[case.preset]
    request, _ = settle(GenerationRequest(prompt="x", preset=case.preset, steps=STEPS))
    width, height = preset.sizes_px[0]
    request = dataclasses.replace(
        request,
        width=case.width_px or request.width or width,
        height=case.height_px or request.height or height,
    )
    shape = MODEL_SETS[preset.model].transformer
    if case.blocks is not None:
        shape = dataclasses.replace(shape, visual_blocks=case.blocks)
    choices = PlanChoices(
        weights=case.weights, source=case.source, resident_blocks=case.resident_blocks
    )
    job = PlanRequest.of(request, transformer=shape, choices=choices)
    job = dataclasses.replace(job, expand=False, sparse=False)
    return make_plan(job, Budget(round(case.vram_gb * GB), round(case.ram_gb * GB)))


def bare_bytes(stage: StagePlan) -> int:
    """A stage's predicted device peak without what no count of its tensors can see."""
    sizes = {p.name: p.size_bytes for p in stage.vram if not p.name.endswith(WAITING)}
    assert sizes.pop("CUDA") == DEVICE_RESERVE_BYTES
    activations = sizes.pop("activations")
    return sum(sizes.values()) + round(activations / (1 + ALLOCATOR_SLACK))


def counted_bytes(plan: MemoryPlan) -> int:
    """Most bytes alive on the device while the denoising loop of a plan runs."""
    job = plan.job
    config = config_of(job.models.transformer)
    quantised = plan.denoise.weights == "int8"
    linear = partial(Int8Linear, dtype=torch.bfloat16) if quantised else nn.Linear
    with META:
        model = DiffusionTransformer3D(config, attention=_output_alone, linear=linear)
        model = model.to(torch.bfloat16).eval()
    placement = dataclasses.replace(placement_of(plan), kept=False)  # nothing that could be kept
    reader = cast(TransformerReader, _NothingRead(model))
    latent = (job.latent_frames, job.height_px // 8, job.width_px // 8, config.in_visual_dim)
    prompts = [Conditioning(torch.empty(0), torch.empty(0)) for _ in range(job.branches)]
    negative = prompts[1] if job.guided else None
    guidance = Guidance(prompts[0], negative, GUIDANCE if job.guided else 1.0)
    with torch.inference_mode(), _DeviceBytes(apart_from=model) as live:
        tenant = TransformerTenant(reader, device=META, placement=placement)
        try:
            denoise(
                tenant.enter(),
                torch.empty(latent, device=META),
                guidance,
                schedule(STEPS, 5.0),
                conditioning=_Fetched(plan),
            )
        finally:
            tenant.close()
    return live.peak_bytes


def decoding_bytes(plan: MemoryPlan) -> int:
    """Most bytes alive on the device while the result is decoded, the VAE's weights included."""
    weights_bytes = plan.job.models.vae.total_bytes(plan.job.number_bytes)
    return weights_bytes + rolling_cost(plan.decode_tiles).peak_bytes


class _DeviceBytes(LiveBytes):
    """Counts what is on the meta device, apart from the empty model; says yes to questions about numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _QUESTIONS and args[0].is_meta:
            return True
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type == META.type:
            super()._add(storage)


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


def _output_alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query)

"""The memory plan of a job, and what the models' homes and placements are by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch

from kandinsky5.errors import OutOfMemory
from kandinsky5.family import TransformerShape
from kandinsky5.memory.budget import GB, Budget
from kandinsky5.memory.demand import PlanChoices, PlanRequest
from kandinsky5.memory.free import budget_for
from kandinsky5.memory.plan import MemoryPlan, make_plan
from kandinsky5.memory.whole import Home
from kandinsky5.model.chunks import ActivationChunks
from kandinsky5.model.dit import DiTConfig
from kandinsky5.pipeline.transformer import Placement
from kandinsky5.request import RANGES, GenerationRequest

WORKING_FORMATS = ("bf16", "int8")
"""What ``auto`` may choose for the transformer: those that have been shown to give right numbers."""
WORKING_TEXT_FORMATS = ("bf16",)

_SETTINGS = ("weights", "chunk_tokens", "chunk_heads")
_STORED = {"fp32": "fp32", "int8": "int8", "fp8": "fp8"}
"""Beginning of what a file says of its weights → format in a plan; all else is as large as bf16."""


def file_format(stored_as: str) -> str:
    """A plan's word for what :attr:`kandinsky5.model.inspect.FileReport.quantization` says."""
    return next((name for start, name in _STORED.items() if stored_as.startswith(start)), "bf16")


def planned(
    request: GenerationRequest,
    config: DiTConfig,
    stored_as: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    before: Mapping[str, Any] | None = None,
    adapter_bytes: int = 0,
) -> MemoryPlan:
    """As :func:`plan_of`, where the whole job has to fit.

    Raises:
        OutOfMemory: it does not fit, with what would.
        UserError: a budget or choice that cannot be.
    """
    plan = plan_of(
        request,
        config,
        stored_as,
        device=device,
        dtype=dtype,
        before=before,
        adapter_bytes=adapter_bytes,
    )
    if not plan.fits:
        raise OutOfMemory("this job does not fit: " + "; ".join(plan.problems))
    return plan


def plan_of(
    request: GenerationRequest,
    config: DiTConfig | None,
    stored_as: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    before: Mapping[str, Any] | None = None,
    adapter_bytes: int = 0,
) -> MemoryPlan:
    """The plan of a settled request whose size is known, whether it fits or not.

    Args:
        config: the transformer's dimensions; None takes the preset's.
        stored_as: its file's quantisation.
        device, dtype: where and what is computed.
        before: what a run that is gone on with was computed in, as :func:`settings_of` gave it; the same
            settings give the same bits.
        adapter_bytes: of LoRAs, held where the transformer computes: so much less is left for the rest.

    Raises:
        UserError: a budget or choice that cannot be.
    """
    budget, _ = budget_for(dataclasses.replace(request, device=str(device)))
    if device.type == "cpu":
        budget = dataclasses.replace(budget, vram_bytes=None)
    if adapter_bytes:
        budget = _with_room_for(adapter_bytes, budget)
    job = PlanRequest.of(
        request,
        transformer=(
            None if config is None else TransformerShape.of_config(dataclasses.asdict(config))
        ),
        file_weights=file_format(stored_as),
        dtype="fp32" if dtype == torch.float32 else "bf16",
        choices=_choices(before or {}),
    )
    job = dataclasses.replace(job, formats=WORKING_FORMATS, text_formats=WORKING_TEXT_FORMATS)
    return make_plan(job, budget)


def _with_room_for(adapter_bytes: int, budget: Budget) -> Budget:
    """What is left beside them; a budget they fill altogether is found out in the loop."""
    least = round(RANGES["vram"][0] * GB)
    if budget.vram_bytes is None:
        return dataclasses.replace(budget, ram_bytes=max(least, budget.ram_bytes - adapter_bytes))
    return dataclasses.replace(budget, vram_bytes=max(least, budget.vram_bytes - adapter_bytes))


def _choices(before: Mapping[str, Any]) -> PlanChoices:
    """What :func:`settings_of` said; anything else that stands in a file is left to the plan."""
    weights, tokens, heads = (before.get(name) for name in _SETTINGS)
    return PlanChoices(
        weights=weights if weights in WORKING_FORMATS else None,
        chunk_tokens=tokens if type(tokens) is int else None,
        chunk_heads=heads if type(heads) is int else None,
    )


def settings_of(plan: MemoryPlan) -> dict[str, Any]:
    """What of a plan decides the bits of the result; JSON-ready."""
    denoise = plan.denoise
    weights = "bf16" if denoise.weights == "fp32" else denoise.weights
    return {
        "weights": weights,
        "chunk_tokens": denoise.chunk_tokens or plan.job.tokens,
        "chunk_heads": denoise.chunk_heads or plan.job.models.transformer.heads,
    }


def placement_of(plan: MemoryPlan) -> Placement:
    """Where the transformer's blocks go."""
    denoise, home = plan.denoise, plan.homes["transformer"]
    source: Literal["ram", "disk"] = "disk" if denoise.source == "disk" else "ram"
    streams = denoise.streamed_blocks > 0
    return Placement(
        resident=denoise.resident_blocks if streams else None,
        slots=max(denoise.slots, 1),
        source=source,
        ring=max(denoise.ring, 2),
        stays=home == "device" or (plan.budget.on_cpu and home == "ram"),
        kept=home == "ram" and not streams and not plan.budget.on_cpu,
        chunks=ActivationChunks(denoise.chunk_tokens, denoise.chunk_heads),
    )


def home_of(plan: MemoryPlan, model: str) -> Home:
    """Where a model waits between uses."""
    home = plan.homes.get(model, "disk")  # a plan that does not fit has no homes
    return home  # type: ignore[return-value]


def changes(before: MemoryPlan, after: MemoryPlan) -> str:
    """In words what a smaller plan does otherwise."""
    said = []
    old, new = before.denoise, after.denoise
    if after.homes != before.homes:
        said.append("no model waits on the device")
    if new.resident_blocks != old.resident_blocks:
        said.append(f"{new.resident_blocks} instead of {old.resident_blocks} blocks stay there")
    if (new.chunk_tokens, new.chunk_heads) != (old.chunk_tokens, old.chunk_heads):
        said.append("smaller chunks")
    if after.decode_tiles != before.decode_tiles:
        said.append(f"decoding in {after.decode_tiles.tiles} tiles")
    if after.text != before.text:
        said.append("the text encoder layer by layer")
    if after.encode_tiles != before.encode_tiles:
        said.append("encoding in tiles")
    return ", ".join(said) or "less at a time"

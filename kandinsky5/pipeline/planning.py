"""The memory plan of a job, and what the models' homes and placements are by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch

from kandinsky5.errors import OutOfMemory
from kandinsky5.family import TextEncoderShape, TransformerShape
from kandinsky5.memory.demand import PlanChoices, PlanRequest
from kandinsky5.memory.free import budget_for, text_formats
from kandinsky5.memory.plan import MemoryPlan, lowered, make_plan
from kandinsky5.memory.whole import Home
from kandinsky5.model.chunks import ActivationChunks
from kandinsky5.model.dit import DiTConfig
from kandinsky5.model.facts import TextEncoderFacts
from kandinsky5.pipeline.transformer import Placement
from kandinsky5.pipeline.trusted_text import with_trusted_text
from kandinsky5.pipeline.trusted_weights import with_trusted_weights
from kandinsky5.request import GenerationRequest

WORKING_FORMATS = ("bf16", "int8")
"""What ``auto`` may choose for the transformer; :func:`planned` leaves out what fails on the device."""

_RESUMED = {"bf16": "bf16", "fp32": "bf16", "int8": "int8", "fp8": "fp8"}
"""Format in which a run was computed → choice that comes to the same; in float32 bf16 means that."""
_MOST_RESIDENT = "most_resident_blocks"
_STORED = {"fp32": "fp32", "int8": "int8", "fp8": "fp8"}
"""Beginning of what a file says of its weights → format in a plan; all else is as large as bf16."""


def file_format(stored_as: str) -> str:
    """A plan's word for what :attr:`kandinsky5.model.inspect.FileReport.quantization` says."""
    return next((name for start, name in _STORED.items() if stored_as.startswith(start)), "bf16")


def planned(
    plan: MemoryPlan, device: torch.device, before: Mapping[str, Any] | None = None
) -> MemoryPlan:
    """The plan that a job begins with, of :func:`plan_of`'s: it fits, and its weights are right here.

    Args:
        before: as for :func:`plan_of`; a run that ran out of memory goes on with no more than it had then.

    Raises:
        OutOfMemory: the job does not fit, with what would.
        UserError: weights in the format asked for give wrong numbers on this device.
    """
    if not plan.fits:
        raise OutOfMemory("this job does not fit: " + "; ".join(plan.problems))
    plan = with_trusted_weights(plan, device)
    most = (before or {}).get(_MOST_RESIDENT)
    if type(most) is not int or plan.denoise.resident_blocks <= most:
        return plan
    while plan.denoise.resident_blocks > most and (smaller := lowered(plan)) is not None:
        plan = smaller
    notice = f"memory ran out before: no more than {most} blocks stay on the device"
    return dataclasses.replace(plan, notices=(*plan.notices, notice))


def plan_of(
    request: GenerationRequest,
    config: DiTConfig | None,
    stored_as: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    before: Mapping[str, Any] | None = None,
    adapter_bytes: int = 0,
    text_encoder: TextEncoderFacts | None = None,
) -> MemoryPlan:
    """The plan of a settled request whose size is known, whether it fits or not.

    Args:
        config: the transformer's dimensions; None takes the preset's.
        text_encoder: its dimensions; None takes the preset's.
        stored_as: its file's quantisation.
        device, dtype: where and what is computed.
        before: what a run that is gone on with was computed in, as :func:`settings_of` gave it; the same
            settings give the same bits.
        adapter_bytes: of LoRAs, held where the transformer computes: so much less is left for the rest.

    Raises:
        UserError: a budget or choice that cannot be; NF4 is asked for and does not work here.
    """
    budget, _ = budget_for(dataclasses.replace(request, device=str(device)))
    if device.type == "cpu":
        budget = dataclasses.replace(budget, vram_bytes=None)
    budget = budget.beside(adapter_bytes)
    encoder = None if text_encoder is None else dataclasses.asdict(text_encoder)
    job = PlanRequest.of(
        request,
        transformer=(
            None if config is None else TransformerShape.of_config(dataclasses.asdict(config))
        ),
        text_encoder=None if encoder is None else TextEncoderShape.of_dimensions(encoder),
        file_weights=file_format(stored_as),
        dtype="fp32" if dtype == torch.float32 else "bf16",
        choices=_choices(before or {}),
    )
    job = dataclasses.replace(job, formats=WORKING_FORMATS, text_formats=text_formats())
    return with_trusted_text(make_plan(job, budget), device)


def _choices(before: Mapping[str, Any]) -> PlanChoices:
    """What :func:`settings_of` said; anything else that stands in a file is left to the plan."""
    weights, tokens, heads = (before.get(n) for n in ("weights", "chunk_tokens", "chunk_heads"))
    return PlanChoices(
        weights=_RESUMED.get(weights) if isinstance(weights, str) else None,
        chunk_tokens=tokens if type(tokens) is int else None,
        chunk_heads=heads if type(heads) is int else None,
    )


def settings_to_go_on(plan: MemoryPlan, *, is_lowered: bool) -> dict[str, Any]:
    """What a saved run carries along of its plan; JSON-ready. ``is_lowered``: memory had run out."""
    most = {_MOST_RESIDENT: plan.denoise.resident_blocks} if is_lowered else {}
    return settings_of(plan) | most


def was_lowered(before: Mapping[str, Any] | None) -> bool:
    """Whether a run that is gone on with had run out of memory."""
    return _MOST_RESIDENT in (before or {})


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
        tiles = after.decode_tiles.tiles
        said.append(f"decoding in {tiles} tiles" if tiles > 1 else "decoding frame by frame")
    if after.text != before.text:
        is_left_out = before.text.expand is not None and after.text.expand is None
        said.append("the prompt as it is" if is_left_out else "less of the text encoder at once")
    if after.encode_tiles != before.encode_tiles:
        said.append("encoding in tiles")
    return ", ".join(said) or "less at a time"

"""``k1.py plan``: the memory plan of a job for a machine, as a document and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky5.errors import CheckpointError
from kandinsky5.memory.budget import GB, in_gb
from kandinsky5.memory.demand import PlanRequest
from kandinsky5.memory.free import budget_for, text_formats
from kandinsky5.memory.plan import MemoryPlan, make_plan
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, settle

if TYPE_CHECKING:
    from kandinsky5.family import TextEncoderShape, TransformerShape

BAR_CELLS = 24
_FILE_FORMATS = {"fp32": "fp32", "int8": "int8", "fp8": "fp8"}
"""Beginning of what a file says of its weights → format in a plan; all else is as large as bf16."""


@dataclass(frozen=True)
class OwnFiles:
    """What a plan takes from files instead of the preset.

    Attributes:
        transformer, text_encoder: their dimensions; None for the preset's.
        weights: format of the transformer's.
        writes: whether the text encoder can expand a prompt.
        lora_parameters: numbers in all LoRAs that act.
        notices: what is unusual about them.
    """

    transformer: TransformerShape | None = None
    text_encoder: TextEncoderShape | None = None
    weights: str = "bf16"
    writes: bool = True
    lora_parameters: int = 0
    notices: tuple[str, ...] = ()


def plan_of(
    typed: Mapping[str, Any], models_dirs: Sequence[Path] = ()
) -> tuple[dict[str, Any], str]:
    """The plan for what was typed: the fields of a request, none of them necessary.

    Args:
        models_dirs: looked through for the parts of a model that are not named.

    Returns:
        A JSON-ready document, and the same for a person.

    Raises:
        UserError: a value out of its range, or a choice that cannot be met.
        CheckpointError: a file is unusable, or not for this preset.
    """
    request, notices = settle(_with_placeholders(typed))
    budget, about = budget_for(request)
    files = OwnFiles()
    if request.model_dir or request.loras:
        files = _of_model(request, models_dirs)
    elif request.dit:
        files = _of_file(request)
    job = PlanRequest.of(
        dataclasses.replace(request, expand=request.expand and files.writes),
        transformer=files.transformer,
        text_encoder=files.text_encoder,
        file_weights=files.weights,
        dtype="fp32" if request.dtype == "fp32" or budget.on_cpu else "bf16",
    )
    left = budget.beside(files.lora_parameters * job.number_bytes)
    plan = make_plan(dataclasses.replace(job, text_formats=text_formats()), left)
    plan = dataclasses.replace(plan, notices=(*notices, *files.notices, *about, *plan.notices))
    return plan.to_dict(), as_text(plan)


def as_text(plan: MemoryPlan) -> str:
    """A table of the stages and what matters of the rest."""
    job, denoise, budget = plan.job, plan.denoise, plan.budget
    evaluations = "2 evaluations" if job.guided else "1 evaluation"
    lines = [
        f"{job.preset}: {job.width_px}×{job.height_px} px, {job.frames} frames, {job.tokens:,} tokens;"
        f" {job.steps} steps of {evaluations}",
        f"{'fits' if plan.fits else 'DOES NOT FIT'}: {_of_budget(plan)}",
        "",
        *_table(plan),
        "",
        f"per step      {in_gb(denoise.streamed_bytes_per_step)} of weights to the device"
        f"{' for both evaluations together' if job.guided else ''},"
        f" {in_gb(job.step_table_bytes)} of vectors",
        f"chunks        {_chunk(denoise.chunk_tokens, job.tokens)} tokens,"
        f" {_chunk(denoise.chunk_heads, job.models.transformer.heads)} heads",
    ]
    if denoise.streamed_blocks:
        lines.insert(
            -2,
            f"main memory   {in_gb(denoise.pinned_bytes)} of blocks, {denoise.slots} slots on the device",
        )
    if plan.homes:
        places = {"device": "on the device", "ram": "in RAM", "disk": "on disk"}
        waiting = (f"{model} {places[home]}" for model, home in plan.homes.items())
        lines.append(f"between uses  {', '.join(waiting)}")
    lines += [f"problem: {line}" for line in plan.problems]
    lines += [f"note: {line}" for line in plan.notices]
    speeds = budget.speeds
    lines.append(
        f"times are reckoned with {speeds.flops_per_s / 1e12:.0f} TFLOP/s,"
        f" {speeds.link_bytes_per_s / GB:.0f} GB/s to the device and"
        f" {speeds.disk_bytes_per_s / GB:.0f} GB/s from disk: they serve to compare plans"
    )
    return "\n".join(lines)


def _table(plan: MemoryPlan) -> list[str]:
    on_cpu = plan.budget.on_cpu
    limit = plan.budget.ram_bytes if plan.budget.vram_bytes is None else plan.budget.vram_bytes
    used = "RAM" if on_cpu else "VRAM"
    lines = [
        f"{'STAGE':13} {used:>8} {'':{BAR_CELLS}} {'' if on_cpu else 'RAM':>8} {'TIME':>8}  HOW"
    ]
    for item in plan.stages:
        peak = item.peak_ram_bytes if on_cpu else item.peak_vram_bytes
        ram = "" if on_cpu else in_gb(item.peak_ram_bytes)
        lines.append(
            f"{item.name:13} {in_gb(peak):>8} {_bar(peak / limit)} {ram:>8}"
            f" {_duration(item.seconds):>8}  {item.does}"
        )
    return lines


def _bar(share: float) -> str:
    """Filled as far as the budget is; an arrow where it is passed."""
    if share > 1:
        return "█" * (BAR_CELLS - 1) + "▶"
    filled = round(share * BAR_CELLS)
    return "█" * filled + "░" * (BAR_CELLS - filled)


def _of_budget(plan: MemoryPlan) -> str:
    budget = plan.budget
    parts = [f"{in_gb(plan.peak_ram_bytes)} of {in_gb(budget.ram_bytes)} RAM"]
    if budget.vram_bytes is not None:
        parts.insert(0, f"{in_gb(plan.peak_vram_bytes)} of {in_gb(budget.vram_bytes)} VRAM")
    return ", ".join(parts)


def _chunk(size: int | None, whole: int) -> str:
    return f"all {whole:,}" if size is None or size >= whole else f"{size:,} of {whole:,}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _with_placeholders(typed: Mapping[str, Any]) -> GenerationRequest:
    """A whole request: what a plan does not depend on is filled in."""
    preset = PRESETS.get(typed.get("preset", GenerationRequest.preset))
    values = {**typed, "prompt": "a plan"}
    if preset is not None:
        values["image"] = "a picture" if preset.takes_image else None
        if not typed.get("width") and not typed.get("height"):
            values["width"], values["height"] = preset.sizes_px[0]
    return GenerationRequest.from_dict(values)


def _of_model(request: GenerationRequest, models_dirs: Sequence[Path]) -> OwnFiles:
    """Of a whole model, every part of which has to be here, and of the LoRAs beside it."""
    from kandinsky5.family import TextEncoderShape, TransformerShape
    from kandinsky5.model.facts import text_encoder_facts, transformer_facts  # imports torch
    from kandinsky5.model.loading import find_model_files
    from kandinsky5.model.text_generation import can_write
    from kandinsky5.pipeline.adapters import chosen_loras

    files = find_model_files(request, models_dirs)
    found = transformer_facts(files.transformer)
    loras = chosen_loras(request, found.config, models_dirs)
    encoder = None
    if not PRESETS[request.preset].is_builtin and (told := text_encoder_facts(files.text_encoder)):
        encoder = TextEncoderShape.of_dimensions(dataclasses.asdict(told))
    return OwnFiles(
        TransformerShape.of_config(dataclasses.asdict(found.config)),
        encoder,
        _format_of(found.stored_as),
        encoder is None or can_write(files.text_encoder),
        sum(lora.file.parameters for lora in loras if lora.strength),
        (*files.notices, *(lora.notice for lora in loras)),
    )


def _format_of(stored_as: str) -> str:
    return next(
        (name for start, name in _FILE_FORMATS.items() if stored_as.startswith(start)), "bf16"
    )


def _of_file(request: GenerationRequest) -> OwnFiles:
    """Of a transformer alone."""
    from kandinsky5.family import TransformerShape
    from kandinsky5.model.checkpoint import Checkpoint  # imports torch
    from kandinsky5.model.dit import DiTConfig
    from kandinsky5.model.files import typed_path
    from kandinsky5.model.inspect import check_fits, inspect_file

    path = typed_path("dit", str(request.dit))
    report = inspect_file(path)
    if report.kind != "dit" or report.problems or report.config is None:
        reason = "; ".join(report.problems) or f"is a {report.kind}, not a transformer"
        raise CheckpointError(path, reason)
    with Checkpoint(path) as checkpoint:
        warning = check_fits(checkpoint, DiTConfig(**report.config), PRESETS[request.preset])
    return OwnFiles(
        TransformerShape.of_config(report.config),
        weights=_format_of(report.quantization),
        notices=(warning,) if warning else (),
    )

"""The memory plan as a fragment of the page: what fits, each stage as a bar, and what matters of the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kandinsky5.ui.views import duration_text, gigabytes, safe

if TYPE_CHECKING:
    from kandinsky5.memory.plan import MemoryPlan
    from kandinsky5.memory.stage import Part, StagePlan
    from kandinsky5.ui.planning import Outlook

STAGE_NAMES = {
    "expand": "Expand",
    "encode text": "Prompt",
    "encode image": "Image",
    "prepare": "Prepare",
    "denoise": "Paint",
    "decode": "Decode",
}
KINDS = {
    "weights": "weights",
    "work": "working memory",
    "waiting": "models that wait",
    "system": "CUDA, program",
}
"""Kinds of memory, as the style sheet colours them, and what the legend calls them."""
SYSTEM_PARTS = ("CUDA", "process")
WEIGHT_PARTS = (
    "text encoder",
    "token table",
    "vision tower, output layer",
    "layers, pinned",
    "CLIP",
    "text block or modulation",
    "embeddings, output layer",
    "resident blocks",
    "blocks, pinned",
    "slots",
    "text blocks, slots",
    "modulations, slots",
    "VAE",
)
DULL_SHARE = 0.25
"""Below this share of the budget the stages of a plan for the CPU need no picture."""
WAITING = (
    '<section class="k1-plan" data-fits="unknown"><p class="k1-line"><b>Memory</b>'
    "<span>looking at this machine…</span></p></section>"
)


def plan_view(outlook: Outlook | None) -> str:
    """The plan; a line of patience while the machine is not known."""
    if outlook is None:
        return WAITING
    plan = outlook.plan
    fits, head = ("yes", "Fits in memory") if plan.fits else ("no", "Does not fit")
    problems = _list("k1-plan-problems", map(_sentence, plan.problems))
    return (
        f'<section class="k1-plan" data-fits="{fits}" aria-label="Memory plan">'
        f'<p class="k1-line"><b>{head}</b><span>{safe(_totals(outlook))}</span></p>{problems}'
        f"{_picture(plan)}{_list('k1-facts', _facts(outlook))}"
        f"{_list('k1-notices', map(_sentence, outlook.notices))}</section>"
    )


def _list(name: str, lines: Iterable[str]) -> str:
    """Lines as a list of a class; nothing where there are none."""
    items = "".join(f"<li>{safe(line)}</li>" for line in lines)
    return f'<ul class="{name}">{items}</ul>' if items else ""


def no_plan(text: str) -> str:
    """Why there is none: a value that cannot be used."""
    return (
        '<section class="k1-plan" data-fits="no"><p class="k1-line"><b>No plan</b>'
        f"<span>{safe(text)}</span></p></section>"
    )


def _totals(outlook: Outlook) -> str:
    plan, budget = outlook.plan, outlook.plan.budget
    if not plan.fits:
        vram = f"{gigabytes(plan.peak_vram_bytes)} VRAM · " if not budget.on_cpu else ""
        return f"{vram}{gigabytes(plan.peak_ram_bytes)} RAM needed"
    parts = [f"{gigabytes(plan.peak_ram_bytes)} of {gigabytes(budget.ram_bytes)} RAM"]
    if budget.vram_bytes is not None:
        parts.insert(0, f"{gigabytes(plan.peak_vram_bytes)} of {gigabytes(budget.vram_bytes)} VRAM")
    if outlook.expected_s is not None:
        parts.append(f"about {duration_text(_roughly(outlook.expected_s))}")
    return " · ".join(parts)


def _roughly(seconds: float) -> float:
    """A prediction without digits that it cannot have."""
    grain = next((grain for limit, grain in ((10, 1), (120, 5), (600, 30)) if seconds < limit), 60)
    return max(1, round(seconds / grain)) * grain


def _facts(outlook: Outlook) -> Iterable[str]:
    plan = outlook.plan
    denoise, job = plan.denoise, plan.job
    yield f"{job.tokens:,} tokens"
    if outlook.card is None:
        yield "on the CPU"
    else:
        yield outlook.card
        yield f"{denoise.weights} weights"
        blocks = denoise.resident_blocks + denoise.streamed_blocks
        where = {"pinned": "RAM", "disk": "disk"}.get(denoise.source, denoise.source)
        if not denoise.streamed_blocks:
            yield f"all {blocks} blocks stay on the GPU"
        elif not denoise.resident_blocks:
            yield f"all {blocks} blocks come from {where}"
        else:
            stay = f"{denoise.resident_blocks} of {blocks} blocks stay on the GPU"
            yield f"{stay}, the others come from {where}"
        if denoise.streamed_bytes_per_step:
            yield f"{gigabytes(denoise.streamed_bytes_per_step)} moved in a step"
    if plan.decode_tiles.tiles > 1:
        yield f"decoded in {plan.decode_tiles.tiles} tiles"
    if plan.fits and outlook.expected_s is not None:
        yield _source_of_time(outlook)


def _source_of_time(outlook: Outlook) -> str:
    if outlook.past_runs:
        return f"time from {outlook.past_runs} run{'s' * (outlook.past_runs > 1)} here"
    return "time reckoned for an RTX 4090"


def _picture(plan: MemoryPlan) -> str:
    """A bar for each stage, stacked by what fills it, against the budget; nothing where nothing is scarce."""
    budget = plan.budget
    on_cpu = budget.vram_bytes is None
    limit = budget.ram_bytes if budget.vram_bytes is None else budget.vram_bytes
    there = budget.machine_ram_bytes if on_cpu else budget.machine_vram_bytes
    peaks = [item.peak_ram_bytes if on_cpu else item.peak_vram_bytes for item in plan.stages]
    if on_cpu and max(peaks) < DULL_SHARE * limit:
        return ""
    scale = max(limit, there or 0, *peaks)
    rows = "".join(
        _stage_row(item, item.ram if on_cpu else item.vram, limit, scale) for item in plan.stages
    )
    parts = [part.name for item in plan.stages for part in (item.ram if on_cpu else item.vram)]
    kinds, use = set(map(kind_of, parts)), "RAM" if on_cpu else "VRAM"
    legend = "".join(
        f'<li><i class="k1-m-{kind}"></i>{name}</li>'
        for kind, name in KINDS.items()
        if kind in kinds
    )
    mark = "" if limit >= scale else '<li><i class="k1-m-limit"></i>budget</li>'
    return (
        f'<ul class="k1-stages" aria-label="{use} by stage">{rows}</ul>'
        f'<ul class="k1-legend" aria-hidden="true">{legend}{mark}</ul>'
    )


def _stage_row(item: StagePlan, parts: Sequence[Part], limit: int, scale: int) -> str:
    name = STAGE_NAMES.get(item.name, item.name)
    peak = sum(part.size_bytes for part in parts)
    pieces = "".join(
        f'<i class="k1-m-{kind_of(part.name)}" style="width:{100 * part.size_bytes / scale:.2f}%"'
        f' title="{safe(part.name)}: {gigabytes(part.size_bytes)}"></i>'
        for part in parts
    )
    over = ' class="k1-over"' if peak > limit else ""
    return (
        f'<li{over} title="{safe(name)}: {safe(item.does)}"><span>{safe(name)}</span>'
        f'<div class="k1-stack" aria-hidden="true">{pieces}'
        f'<b style="left:{100 * limit / scale:.2f}%"></b></div><em>{gigabytes(peak)}</em></li>'
    )


def kind_of(part: str) -> str:
    """Which of :data:`KINDS` a part of a stage's memory is."""
    if part.endswith(", waiting"):
        return "waiting"
    if part in SYSTEM_PARTS:
        return "system"
    return "weights" if part in WEIGHT_PARTS else "work"


def _sentence(line: str) -> str:
    for stage, name in STAGE_NAMES.items():
        if line.startswith(f"{stage} needs "):
            line = line.replace(stage, name, 1)
    return f"{line[:1].upper()}{line[1:]}." if line else ""

"""The memory plan of a job: which weights lie where, in what pieces it is computed, and what that takes.

Arithmetic only: (request, budget) → :class:`MemoryPlan`. Needs no torch, so that the page can draw it.
How each stage is reckoned stands in ``text_stages``, ``denoise_stages`` and ``vae_stages``; how one way is
chosen in ``stage``; what is suggested when nothing fits in ``remedies``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kandinsky5.errors import UserError
from kandinsky5.family import PLAIN_FORMATS
from kandinsky5.memory.budget import GB, Budget
from kandinsky5.memory.demand import MIN_SLOTS, PlanChoices, PlanRequest
from kandinsky5.memory.denoise_stages import (
    CHUNK_TOKENS,
    HEAD_PARTS,
    RING,
    DenoisePlan,
    denoise_option,
    denoise_options,
    step_seconds,
)
from kandinsky5.memory.homes import best_homes, residents, with_waiting
from kandinsky5.memory.stage import Option, Staged, StagePlan, best_of
from kandinsky5.memory.text_stages import (
    TextPlan,
    best_text,
    best_text_of,
    text_options,
    why_not_expanded,
)
from kandinsky5.memory.vae_stages import (
    COMPRESSION,
    OWN_STATISTICS_OVERLAP_PX,
    decode_bytes,
    decode_option,
    decode_options,
    decode_overlap_px,
    encode_option,
    encode_options,
)
from vae_tiling.plan import TilePlan, smaller_plan

LET_GO = ("text encoders", "VAE", "transformer")
"""In this order models no longer wait in main memory where a smaller plan takes more of it."""


@dataclass(frozen=True)
class MemoryPlan(Staged):
    """A plan.

    Attributes:
        job, budget: what it was made for.
        text: how the text encoder is run.
        denoise: how the transformer is run.
        decode_tiles: of the VAE's decoder.
        encode_tiles: of its encoder; None without an input picture.
        stages: in the order in which they run, what waits beside them included.
        homes: model (``text encoders``, ``transformer``, ``VAE``) → where it waits while it is not
            used: ``device``, ``ram`` or ``disk``.
        problems: why it does not fit, and what would; empty when it fits.
        notices: what the user should know of a plan that fits.
    """

    job: PlanRequest
    budget: Budget
    text: TextPlan
    denoise: DenoisePlan
    decode_tiles: TilePlan
    encode_tiles: TilePlan | None
    stages: tuple[StagePlan, ...]
    homes: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def seconds_per_step(self) -> float:
        return step_seconds(self.job, self.budget, self.denoise)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        denoise, text, job = self.denoise, self.text, self.job
        tile_height, tile_width = (c * COMPRESSION.space for c in self.decode_tiles.largest_tile)
        return {
            "fits": self.fits,
            "preset": job.preset,
            "model": job.models.transformer.name,
            "width": job.width_px,
            "height": job.height_px,
            "frames": job.frames,
            "steps": job.steps,
            "tokens": job.tokens,
            "vram_budget_bytes": self.budget.vram_bytes,
            "ram_budget_bytes": self.budget.ram_bytes,
            "peak_vram_bytes": self.peak_vram_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
            "weights": denoise.weights,
            "weights_source": denoise.source,
            "block_bytes": denoise.block_bytes,
            "resident_blocks": denoise.resident_blocks,
            "streamed_blocks": denoise.streamed_blocks,
            "slots": denoise.slots,
            "ring": denoise.ring,
            "pinned_bytes": denoise.pinned_bytes,
            "streamed_bytes_per_step": denoise.streamed_bytes_per_step,
            "conditioning_bytes_per_step": job.step_table_bytes,
            "chunk_tokens": denoise.chunk_tokens,
            "chunk_heads": denoise.chunk_heads,
            "text_encoder": dataclasses.asdict(text),
            "vae_tiles": self.decode_tiles.tiles,
            "vae_tile_px": [tile_width, tile_height],
            "homes": dict(self.homes),
            "seconds_per_step": round(self.seconds_per_step, 3),
            "seconds": round(self.seconds, 1),
            "stages": [item.to_dict() for item in self.stages],
            "problems": list(self.problems),
            "notices": list(self.notices),
        }


def make_plan(job: PlanRequest, budget: Budget) -> MemoryPlan:
    """The quickest plan within the budget; where none fits, the nearest one, with its problems.

    Raises:
        UserError: a choice of the user's cannot be met, though without it the job would fit.
    """
    plan = _quickest(job, budget)
    if _is_within(plan):
        return _with_homes(plan)
    made = job.choices.made
    for name, value in made.items():
        freed = dataclasses.replace(job, choices=dataclasses.replace(job.choices, **{name: None}))
        if _is_within(_quickest(freed, budget)):
            raise UserError(name, value, f"{_excess(plan)[0]}; auto fits")
    if made and _is_within(_quickest(dataclasses.replace(job, choices=PlanChoices()), budget)):
        raise UserError(
            ", ".join(made), list(made.values()), f"{_excess(plan)[0]}; all of them on auto fits"
        )
    from kandinsky5.memory.remedies import remedies  # it makes plans itself

    return dataclasses.replace(
        plan, problems=(*_excess(plan), *remedies(job, budget)), notices=budget.notices
    )


def fits(job: PlanRequest, budget: Budget) -> bool:
    """Whether there is a plan within the budget."""
    return _is_within(_quickest(job, budget))


def lowered(plan: MemoryPlan, stage: str = "denoise") -> MemoryPlan | None:
    """The next smaller plan, after the device's memory ran out in a stage; None where there is none.

    First nothing waits on the device any more. Then, in the loop: half of the resident blocks, none of
    them, smaller chunks of tokens, smaller groups of heads. For the VAE: smaller tiles. Predictions for the
    device play no part, memory did run out; main memory stays within its budget.
    """
    smaller = _smaller(plan, stage)
    if smaller is None or smaller.peak_ram_bytes > plan.budget.ram_bytes:
        return None
    return smaller


def _smaller(plan: MemoryPlan, stage: str) -> MemoryPlan | None:
    if "device" in plan.homes.values():
        homes = {n: "ram" if home == "device" else home for n, home in plan.homes.items()}
        return _rebuilt(plan, homes=homes)
    if stage == "denoise":
        denoise = _smaller_denoise(plan)
        return None if denoise is None else _rebuilt(plan, denoise=denoise)
    if stage == "decode":
        tiles = _smaller_decode(plan)
        return None if tiles is None else _rebuilt(plan, decode_tiles=tiles)
    if stage == "encode image" and plan.encode_tiles is not None:
        tiles = smaller_plan(plan.encode_tiles, overlap=OWN_STATISTICS_OVERLAP_PX)
        return None if tiles is None else _rebuilt(plan, encode_tiles=tiles)
    if stage in ("expand", "encode text"):
        return _streaming_text(plan)
    return None


def _quickest(job: PlanRequest, budget: Budget) -> MemoryPlan:
    """Stage by stage: each has the memory to itself, so each can be chosen by itself."""
    return _assembled(
        job,
        budget,
        best_text(job, budget),
        best_of(denoise_options(job, budget), budget),
        best_of(decode_options(job, budget), budget),
        best_of(encode_options(job, budget), budget) if job.picture else None,
    )


def _assembled(
    job: PlanRequest,
    budget: Budget,
    text: Option[TextPlan],
    denoise: Option[DenoisePlan],
    decode: Option[TilePlan],
    encode: Option[TilePlan] | None,
) -> MemoryPlan:
    stages = (*text.stages, *(encode.stages if encode else ()), *denoise.stages, *decode.stages)
    return MemoryPlan(
        job=job,
        budget=budget,
        text=text.settings,
        denoise=denoise.settings,
        decode_tiles=decode.settings,
        encode_tiles=encode.settings if encode else None,
        stages=stages,
    )


def _with_homes(plan: MemoryPlan) -> MemoryPlan:
    models = residents(plan.job, plan.text, plan.denoise)
    homes = best_homes(models, plan.stages, plan.budget)
    stages = with_waiting(models, homes, plan.stages, plan.budget)
    return dataclasses.replace(plan, stages=stages, homes=homes, notices=_notices(plan))


def _rebuilt(
    plan: MemoryPlan,
    *,
    text: Option[TextPlan] | None = None,
    denoise: DenoisePlan | None = None,
    decode_tiles: TilePlan | None = None,
    encode_tiles: TilePlan | None = None,
    homes: Mapping[str, str] | None = None,
) -> MemoryPlan:
    """The plan with something else in it, its stages reckoned anew."""
    job, budget = plan.job, plan.budget
    if text is None:
        text = next(o for o in text_options(job, budget) if o.settings == plan.text)
    encode = None
    if plan.encode_tiles is not None:
        encode = encode_option(job, budget, encode_tiles or plan.encode_tiles)
    bare = _assembled(
        job,
        budget,
        text,
        denoise_option(job, budget, denoise or plan.denoise),
        decode_option(job, budget, decode_tiles or plan.decode_tiles),
        encode,
    )
    homes = dict(plan.homes if homes is None else homes)
    models = residents(job, bare.text, bare.denoise)
    homes = {
        m.name: h if (h := homes[m.name]) in m.homes(budget.on_cpu) else "disk" for m in models
    }
    for leaves in (None, *LET_GO):  # as few as the budget of main memory wants
        if leaves is not None and homes[leaves] == "ram":
            homes[leaves] = "disk"
        stages = with_waiting(models, homes, bare.stages, budget)
        made = dataclasses.replace(bare, stages=stages, homes=homes, notices=plan.notices)
        if made.peak_ram_bytes <= budget.ram_bytes:
            return made
    if made.denoise.source == "pinned":
        from_disk = dataclasses.replace(made.denoise, source="disk", ring=RING)
        return _rebuilt(made, denoise=from_disk)
    return made


def _smaller_decode(plan: MemoryPlan) -> TilePlan | None:
    """The next way to decode that takes less: where what has no tiles decides, more of them do not help."""
    now_bytes = decode_bytes(plan.job, plan.decode_tiles)
    tiles: TilePlan | None = plan.decode_tiles
    while tiles is not None and decode_bytes(plan.job, tiles) >= now_bytes:
        tiles = smaller_plan(tiles, overlap=decode_overlap_px(plan.job))
    return tiles


def _smaller_denoise(plan: MemoryPlan) -> DenoisePlan | None:
    now, shape = plan.denoise, plan.job.models.transformer
    if now.resident_blocks and shape.visual_blocks > MIN_SLOTS:
        fewer = now.resident_blocks // 2 if now.resident_blocks > 4 else 0
        return _with_resident(plan, min(fewer, shape.visual_blocks - MIN_SLOTS - 1))
    tokens = min(now.chunk_tokens or plan.job.tokens, plan.job.tokens)
    if tokens > CHUNK_TOKENS[-1]:
        return dataclasses.replace(now, chunk_tokens=max(CHUNK_TOKENS[-1], tokens // 4))
    heads = now.chunk_heads or shape.heads
    if heads > -(-shape.heads // HEAD_PARTS[-1]):
        return dataclasses.replace(now, chunk_heads=-(-heads // 2))
    return None


def _with_resident(plan: MemoryPlan, count: int) -> DenoisePlan:
    """So many blocks stay, the others are streamed from RAM if there is room for them, else from disk."""
    now, blocks = plan.denoise, plan.job.models.transformer.visual_blocks
    from_disk = now.source == "disk" or plan.budget.on_cpu
    return dataclasses.replace(
        now,
        resident_blocks=count,
        streamed_blocks=blocks - count,
        slots=now.slots or MIN_SLOTS,
        source="disk" if from_disk else "pinned",
        ring=RING if from_disk else 0,
    )


def _streaming_text(plan: MemoryPlan) -> MemoryPlan | None:
    """The quickest way to run the text encoder that needs less of the device than now.

    At last the prompt is not expanded.
    """
    options = list(text_options(plan.job, plan.budget))
    now = next(option for option in options if option.settings == plan.text)
    smaller = [option for option in options if option.peak_vram_bytes < now.peak_vram_bytes]
    return _rebuilt(plan, text=best_text_of(smaller, plan.budget)) if smaller else None


def _is_within(plan: MemoryPlan) -> bool:
    return not _excess(plan)


def _excess(plan: MemoryPlan) -> tuple[str, ...]:
    """What does not fit, a line each."""
    lines = []
    for item in plan.stages:
        for name, needed, given in (
            ("VRAM", item.peak_vram_bytes, plan.budget.vram_bytes),
            ("RAM", item.peak_ram_bytes, plan.budget.ram_bytes),
        ):
            if given is not None and needed > given:
                lines.append(
                    f"{item.name} needs {needed / GB:.2f} GB of {name}, {given / GB:.2f} GB are given"
                )
    return tuple(lines)


def _notices(plan: MemoryPlan) -> tuple[str, ...]:
    lines = [*plan.budget.notices]
    denoise, job = plan.denoise, plan.job
    if denoise.source == "disk" and not plan.budget.on_cpu:
        why = "as asked" if job.choices.source == "disk" else "RAM is too small for them"
        lines.append(
            f"the blocks are read from disk in every step ({why}), which takes as long as the disk does"
        )
        if job.file_weights in PLAIN_FORMATS:
            again = " and nothing quantised again" if denoise.weights == "int8" else ""
            lines.append(
                "convert the file once with k1.py convert --to int8: half as much is read in a step then"
                f"{again}"
            )
    lines += _text_notices(plan)
    return tuple(lines)


def _text_notices(plan: MemoryPlan) -> Iterator[str]:
    job, budget, expand = plan.job, plan.budget, plan.text.expand
    if job.expand and expand is None:
        yield why_not_expanded(job, budget)
    elif expand is not None and expand.source != "resident":
        seconds = next(item.seconds for item in plan.stages if item.name == "expand")
        yield f"expanding the prompt streams the text encoder once a token: about {seconds:.0f} s"
    if budget.on_cpu and plan.text.encode.weights == "nf4":
        yield "a CPU takes minutes to quantise the text encoder to NF4, each time it is loaded"

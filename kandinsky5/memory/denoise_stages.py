"""Ways to run the transformer: what is prepared before the loop, and the loop. Arithmetic only, no torch.

Time is reckoned as the longest of computing, copying and reading, which overlap. Two things are not hidden
by overlap: what copying takes from the device's memory, and reading from disk at all, whose rate is the
least certain figure and which competes with everything else for the bus. int8 is reckoned to compute as
fast as bf16: what it gains depends on the card, and a plan is about memory.

Rule for ``auto``, which follows from these times: bf16 where its bytes fit on the device or in page-locked
RAM and are copied while the blocks compute; int8 where they would have to come from disk, or where waiting
for them would take longer than quantising once. Where even int8 has to come from disk, the file's own
format: quantising the same block in every step costs more than it saves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from kandinsky5.errors import UserError
from kandinsky5.memory.activations import activation_bytes
from kandinsky5.memory.budget import FREE_SHARE, Budget, in_gb
from kandinsky5.memory.demand import MIN_SLOTS, PlanRequest
from kandinsky5.memory.stage import Option, StagePlan, stage

RING = 3
"""Blocks held in main memory when they are streamed from the file."""
CHUNK_TOKENS = (4096, 2048, 1024)
"""Sizes tried; products of so many rows fill a device, more at once would only take memory."""
HEAD_PARTS = (1, 2, 4)
"""Into how many groups the heads may be divided."""
PREPARING_SLOTS = 2
"""For text blocks, and as many for modulations; as many slabs of main memory are read ahead into."""
TEXT_ROWS_COMPUTED = 16
"""Tensors of one prompt's length alive in a text block, in units of [text tokens, model_dim]."""

NABLA_SHARE = 0.3
"""Share of full attention that is computed with NABLA: an assumption."""
COPY_SHARE = 0.01
"""Part of the copying time that is lost although it overlaps."""
CHUNK_SECONDS = 3e-5
"""Launching the kernels for one more chunk of tokens in one block."""
NORM_BYTES = 20
"""Moved for each number when another group of heads normalises the tokens again."""


@dataclass(frozen=True)
class DenoisePlan:
    """How the transformer's weights and activations lie in the loop.

    Attributes:
        weights: ``bf16``, ``fp32``, ``int8`` or ``fp8``.
        source: of :data:`~kandinsky5.memory.demand.SOURCES`.
        resident_blocks, streamed_blocks: visual blocks that stay on the device, and that do not.
        block_bytes: of one visual block, without its modulation.
        slots: buffers on the device for streamed blocks; 0 when none is streamed.
        ring: blocks held in main memory when the source is ``disk``.
        chunk_tokens, chunk_heads: for ``ActivationChunks``; None is all.
    """

    weights: str
    source: str
    resident_blocks: int
    streamed_blocks: int
    block_bytes: int
    slots: int
    ring: int
    chunk_tokens: int | None
    chunk_heads: int | None

    @property
    def streamed_bytes_per_step(self) -> int:
        """Copied to the device in each step, both evaluations of a guided one together."""
        return self.streamed_blocks * self.block_bytes

    @property
    def pinned_bytes(self) -> int:
        """Of main memory for the blocks."""
        held = {"resident": 0, "pinned": self.streamed_blocks, "disk": self.ring}[self.source]
        return held * self.block_bytes


def denoise_options(job: PlanRequest, budget: Budget) -> Iterator[Option[DenoisePlan]]:
    """The best number of resident blocks for every format, source and chunk size.

    More resident blocks are never slower and take less main memory, so of those that fit into the VRAM
    only the largest number is worth trying.

    Raises:
        UserError: choices of the user's that no amount of memory brings together.
    """
    there_is_one = False
    for weights in formats(job):
        for tokens in _token_chunks(job):
            for heads in _head_groups(job):
                for source in ("resident", "pinned", "disk"):
                    if source == "pinned" and budget.on_cpu:
                        continue
                    if job.choices.source in (None, source):
                        plan = _plan(job, budget, weights, source, tokens, heads)
                        if plan is not None:
                            there_is_one = True
                            yield denoise_option(job, budget, plan)
    if not there_is_one:
        raise _contradiction(job, budget)


def formats(job: PlanRequest) -> tuple[str, ...]:
    """The weights' formats that come into question, the most exact first."""
    if job.choices.weights is not None:
        return (job.plain(job.choices.weights),)
    if job.file_weights in ("int8", "fp8"):
        return (job.file_weights,)
    return tuple(job.plain(name) for name in job.formats)


def denoise_option(job: PlanRequest, budget: Budget, plan: DenoisePlan) -> Option[DenoisePlan]:
    """One way, with its peaks and times."""
    exact_first = formats(job).index(plan.weights) if plan.weights in formats(job) else 0
    return Option(
        plan, (_prepare(job, budget, plan), _denoise(job, budget, plan)), rank=exact_first
    )


def step_seconds(job: PlanRequest, budget: Budget, plan: DenoisePlan) -> float:
    """Of one step, guidance included."""
    shape, speeds = job.models.transformer, budget.speeds
    computing = job.branches * evaluation_flops(job) / speeds.flops_per_s
    copying = (plan.streamed_bytes_per_step + job.step_table_bytes) / speeds.link_bytes_per_s
    reading = 0.0
    if plan.source == "disk" and plan.streamed_blocks:
        stored = plan.streamed_blocks * shape.visual_block_bytes(_stored(job, plan.weights))
        reading = stored / speeds.disk_bytes_per_s
        if _stored(job, plan.weights) != plan.weights and plan.weights in ("int8", "fp8"):
            reading += stored / speeds.quantise_bytes_per_s
    chunks = math.ceil(job.tokens / (plan.chunk_tokens or job.tokens))
    groups = math.ceil(shape.heads / (plan.chunk_heads or shape.heads))
    again = (groups - 1) * job.tokens * shape.model_dim * NORM_BYTES
    per_block = chunks * CHUNK_SECONDS + again / (2 * speeds.device_bytes_per_s)
    overhead = job.branches * shape.visual_blocks * per_block
    return max(computing, copying) + COPY_SHARE * copying + reading + overhead


def evaluation_flops(job: PlanRequest) -> float:
    """Operations of one evaluation: the linear layers and attention of the visual blocks."""
    shape, tokens = job.models.transformer, job.tokens
    dim = shape.model_dim
    linear = 2.0 * tokens * (6 * dim * dim + 2 * dim * shape.ff_dim)
    attention = 4.0 * tokens * dim * (tokens * (NABLA_SHARE if job.sparse else 1.0))
    return shape.visual_blocks * (linear + attention + 4.0 * tokens * dim * job.text_tokens)


def _plan(
    job: PlanRequest,
    budget: Budget,
    weights: str,
    source: str,
    tokens: int | None,
    heads: int | None,
) -> DenoisePlan | None:
    shape, chosen = job.models.transformer, job.choices
    count, block = shape.visual_blocks, shape.visual_block_bytes(weights)
    slots = min(chosen.slots or MIN_SLOTS, count)
    most = count - slots - 1  # were there one more, the slots could hold all the others
    if source == "resident":
        if chosen.resident_blocks not in (None, count):
            return None
        return DenoisePlan(weights, source, count, 0, block, 0, 0, tokens, heads)
    if most < 0 or (chosen.resident_blocks or 0) > most:
        return None
    resident = chosen.resident_blocks
    if resident is None:
        bare = DenoisePlan(weights, source, 0, count, block, slots, RING, tokens, heads)
        resident = max(0, min(most, int(_room(job, budget, bare) // block)))
    ring = RING if source == "disk" else 0
    return DenoisePlan(
        weights, source, resident, count - resident, block, slots, ring, tokens, heads
    )


def _contradiction(job: PlanRequest, budget: Budget) -> UserError:
    """What keeps the choices of source, resident blocks and slots apart."""
    chosen, count = job.choices, job.models.transformer.visual_blocks
    slots = min(chosen.slots or MIN_SLOTS, count)
    most = count - slots - 1
    if chosen.source == "pinned" and budget.on_cpu:
        return UserError("source", chosen.source, "resident or disk on a CPU")
    if chosen.source == "resident":
        return UserError("resident_blocks", chosen.resident_blocks, f"{count} with all resident")
    if most < 0:
        streamed = f"resident: of {count} blocks none is streamed through {slots} slots"
        return UserError("source", chosen.source, streamed)
    allowed = f"0 to {most} beside {slots} slots"
    allowed += f", or all {count}" if chosen.source is None else ""
    return UserError("resident_blocks", chosen.resident_blocks, allowed)


def _room(job: PlanRequest, budget: Budget, bare: DenoisePlan) -> float:
    """Bytes left for resident blocks where ``bare`` has none."""
    if budget.vram_bytes is None:
        return budget.ram_bytes * (1 - FREE_SHARE) - _denoise(job, budget, bare).peak_ram_bytes
    return budget.vram_bytes * (1 - FREE_SHARE) - _denoise(job, budget, bare).peak_vram_bytes


def _prepare(job: PlanRequest, budget: Budget, plan: DenoisePlan) -> StagePlan:
    """Modulation and text blocks, once for the whole schedule, through slots of their own."""
    shape, rows = job.models.transformer, job.steps * job.branches
    text_blocks = min(PREPARING_SLOTS, shape.text_blocks) * shape.text_block_bytes(plan.weights)
    modulations = min(PREPARING_SLOTS, shape.visual_blocks) * shape.modulation_bytes(plan.weights)
    in_text = max(TEXT_ROWS_COMPUTED * job.text_bytes, _widened_bytes(job, 6))
    in_modulation = _widened_bytes(job, 9) + rows * 9 * shape.model_dim * 4
    all_blocks = shape.text_blocks * shape.text_block_bytes(plan.weights)
    all_blocks += shape.visual_blocks * shape.modulation_bytes(plan.weights)
    read = all_blocks / budget.speeds.disk_bytes_per_s
    weights = 2.0 * (shape.text_blocks * shape.text_block_parameters * job.text_tokens)
    weights += 2.0 * shape.visual_blocks * shape.modulation_parameters(9)
    return stage(
        "prepare",
        device={
            "embeddings, output layer": shape.outer_bytes(plan.weights),
            "text blocks, slots": text_blocks,
            "modulations, slots": modulations,
        },
        activations=max(rows * job.text_bytes + in_text, in_modulation),
        host={
            "staging": text_blocks + modulations,
            "vectors of all steps": job.steps * job.step_table_bytes,
        },
        seconds=read + rows * weights / budget.speeds.flops_per_s,
        does="modulation vectors and texts of the whole schedule, once",
        on_cpu=budget.on_cpu,
    )


def _widened_bytes(job: PlanRequest, parts: int) -> int:
    """A modulation's weights in float32, in which they are computed with."""
    already = job.number_bytes == 4
    return 0 if already else 4 * job.models.transformer.modulation_parameters(parts)


def _denoise(job: PlanRequest, budget: Budget, plan: DenoisePlan) -> StagePlan:
    shape, speeds = job.models.transformer, budget.speeds
    alive = activation_bytes(
        job.evaluation, chunk_tokens=plan.chunk_tokens, chunk_heads=plan.chunk_heads
    )
    stored = shape.visual_block_bytes(_stored(job, plan.weights))
    loading = shape.visual_blocks * stored / speeds.disk_bytes_per_s
    if plan.source == "disk":
        loading = plan.resident_blocks * stored / speeds.disk_bytes_per_s
    if _stored(job, plan.weights) != plan.weights and plan.weights in ("int8", "fp8"):
        loading += loading * speeds.disk_bytes_per_s / speeds.quantise_bytes_per_s
    return stage(
        "denoise",
        device={
            "embeddings, output layer": shape.outer_bytes(plan.weights),
            "resident blocks": plan.resident_blocks * plan.block_bytes,
            "slots": plan.slots * plan.block_bytes,
            "vectors of one step": 2 * job.step_table_bytes,
            "latents": job.latent_bytes,
        },
        activations=alive,
        host={
            "blocks, pinned": plan.pinned_bytes,
            "staging": max(stored, plan.block_bytes),
            "vectors of all steps": job.steps * job.step_table_bytes,
        },
        seconds=loading + job.steps * step_seconds(job, budget, plan),
        does=in_words(plan),
        on_cpu=budget.on_cpu,
    )


def in_words(plan: DenoisePlan) -> str:
    """How the blocks are run."""
    block = in_gb(plan.block_bytes)
    if plan.source == "resident":
        return f"{plan.weights}, all {plan.resident_blocks} blocks of {block} resident"
    where = "RAM" if plan.source == "pinned" else "the file"
    stay = f", {plan.resident_blocks} resident" if plan.resident_blocks else ""
    return f"{plan.weights}, {plan.streamed_blocks} blocks of {block} streamed from {where}{stay}"


def _stored(job: PlanRequest, weights: str) -> str:
    """The format in which weights lie in the file."""
    return weights if weights == job.file_weights else job.file_weights


def _token_chunks(job: PlanRequest) -> tuple[int | None, ...]:
    if job.choices.chunk_tokens is not None:
        return (job.choices.chunk_tokens,)
    smaller = tuple(size for size in CHUNK_TOKENS if size < job.tokens)
    return smaller if job.tokens > CHUNK_TOKENS[0] else (None, *smaller)


def _head_groups(job: PlanRequest) -> tuple[int | None, ...]:
    if job.choices.chunk_heads is not None:
        return (job.choices.chunk_heads,)
    heads = job.models.transformer.heads
    sizes = dict.fromkeys(math.ceil(heads / parts) for parts in HEAD_PARTS)
    return tuple(None if size == heads else size for size in sizes)

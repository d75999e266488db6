"""Ways to run the text encoder: expanding the prompt and encoding it. Arithmetic only, no torch.

Rule for ``auto``: encoding is in bf16, whole or streamed, because it decides every pixel and one pass over
the layers takes seconds. Generating (expansion) passes over them once a token, so there NF4 competes with
streaming, and wins wherever bf16 does not fit whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kandinsky5.memory.budget import Budget, in_gb
from kandinsky5.memory.demand import TEXT_LAYERS_TOO_FEW_TO_STREAM, PlanRequest
from kandinsky5.memory.stage import Option, StagePlan, stage

EXPANSION_TOKENS = 256
"""Most tokens that are generated."""
PICTURE_TOKENS = 2048
"""Positions that an input picture takes in the encoder, at most."""
SLOTS = 2
RING = 3
"""Layers held in main memory when they are streamed from the file."""


@dataclass(frozen=True)
class EncoderUse:
    """How the text encoder's weights lie while it works.

    Attributes:
        weights: ``bf16``, ``fp32`` or ``nf4``.
        source: of :data:`~kandinsky5.memory.demand.SOURCES`.
        slots: buffers of one layer each, when it is streamed.
        ring: layers held in main memory, when it is streamed from disk.
    """

    weights: str
    source: str
    slots: int = 0
    ring: int = 0


@dataclass(frozen=True)
class TextPlan:
    """The text encoder in both stages; ``expand`` is None where the prompt is not rewritten."""

    encode: EncoderUse
    expand: EncoderUse | None = None


def text_options(job: PlanRequest, budget: Budget) -> Iterator[Option[TextPlan]]:
    """All ways to expand and encode."""
    for encode in _uses(job, budget, generating=False):
        encoded = _encode(job, budget, encode)
        if not job.expand:
            yield Option(TextPlan(encode), (_loaded(encoded, job, budget, encode, again=True),))
            continue
        for expand in _uses(job, budget, generating=True):
            expanded = _expand(job, budget, expand)
            yield Option(
                TextPlan(encode, expand),
                (
                    _loaded(expanded, job, budget, expand, again=True),
                    _loaded(encoded, job, budget, encode, again=encode != expand),
                ),
            )


def _uses(job: PlanRequest, budget: Budget, *, generating: bool) -> Iterator[EncoderUse]:
    wanted = job.choices.text_weights
    whole = job.plain("bf16")
    if wanted in (None, "bf16"):
        yield EncoderUse(whole, "resident")
        if job.models.text_encoder.layers > TEXT_LAYERS_TOO_FEW_TO_STREAM:
            if not budget.on_cpu:
                yield EncoderUse(whole, "pinned", SLOTS)
            yield EncoderUse(whole, "disk", SLOTS, RING)
    nf4_works = not budget.on_cpu and "nf4" in job.text_formats
    if wanted == "nf4" or (wanted is None and generating and nf4_works):
        yield EncoderUse("nf4", "resident")


def _expand(job: PlanRequest, budget: Budget, use: EncoderUse) -> StagePlan:
    encoder, speeds = job.models.text_encoder, budget.speeds
    positions = job.template_tokens + job.text_tokens + EXPANSION_TOKENS
    positions += PICTURE_TOKENS if job.picture else 0
    cache = 2 * encoder.layers * encoder.key_value_dim * positions * job.number_bytes
    streamed = encoder.layers * encoder.layer_bytes(use.weights)
    # Unpacking NF4 takes what its smaller weights save: a token costs as much as in bf16.
    read = encoder.total_bytes(job.plain("bf16"), generating=True, pictures=False)
    per_token = max(read / speeds.device_bytes_per_s, _pass_seconds(use, streamed, budget))
    return _text_stage(
        job,
        budget,
        use,
        name="expand",
        positions=positions,
        cache=cache,
        seconds=EXPANSION_TOKENS * per_token,
    )


def _encode(job: PlanRequest, budget: Budget, use: EncoderUse) -> StagePlan:
    encoder = job.models.text_encoder
    positions = job.template_tokens + job.text_tokens
    positions += PICTURE_TOKENS if job.encoder_sees else 0
    flops = 2.0 * encoder.layers * encoder.layer_parameters * positions
    computing = flops / budget.speeds.flops_per_s
    streaming = _pass_seconds(use, encoder.layers * encoder.layer_bytes(use.weights), budget)
    return _text_stage(
        job,
        budget,
        use,
        name="encode text",
        positions=positions,
        cache=0,
        seconds=job.branches * max(computing, streaming),
    )


def _text_stage(
    job: PlanRequest,
    budget: Budget,
    use: EncoderUse,
    *,
    name: str,
    positions: int,
    cache: int,
    seconds: float,
) -> StagePlan:
    encoder, clip = job.models.text_encoder, job.models.clip
    generating = name == "expand"
    pictures = job.picture if generating else job.encoder_sees
    layer, table = encoder.layer_bytes(use.weights), encoder.table_bytes(use.weights)
    device: dict[str, float] = {}
    host: dict[str, float] = {"token table": table}
    if use.source == "resident":
        whole = encoder.total_bytes(use.weights, generating=generating, pictures=pictures)
        device["text encoder"] = whole
    else:
        device["slots"] = use.slots * layer
        tower = encoder.vision_bytes(use.weights) if pictures else 0
        # The tower has read the picture and is gone before the output layer gives the first token.
        device["vision tower, output layer"] = max(tower, table if generating else 0)
        held = encoder.layers if use.source == "pinned" else use.ring
        host["layers, pinned"] = held * layer
    device["key-value cache"] = cache
    if not generating:
        device["CLIP"] = clip.total_bytes
    numbers = positions * (3 * encoder.intermediate + 8 * encoder.hidden)
    return stage(
        name,
        device=device,
        activations=numbers * job.number_bytes,
        host=host,
        seconds=seconds,
        does=_in_words(use, layer),
        on_cpu=budget.on_cpu,
    )


def _loaded(
    item: StagePlan, job: PlanRequest, budget: Budget, use: EncoderUse, *, again: bool
) -> StagePlan:
    """The stage with the time of reading the weights, unless the stage before has read them."""
    if not again or use.source == "disk":
        return item
    speeds, encoder = budget.speeds, job.models.text_encoder
    generating = item.name == "expand"
    pictures = job.picture if generating else job.encoder_sees
    file_bytes = encoder.total_bytes("bf16", generating=generating, pictures=pictures)
    seconds = file_bytes / speeds.disk_bytes_per_s
    if use.weights == "nf4":
        seconds += file_bytes / speeds.quantise_bytes_per_s
    return StagePlan(item.name, item.vram, item.ram, item.seconds + seconds, item.does)


def _pass_seconds(use: EncoderUse, streamed_bytes: int, budget: Budget) -> float:
    if use.source == "resident":
        return 0.0
    if use.source == "disk":
        return streamed_bytes / budget.speeds.disk_bytes_per_s
    return streamed_bytes / budget.speeds.link_bytes_per_s


def _in_words(use: EncoderUse, layer_bytes: int) -> str:
    if use.source == "resident":
        return f"text encoder in {use.weights}, whole"
    where = "RAM" if use.source == "pinned" else "the file"
    return f"text encoder in {use.weights}, layer by layer from {where} ({in_gb(layer_bytes)} each)"

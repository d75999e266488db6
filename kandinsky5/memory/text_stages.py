"""Ways to run the text encoder: expanding the prompt and encoding it. Arithmetic only, no torch.

Rule for ``auto``: encoding is in bf16, whole or streamed, because it decides every pixel and one pass over
the layers takes seconds. Generating (expansion) passes over them once a token, so there NF4 competes with
streaming, and wins wherever bf16 does not fit whole. Where every way that fits would take too long
(:func:`is_worthwhile`), the prompt is not expanded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kandinsky5.memory.budget import Budget, in_gb
from kandinsky5.memory.demand import TEXT_LAYERS_TOO_FEW_TO_STREAM, PlanRequest
from kandinsky5.memory.stage import Option, StagePlan, best_of, stage

EXPANSION_TOKENS = 256
"""Most tokens that are generated."""
CELL_PX = 56
"""A position of the encoder for so many pixels a side of the input picture: it sees half of them, and 28
pixels each (``kandinsky5.pipeline.image.as_seen``)."""
MIN_CELLS = 2
"""Of a side; smaller pictures are scaled."""
PICTURE_MARKS = 3
"""Positions around a picture."""
CELL_PATCHES, PATCH_VALUES, TOWER_DIM = 4, 1176, 1280
"""Patches of a position, pixel values of a patch, which stay in float32, and what the tower makes of it."""
SLOTS = 2
RING = 3
"""Layers held in main memory when they are streamed from the file."""
MAX_EXPANSION_S = 120.0
"""Most that expanding may be predicted to take: about what the shortest jobs take in all, which a better
prompt should not double. Qwen2.5-VL 7B from main memory over PCIe 4 ×16 needs 134 s in bf16, 38 s in NF4."""
HOST_UNPACK_BYTES_PER_S = 4e9
"""Weights of NF4 as bf16 that a CPU of eight cores unpacks: 0.5 GB/s a core was measured."""
HOST_QUANTISE_BYTES_PER_S = 0.3e9
"""bf16 weights that it quantises: 40 MB/s a core was measured."""


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


def best_text(job: PlanRequest, budget: Budget) -> Option[TextPlan]:
    """The quickest way that fits and expands the prompt, if it is to be; else the quickest that does not."""
    return best_text_of(text_options(job, budget), budget)


def best_text_of(options: Iterable[Option[TextPlan]], budget: Budget) -> Option[TextPlan]:
    """The same among these."""
    choices = list(options)
    expanding = [option for option in choices if option.settings.expand is not None]
    can_expand = any(option.fits(budget) for option in expanding)
    return best_of(expanding if can_expand else choices, budget)


def is_worthwhile(source: str, seconds: float) -> bool:
    """Whether a prompt should be expanded: never layer by layer from disk, and in :data:`MAX_EXPANSION_S`.

    Args:
        source: where the layers are, of :data:`~kandinsky5.memory.demand.SOURCES`. How fast a disk is, is
            known least; 256 passes over a model on a slow one take an hour.
        seconds: predicted for all tokens, loading not counted.
    """
    return source != "disk" and seconds <= MAX_EXPANSION_S


def why_not_expanded(job: PlanRequest, budget: Budget) -> str:
    """In a sentence, for a job that is to be expanded and whose plan leaves it out."""
    ways = [(use, _expand(job, budget, use)) for use in _uses(job, budget, generating=True)]
    fitting = [way for way in ways if Option(way[0], way[1:]).fits(budget)]
    said = "the prompt is not expanded: "
    if not fitting:
        return f"{said}there is no room for the text encoder to write"
    use, expanded = min(fitting, key=lambda way: way[1].seconds)
    how = {"pinned": "streamed from RAM", "disk": "streamed from disk"}.get(use.source, "unpacked")
    said += f"the text encoder in {use.weights}, {how} for each of {EXPANSION_TOKENS} tokens,"
    said += f" would take about {expanded.seconds:.0f} s"
    if use.weights == "nf4" or budget.on_cpu:
        return said
    if job.choices.text_weights == "bf16":
        return f"{said}; text weights on auto take NF4 for it"
    if "nf4" not in job.text_formats:
        return f"{said}; NF4 is quicker and needs a working bitsandbytes (pip install bitsandbytes)"
    return said


def text_options(job: PlanRequest, budget: Budget) -> Iterator[Option[TextPlan]]:
    """All ways to encode, after expanding where that is wanted and worthwhile, and without it."""
    writing = [(use, _expand(job, budget, use)) for use in _uses(job, budget, generating=True)]
    for encode in _uses(job, budget, generating=False):
        encoded = _encode(job, budget, encode)
        yield Option(TextPlan(encode), (_loaded(encoded, job, budget, encode, again=True),))
        for expand, expanded in writing if job.expand else ():
            if not is_worthwhile(expand.source, expanded.seconds):
                continue
            yield Option(
                TextPlan(encode, expand),
                (
                    _loaded(expanded, job, budget, expand, again=True),
                    _loaded(encoded, job, budget, encode, again=encode != expand),
                ),
            )


def _uses(job: PlanRequest, budget: Budget, *, generating: bool) -> Iterator[EncoderUse]:
    wanted = job.choices.text_weights
    whole, streams = job.plain("bf16"), _has_layers_to_stream(job)
    if wanted in (None, "bf16"):
        yield EncoderUse(whole, "resident")
        if streams:
            if not budget.on_cpu:
                yield EncoderUse(whole, "pinned", SLOTS)
            yield EncoderUse(whole, "disk", SLOTS, RING)
    nf4_works = not budget.on_cpu and "nf4" in job.text_formats
    if wanted == "nf4" or (wanted is None and generating and nf4_works):
        yield EncoderUse("nf4", "resident")
        if streams and not budget.on_cpu:
            yield EncoderUse("nf4", "pinned", SLOTS)  # not from disk: quantised anew in every pass


def _has_layers_to_stream(job: PlanRequest) -> bool:
    return job.models.text_encoder.layers > TEXT_LAYERS_TOO_FEW_TO_STREAM


def _expand(job: PlanRequest, budget: Budget, use: EncoderUse) -> StagePlan:
    encoder, speeds = job.models.text_encoder, budget.speeds
    positions = _positions(job, sees=job.picture)
    written = positions + EXPANSION_TOKENS
    cache = 2 * encoder.layers * encoder.key_value_dim * written * job.number_bytes
    # On a GPU unpacking NF4 takes what its smaller weights save: a token costs as much as in bf16.
    read = encoder.total_bytes(job.plain("bf16"), generating=True, pictures=False)
    per_token = max(
        read / speeds.device_bytes_per_s,
        _pass_seconds(job, use, budget),
        _unpacking_seconds(job, use, budget),
    )
    return _text_stage(
        job,
        budget,
        use,
        name="expand",
        cache=cache,
        seconds=EXPANSION_TOKENS * per_token,
    )


def _encode(job: PlanRequest, budget: Budget, use: EncoderUse) -> StagePlan:
    encoder = job.models.text_encoder
    positions = _positions(job, sees=job.encoder_sees)
    flops = 2.0 * encoder.layers * encoder.layer_parameters * positions
    computing = flops / budget.speeds.flops_per_s + _unpacking_seconds(job, use, budget)
    return _text_stage(
        job,
        budget,
        use,
        name="encode text",
        cache=0,
        seconds=job.branches * max(computing, _pass_seconds(job, use, budget)),
    )


def _text_stage(
    job: PlanRequest,
    budget: Budget,
    use: EncoderUse,
    *,
    name: str,
    cache: int,
    seconds: float,
) -> StagePlan:
    encoder, clip = job.models.text_encoder, job.models.clip
    generating = name == "expand"
    pictures = job.picture if generating else job.encoder_sees
    layer = encoder.layer_bytes(use.weights, job.number_bytes)
    table = encoder.table_bytes(use.weights, job.number_bytes)
    device: dict[str, float] = {}
    host: dict[str, float] = {"token table": table}
    if use.source == "resident":
        device["text encoder"] = encoder.total_bytes(
            use.weights, job.number_bytes, generating=generating, pictures=pictures
        )
    else:
        device["slots"] = use.slots * layer
        tower = encoder.vision_bytes(use.weights, job.number_bytes) if pictures else 0
        # A tied output layer is the token table, and computes where that is.
        output = table if generating and not encoder.tied else 0
        device["vision tower, output layer"] = tower + output
        held = encoder.layers if use.source == "pinned" else use.ring
        host["layers, pinned"] = held * layer
    if use.weights == "nf4":
        # One matrix, before it is quantised while loading, or unpacked for a product of many tokens.
        device["unpacked matrix"] = encoder.largest_linear * job.number_bytes
    device["key-value cache"] = cache
    device["CLIP"] = clip.total_bytes  # is loaded with the encoder, for expanding too
    return stage(
        name,
        device=device,
        activations=_reading_bytes(job, sees=pictures),
        host=host,
        seconds=seconds,
        does=_in_words(use, layer),
        on_cpu=budget.on_cpu,
    )


def _positions(job: PlanRequest, *, sees: bool) -> int:
    """What the encoder reads at once: template, prompt and picture."""
    return job.template_tokens + job.text_tokens + (_cells(job) + PICTURE_MARKS if sees else 0)


def _cells(job: PlanRequest) -> int:
    """Positions of the input picture itself."""
    rows, columns = (
        max(MIN_CELLS, round(side_px / CELL_PX)) for side_px in (job.height_px, job.width_px)
    )
    return rows * columns


def _reading_bytes(job: PlanRequest, *, sees: bool) -> int:
    """Alive in a layer while it reads: of feed-forward gate, other half and product; of the stream what
    went into the model, into the layer and into feed-forward, and what comes out. With a picture its
    pixels, and what the tower has made of it, before and after it joins the text. One token that is written
    takes nothing beside this, and the tower less for a picture than the layers.
    """
    encoder = job.models.text_encoder
    numbers = _positions(job, sees=sees) * (3 * encoder.intermediate + 4 * encoder.hidden)
    if not sees:
        return numbers * job.number_bytes
    numbers += _cells(job) * (CELL_PATCHES * TOWER_DIM + 2 * encoder.hidden)
    return numbers * job.number_bytes + _cells(job) * CELL_PATCHES * PATCH_VALUES * 4


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
        rate = HOST_QUANTISE_BYTES_PER_S if budget.on_cpu else speeds.quantise_bytes_per_s
        seconds += file_bytes / rate
    return StagePlan(item.name, item.vram, item.ram, item.seconds + seconds, item.does)


def _pass_seconds(job: PlanRequest, use: EncoderUse, budget: Budget) -> float:
    """What one pass over the layers takes to be brought to the device."""
    encoder = job.models.text_encoder
    streamed = encoder.layers * encoder.layer_bytes(use.weights, job.number_bytes)
    if use.source == "resident":
        return 0.0
    if use.source == "disk":
        return streamed / budget.speeds.disk_bytes_per_s
    return streamed / budget.speeds.link_bytes_per_s


def _unpacking_seconds(job: PlanRequest, use: EncoderUse, budget: Budget) -> float:
    """What one pass over the layers takes to unpack on a CPU."""
    if use.weights != "nf4" or not budget.on_cpu:
        return 0.0
    encoder = job.models.text_encoder
    return 2 * encoder.layers * encoder.linear_parameters / HOST_UNPACK_BYTES_PER_S


def _in_words(use: EncoderUse, layer_bytes: int) -> str:
    if use.source == "resident":
        return f"text encoder in {use.weights}, whole"
    where = "RAM" if use.source == "pinned" else "the file"
    return f"text encoder in {use.weights}, layer by layer from {where} ({in_gb(layer_bytes)} each)"

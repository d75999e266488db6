"""Where each model waits while it is not used: between the stages of a job and until the next one. No torch.

Everything may wait on the device, in main memory or on disk. Of the arrangements that keep every stage
within its budgets, the one is taken after which the next job has least to load.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from kandinsky5.memory.budget import FREE_SHARE, Budget
from kandinsky5.memory.demand import PlanRequest
from kandinsky5.memory.denoise_stages import DenoisePlan
from kandinsky5.memory.stage import StagePlan, with_added
from kandinsky5.memory.text_stages import TextPlan

HOMES = ("device", "ram", "disk")


@dataclass(frozen=True)
class Resident:
    """A model as a thing to be kept.

    Attributes:
        name: ``text encoders``, ``transformer`` or ``VAE``.
        stages: in which it is used; there its memory is counted already.
        device_bytes: what waits on the device with home ``device``; 0 where it cannot.
        ram_bytes: what waits in main memory with home ``ram``; 0 where it cannot.
        ram_in_use_bytes: what home ``ram`` adds in its own stages: the copy from which it is brought.
        all_bytes: what is read from disk when nothing is kept.
    """

    name: str
    stages: tuple[str, ...]
    device_bytes: int
    ram_bytes: int
    ram_in_use_bytes: int
    all_bytes: int

    def homes(self, on_cpu: bool) -> tuple[str, ...]:
        """Those it can have, the best first."""
        possible = {
            "device": bool(self.device_bytes) and not on_cpu,
            "ram": bool(self.ram_bytes),
            "disk": True,
        }
        return tuple(home for home in HOMES if possible[home])

    def seconds(self, home: str, budget: Budget) -> float:
        """To have it ready again."""
        speeds = budget.speeds
        if home == "device":
            return (self.all_bytes - self.device_bytes) / speeds.disk_bytes_per_s
        if home == "ram":
            missing = max(0, self.all_bytes - self.ram_bytes) / speeds.disk_bytes_per_s
            return missing + self.ram_bytes / speeds.link_bytes_per_s
        return self.all_bytes / speeds.disk_bytes_per_s


def residents(job: PlanRequest, text: TextPlan, denoise: DenoisePlan) -> tuple[Resident, ...]:
    """What a job with these settings could keep."""
    encoder, shape = job.models.text_encoder, job.models.transformer
    use = text.encode
    whole = encoder.total_bytes(
        use.weights,
        job.number_bytes,
        generating=text.expand is not None,
        pictures=job.encoder_sees,
    )
    whole += job.models.clip.total_bytes
    is_resident, is_pinned = use.source == "resident", use.source == "pinned"
    layers = encoder.layers * encoder.layer_bytes(use.weights, job.number_bytes)
    layers += encoder.table_bytes(use.weights, job.number_bytes)
    staying = denoise.resident_blocks * denoise.block_bytes + shape.outer_bytes(denoise.weights)
    streams = denoise.streamed_blocks > 0
    vae = job.models.vae.total_bytes(job.number_bytes)
    return (
        Resident(
            "text encoders",
            ("expand", "encode text") if text.expand == use else ("encode text",),
            device_bytes=whole if is_resident else 0,
            ram_bytes=whole if is_resident else layers if is_pinned else 0,
            ram_in_use_bytes=whole if is_resident else 0,
            all_bytes=whole,
        ),
        Resident(
            "transformer",
            ("denoise",),
            device_bytes=0 if streams else staying,
            ram_bytes=denoise.pinned_bytes
            if denoise.source == "pinned"
            else 0
            if streams
            else staying,
            ram_in_use_bytes=0 if streams else staying,
            all_bytes=shape.visual_blocks * denoise.block_bytes
            + shape.outer_bytes(denoise.weights),
        ),
        Resident(
            "VAE",
            ("encode image", "decode"),
            device_bytes=vae,
            ram_bytes=vae,
            ram_in_use_bytes=vae,
            all_bytes=vae,
        ),
    )


def best_homes(
    models: tuple[Resident, ...], stages: tuple[StagePlan, ...], budget: Budget
) -> dict[str, str]:
    """Model → home."""
    found: tuple[float, dict[str, str]] | None = None
    for combination in itertools.product(*(model.homes(budget.on_cpu) for model in models)):
        homes = {model.name: home for model, home in zip(models, combination, strict=True)}
        seconds = sum(model.seconds(homes[model.name], budget) for model in models)
        if found is not None and seconds >= found[0]:
            continue
        waiting = with_waiting(models, homes, stages, budget)
        if _is_easy(stages, waiting, budget):
            found = seconds, homes
    return found[1] if found else {model.name: "disk" for model in models}


def _is_easy(bare: tuple[StagePlan, ...], full: tuple[StagePlan, ...], budget: Budget) -> bool:
    """Whether what waits leaves a little free, or at least as much as the job itself does."""
    pairs = [(_ram, budget.ram_bytes)]
    if budget.vram_bytes is not None:
        pairs.append((_vram, budget.vram_bytes))
    return all(
        max(map(peak, full)) <= max((1 - FREE_SHARE) * limit, max(map(peak, bare)))
        for peak, limit in pairs
    )


def _vram(item: StagePlan) -> int:
    return item.peak_vram_bytes


def _ram(item: StagePlan) -> int:
    return item.peak_ram_bytes


def with_waiting(
    models: tuple[Resident, ...],
    homes: Mapping[str, str],
    stages: tuple[StagePlan, ...],
    budget: Budget,
) -> tuple[StagePlan, ...]:
    """The stages with what waits beside them."""
    result = []
    for item in stages:
        for model in models:
            home, used = homes[model.name], item.name in model.stages
            note = f"{model.name}, waiting"
            if home == "device" and not used:
                item = with_added(item, note, vram=model.device_bytes)
            elif home == "ram" and not (used and budget.on_cpu):
                kept = model.ram_in_use_bytes if used else model.ram_bytes
                item = with_added(item, note, ram=kept)
        result.append(item)
    return tuple(result)

"""The stages of a plan, the ways each can be run, and which of those is chosen. No torch.

A way ("option") has peaks and a predicted time that do not depend on the budget; the budget only decides
which options are left. The quickest of them is taken. So a larger budget can only add options, and never
makes a plan slower; equal budgets give equal plans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from kandinsky5.memory.budget import (
    ALLOCATOR_SLACK,
    DEVICE_RESERVE_BYTES,
    HOST_RESERVE_BYTES,
    Budget,
)

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Part:
    """One part of a stage's memory.

    Attributes:
        name: as shown to a person.
        size_bytes: at its largest.
    """

    name: str
    size_bytes: int


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes.

    Attributes:
        name: ``expand``, ``encode text``, ``encode image``, ``prepare``, ``denoise`` or ``decode``.
        vram, ram: its parts, which add up to the peaks.
        seconds: predicted, loading included.
        does: how it is run, in words.
    """

    name: str
    vram: tuple[Part, ...]
    ram: tuple[Part, ...]
    seconds: float
    does: str = ""

    @property
    def peak_vram_bytes(self) -> int:
        return sum(part.size_bytes for part in self.vram)

    @property
    def peak_ram_bytes(self) -> int:
        return sum(part.size_bytes for part in self.ram)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "name": self.name,
            "peak_vram_bytes": self.peak_vram_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
            "vram": {part.name: part.size_bytes for part in self.vram},
            "ram": {part.name: part.size_bytes for part in self.ram},
            "seconds": round(self.seconds, 1),
            "does": self.does,
        }


def stage(
    name: str,
    *,
    device: Mapping[str, float],
    activations: float,
    host: Mapping[str, float],
    seconds: float,
    does: str,
    on_cpu: bool,
) -> StagePlan:
    """A stage from its parts, with what is always there added.

    Args:
        device: name → bytes on the device beside the activations.
        activations: bytes alive at once; what the allocator holds beyond is added.
        host: name → bytes in main memory.
        on_cpu: then main memory is the device's too.
    """
    working = {**device, "activations": activations * (1 + ALLOCATOR_SLACK)}
    reserved = {"process": HOST_RESERVE_BYTES}
    if on_cpu:
        return StagePlan(name, (), _parts({**reserved, **host, **working}), seconds, does)
    return StagePlan(
        name,
        _parts({"CUDA": DEVICE_RESERVE_BYTES, **working}),
        _parts({**reserved, **host}),
        seconds,
        does,
    )


class Staged:
    """What runs in stages that have the memory to themselves one after the other.

    Attributes:
        stages: with their peaks.
    """

    stages: tuple[StagePlan, ...]

    @property
    def seconds(self) -> float:
        """Predicted for a job that begins with nothing loaded."""
        return sum(item.seconds for item in self.stages)

    @property
    def peak_vram_bytes(self) -> int:
        return max(item.peak_vram_bytes for item in self.stages)

    @property
    def peak_ram_bytes(self) -> int:
        return max(item.peak_ram_bytes for item in self.stages)


@dataclass(frozen=True)
class Option(Staged, Generic[Settings]):
    """One way to run one stage, or several that belong together.

    Attributes:
        settings: what the pipeline sets up.
        stages: with their peaks.
        rank: decides between options of equal time, the lowest first.
    """

    settings: Settings
    stages: tuple[StagePlan, ...]
    rank: int = 0

    def fits(self, budget: Budget) -> bool:
        """Whether it stays within."""
        return self.excess(budget) <= 0.0

    def excess(self, budget: Budget) -> float:
        """By what share of the budgets it passes them, added up."""
        vram = 0.0 if budget.vram_bytes is None else self.peak_vram_bytes / budget.vram_bytes
        ram = self.peak_ram_bytes / budget.ram_bytes
        return max(0.0, vram - 1.0) + max(0.0, ram - 1.0)


def best_of(options: Iterable[Option[Settings]], budget: Budget) -> Option[Settings]:
    """The quickest that fits; where none does, the one that needs least beyond the budget."""
    choices = list(options)
    fitting = [option for option in choices if option.fits(budget)]
    if not fitting:
        return min(choices, key=lambda option: option.excess(budget))
    return min(
        fitting,
        key=lambda o: (round(o.seconds, 6), o.rank, o.peak_vram_bytes, o.peak_ram_bytes),
    )


def with_added(item: StagePlan, name: str, *, vram: int = 0, ram: int = 0) -> StagePlan:
    """The stage with something more in memory beside it."""
    return dataclasses.replace(
        item,
        vram=(*item.vram, Part(name, vram)) if vram else item.vram,
        ram=(*item.ram, Part(name, ram)) if ram else item.ram,
    )


def _parts(sizes: Mapping[str, float]) -> tuple[Part, ...]:
    return tuple(Part(name, round(size)) for name, size in sizes.items() if size)

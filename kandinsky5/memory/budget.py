"""What a machine has: budgets of memory and the rates by which a plan tells slow from fast. No torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from kandinsky5.errors import UserError
from kandinsky5.request import RANGES

GB = 10**9

DEVICE_RESERVE_BYTES = 600_000_000
"""CUDA context, kernels and libraries' workspaces: a guess until it is measured."""
ALLOCATOR_SLACK = 0.05
"""Share of activations that torch's allocator holds beyond what is alive (rounding, gaps)."""
FREE_SHARE = 0.05
"""Of a budget, kept free of what only saves time: a prediction may be wrong."""
HOST_RESERVE_BYTES = 1_500_000_000
"""The process with torch, CUDA and the libraries loaded, and ffmpeg beside it."""


@dataclass(frozen=True)
class Speeds:
    """Rates of one machine; the defaults are those that performance.md reckons with.

    Attributes:
        flops_per_s: of the transformer's arithmetic: a Pro block of 59.7·10¹² operations in 0.45 s
            (RTX 4090, bf16).
        link_bytes_per_s: from page-locked memory to the device (PCIe 4 ×16).
        disk_bytes_per_s: from an NVMe drive.
        device_bytes_per_s: inside the device's own memory, as far as small matrix products reach it.
        quantise_bytes_per_s: bf16 bytes turned into int8 or NF4 while loading: an assumption.
    """

    flops_per_s: float = 133e12
    link_bytes_per_s: float = 25e9
    disk_bytes_per_s: float = 6e9
    device_bytes_per_s: float = 500e9
    quantise_bytes_per_s: float = 2e9


@dataclass(frozen=True)
class Budget:
    """How much memory a job may take.

    Attributes:
        vram_bytes: of the device, everything counted, its context too; None to compute on the CPU, where
            main memory is all there is.
        ram_bytes: of main memory.
        machine_vram_bytes, machine_ram_bytes: what there is, where that is known.
        speeds: of the machine.

    Raises:
        UserError: a budget outside the range that requests allow.
    """

    vram_bytes: int | None
    ram_bytes: int
    machine_vram_bytes: int | None = None
    machine_ram_bytes: int | None = None
    speeds: Speeds = field(default_factory=Speeds)

    def __post_init__(self) -> None:
        for name, value in (("vram", self.vram_bytes), ("ram", self.ram_bytes)):
            if value is None and name == "vram":
                continue
            low, high = RANGES[name]
            gigabytes = value / GB if value is not None and _is_number(value) else math.nan
            if not low <= gigabytes <= high:
                shown = value if math.isnan(gigabytes) else gigabytes
                raise UserError(name, shown, f"a number of GB from {low:g} to {high:g}")

    @classmethod
    def of_gb(cls, vram: float | None, ram: float) -> Budget:
        """Budgets as they are typed.

        Raises:
            UserError: outside the range that requests allow.
        """
        for name, value in (("vram", vram), ("ram", ram)):
            low, high = RANGES[name]
            if not (name == "vram" and value is None) and not _is_number(value):
                raise UserError(name, value, f"a number of GB from {low:g} to {high:g}")
        return cls(None if vram is None else round(vram * GB), round(ram * GB))

    @property
    def on_cpu(self) -> bool:
        return self.vram_bytes is None

    def beside(self, held_bytes: int) -> Budget:
        """What is left where the job computes beside so much that is held there all the time, as LoRAs are.

        Never less than a budget may be: one that is filled altogether is found out while computing.
        """
        name = "ram" if self.vram_bytes is None else "vram"
        left = getattr(self, f"{name}_bytes") - held_bytes
        return dataclasses.replace(
            self, **{f"{name}_bytes": max(round(RANGES[name][0] * GB), left)}
        )

    @property
    def notices(self) -> tuple[str, ...]:
        """Where a budget is more than the machine has."""
        pairs = (
            ("VRAM", self.vram_bytes, self.machine_vram_bytes),
            ("RAM", self.ram_bytes, self.machine_ram_bytes),
        )
        return tuple(
            f"the budget of {in_gb(given)} of {name} is more than this machine has ({in_gb(there)})"
            for name, given, there in pairs
            if given is not None and there is not None and given > there
        )


def in_gb(count: float) -> str:
    """Bytes as a person reads them."""
    return f"{count / GB:.1f} GB" if count >= GB else f"{count / 1e6:.0f} MB"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

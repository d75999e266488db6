"""What a stretch of work takes: peak memory of process and device, bytes between them, waiting for these."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK_RSS = "5"


@dataclass(frozen=True)
class Peaks:
    """Most memory in use, and what was moved.

    Attributes:
        vram_bytes: reserved on the card that holds most; 0 without a GPU.
        rss_bytes: main memory resident; 0 where the system does not tell.
        h2d_bytes, d2h_bytes: copied to the device and from it; on a CPU what is copied into slots.
        stall_s: how long computing waited for weights.
    """

    vram_bytes: int = 0
    rss_bytes: int = 0
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    stall_s: float = 0.0

    def joined(self, other: Peaks | None) -> Peaks:
        """Of both stretches: the larger peaks, the sums of what was moved."""
        if other is None:
            return self
        return Peaks(
            max(self.vram_bytes, other.vram_bytes),
            max(self.rss_bytes, other.rss_bytes),
            self.h2d_bytes + other.h2d_bytes,
            self.d2h_bytes + other.d2h_bytes,
            self.stall_s + other.stall_s,
        )


class _Moved:
    """What has been moved since the measuring began; the thread that reads weights counts too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        with self._lock:
            self.h2d_bytes = self.d2h_bytes = 0
            self.stall_s = 0.0

    def add(self, h2d_bytes: int, d2h_bytes: int, stall_s: float) -> None:
        with self._lock:
            self.h2d_bytes += h2d_bytes
            self.d2h_bytes += d2h_bytes
            self.stall_s += stall_s


_moved = _Moved()


def start_measuring() -> None:
    """Forget what was so far."""
    _moved.forget()
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK_RSS)
    except OSError:
        pass  # some containers forbid it; the peak is then the process's whole life
    for device in _cards():
        torch.cuda.reset_peak_memory_stats(device)


def peaks() -> Peaks:
    """Since :func:`start_measuring`."""
    vram_bytes = max((torch.cuda.max_memory_reserved(device) for device in _cards()), default=0)
    moved = _moved
    return Peaks(vram_bytes, _peak_rss_bytes(), moved.h2d_bytes, moved.d2h_bytes, moved.stall_s)


def note_moved(*, h2d_bytes: int = 0, d2h_bytes: int = 0, stall_s: float = 0.0) -> None:
    """Whoever moves tensors between main memory and a device says so here."""
    _moved.add(h2d_bytes, d2h_bytes, stall_s)


def _cards() -> range:
    """Those this process computes on; asking must not make it take memory on one."""
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)


def _peak_rss_bytes() -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0

"""Peak memory of the process and the device over a stretch of work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK_RSS = "5"


@dataclass(frozen=True)
class Peaks:
    """Most memory in use.

    Attributes:
        vram_bytes: reserved on the device; 0 without a GPU.
        rss_bytes: main memory resident; 0 where the system does not tell.
    """

    vram_bytes: int = 0
    rss_bytes: int = 0

    def max(self, other: Peaks | None) -> Peaks:
        """The larger of each."""
        if other is None:
            return self
        return Peaks(max(self.vram_bytes, other.vram_bytes), max(self.rss_bytes, other.rss_bytes))


def start_measuring() -> None:
    """Forget the peaks so far."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK_RSS)
    except OSError:
        pass  # some containers forbid it; the peak is then the process's whole life
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peaks() -> Peaks:
    """Since :func:`start_measuring`."""
    vram_bytes = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    return Peaks(vram_bytes, _peak_rss_bytes())


def _peak_rss_bytes() -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0

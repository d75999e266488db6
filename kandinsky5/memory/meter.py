"""Peak memory of the process and the device over one job."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK_RSS = "5"


def start_measuring() -> None:
    """Forget the peaks so far."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK_RSS)
    except OSError:
        pass  # some containers forbid it; the peak is then the process's whole life
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_rss_bytes() -> int:
    """Most main memory resident since :func:`start_measuring`, 0 where the system does not tell."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def peak_vram_bytes() -> int:
    """Most device memory reserved since :func:`start_measuring`, 0 without a GPU."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0

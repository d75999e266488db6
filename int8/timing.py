"""How long something takes on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def gpu_seconds(run: Callable[[], Any], repetitions: int, *, warm_up: int) -> list[float]:
    """Time of each run on the current CUDA device, between events, after ``warm_up`` that do not count."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return times

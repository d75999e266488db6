"""The real pipeline in a process whose memory lies in pieces, as long as it is the first one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kandinsky5.memory import fragmentation
from kandinsky5.memory.fragmentation import DeviceMemory
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.pipeline.pipeline import Pipeline

GIB = 1 << 30
STEPS_THAT_WORK = 1


def pipeline_in_pieces(*, models_dirs: Sequence[Path] = ()) -> Pipeline:
    """Evaluations find no memory after some steps, whatever the plan, in the first process alone."""
    first = Path(os.environ["K1_TEST_FIRST_PROCESS"])
    if not first.exists():
        first.write_text(str(os.getpid()))
        _break_memory()
    return Pipeline(models_dirs=models_dirs)


def _break_memory() -> None:
    evaluate, seen = DiffusionTransformer3D.evaluate, 0

    def refusing(*arguments: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > STEPS_THAT_WORK:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return evaluate(*arguments, **options)

    DiffusionTransformer3D.evaluate = refusing
    fragmentation.device_memory = lambda: DeviceMemory(10 * GIB, 7 * GIB)

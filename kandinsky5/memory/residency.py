"""The one owner of device memory: models come and go through it and stay warm between jobs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

from kandinsky5.errors import OutOfMemory

Model = TypeVar("Model")


class Residency:
    """Keeps one loaded model for each role and gives it out again while its key stays the same."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Hashable, object]] = {}

    def get(self, role: str, key: Hashable, load: Callable[[], Model]) -> Model:
        """The model of ``role``: the one held if its key is equal, else what ``load`` gives.

        Raises:
            OutOfMemory: there is no room for it; everything else held has been let go then.
        """
        if role in self._held and self._held[role][0] == key:
            return self._held[role][1]  # type: ignore[return-value]
        self.release(role)
        try:
            model = load()
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            self.release()
            raise OutOfMemory(f"out of memory while loading the {role}") from error
        self._held[role] = (key, model)
        return model

    def release(self, role: str | None = None) -> None:
        """Let go of one role, or of all."""
        if role is None:
            self._held.clear()
        else:
            self._held.pop(role, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


MEMORY_ERRORS = (torch.OutOfMemoryError, MemoryError, RuntimeError)
"""What torch raises when memory runs out; ask :func:`is_out_of_memory` before believing it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that device or main memory ran out (the CPU allocator raises RuntimeError)."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)

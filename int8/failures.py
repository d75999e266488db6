"""Kernels, compilers and drivers that fail, told apart from memory that runs out."""

from __future__ import annotations

import torch

_SAID = ("out of memory", "_status_alloc_failed")
"""In a RuntimeError by CUDA's runtime and driver, by Triton and by cuBLAS, in small letters."""


def pass_on_out_of_memory(error: Exception) -> None:
    """Raise for an error that tells nothing of what was tried, only that there was no room for it.

    Raises:
        torch.OutOfMemoryError: the error is one, or a RuntimeError that says so.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SAID):
        raise torch.OutOfMemoryError(str(error)) from error

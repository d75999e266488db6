"""Latents on disk while they are decoded, where no saved state holds them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch

from kandinsky5.errors import K1Error
from kandinsky5.memory.whole import to_host
from kandinsky5.output.state import save_latents
from kandinsky5.pipeline.job import Job

SUFFIX = ".latents.safetensors"


@contextmanager
def kept_beside_the_result(job: Job, latents: torch.Tensor) -> Iterator[None]:
    """Keep a final latent [t, h, w, C] beside ``job.out`` until the block ends well; then it is gone again.

    Where it cannot be written the work goes on, and that is said; where the block fails the file's name is.
    """
    path = _new_name(job.out)
    try:
        save_latents(path, to_host(latents), job.request)
    except K1Error as error:
        job.notice(f"the latents could not be kept while they are decoded: {error}")
        yield
        return
    try:
        yield
    except BaseException:
        job.notice(f"the latents are kept: python k1.py decode {shlex.quote(str(path))}")
        raise
    path.unlink(missing_ok=True)


def _new_name(out: Path) -> Path:
    """One that no file has."""
    names = (out.with_name(f"{out.stem}{number or ''}{SUFFIX}") for number in count())
    return next(path for path in names if not path.exists())

"""Whether a machine's fast paths give right numbers: for ``doctor``, and before ``auto`` chooses int8."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import torch

from int8 import reference
from int8.backends import backends_for, distrust
from int8.failures import pass_on_out_of_memory
from int8.ops import GELU, NORM, matmul_rows, quantize_rows
from int8.scheme import COMMUNITY, DEFAULT, Int8Scheme

SHAPES = ((70, 1300, 130), (1, 256, 64), (1100, 384, 100))
"""(M, K, N): one for each row of the tables of configs, with ragged ends."""

MAX_ODD_SHARE = 0.1
"""Of the integers after a fused prologue: sums in another order may move a bfloat16 on the edge, and with
the largest of a group its scale by 2^-8."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examination:
    """Which of a device's backends gives right numbers.

    Attributes:
        backend: the first that does, in the order of preference; None where none does.
        problems: a line for each one before it.
    """

    backend: str | None
    problems: tuple[str, ...] = ()

    @property
    def is_fast(self) -> bool:
        """Whether it is the backend this device is meant to use."""
        return self.backend is not None and not self.problems


@cache
def examine(device: torch.device) -> Examination:
    """Find the backend to use: once per process and device. ``auto`` passes over those that fail.

    Raises:
        torch.OutOfMemoryError: no room for a megabyte; the next call tries again.
    """
    problems: list[str] = []
    for backend in backends_for(device):
        problem = problem_of(backend, device)
        if problem is None:
            return Examination(backend, tuple(problems))
        log.warning("%s", problem)
        distrust(backend, device)
        problems.append(problem)
    return Examination(None, tuple(problems))


def self_test(device: torch.device | str) -> str | None:
    """Compare every backend of the device with the reference, computed on the CPU.

    Args:
        device: any; on a GPU the first call compiles kernels, which takes some seconds.

    Returns:
        None when all agree, else one line that names the backend and what went wrong.
    """
    device = torch.device(device)
    found = (problem_of(backend, device) for backend in backends_for(device))
    return next((problem for problem in found if problem), None)


def problem_of(backend: str, device: torch.device) -> str | None:
    """What is wrong with one backend, in a line; None when it agrees with the reference.

    Raises:
        torch.OutOfMemoryError: no room to find out.
    """
    for scheme in (DEFAULT, COMMUNITY):
        for shape in SHAPES:
            try:
                problem = _compare(backend, device, shape, scheme)
            except Exception as error:  # compilers and drivers fail in their own ways
                pass_on_out_of_memory(error)
                log.info("int8 self-test", exc_info=True)
                problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if problem:
                return f"int8 by {backend} on {device}, M, K, N = {shape}: {problem}"
    return None


def _compare(
    backend: str, device: torch.device, shape: tuple[int, int, int], scheme: Int8Scheme
) -> str | None:
    rows, depth, columns = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, depth, generator=generator).to(torch.bfloat16)
    x[rows // 2 :: 7] = 0
    shift, scale = torch.randn(2, depth, generator=generator)
    weight = reference.quantize(torch.randn(columns, depth, generator=generator), scheme)
    expected = reference.quantize(x, scheme)
    on_device = [t.to(device) for t in (x, shift, scale, *weight)]
    x_there, shift_there, scale_there, wq, w_scales = on_device

    found = quantize_rows(x_there, scheme, backend=backend)
    if not all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True)):
        return "quantised inputs differ from the reference"
    for prologue in (NORM, GELU):
        fused = quantize_rows(
            x_there,
            scheme,
            prologue=prologue,
            shift=shift_there,
            scale=scale_there,
            backend=backend,
        )
        plain = quantize_rows(
            x, scheme, prologue=prologue, shift=shift, scale=scale, backend="torch"
        )
        odd = (fused[0].cpu().int() - plain[0].int()).abs()
        if odd.max() > 1 or (odd > 0).float().mean() > MAX_ODD_SHARE:
            return f"inputs quantised behind {prologue} differ from the reference"
    (out,) = matmul_rows(found, [wq], [w_scales], [], scheme, torch.float32, backend=backend)
    total = reference.scaled_sum(expected, weight, scheme)
    if not torch.allclose(out.cpu(), total, rtol=1e-4, atol=1e-3):
        return f"the product is off by up to {(out.cpu() - total).abs().max():.3g}"
    return None

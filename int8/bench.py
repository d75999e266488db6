"""How fast an int8 linear layer is beside bf16: ``k1.py bench int8``. Nothing wrong is ever timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from int8.accuracy import quality
from int8.backends import INT_MM, TRITON, backends_for, has_triton
from int8.ops import matmul_rows, quantize_activation, quantize_rows, quantize_weight
from int8.scheme import DEFAULT
from int8.timing import gpu_seconds

PRO_TOKENS = 47_616
PRO_SHAPES = {
    "out": (4096, 4096),
    "qkv": (4096, 12288),
    "ff_in": (4096, 16384),
    "ff_out": (16384, 4096),
}
"""(K, N) of the linear layers of Pro's visual block; q, k and v are one."""

CHECKED_ROWS = 256
MIN_SQNR_DB = 36.0
"""What a candidate's result must reach against float32 before it is timed; the targets' own least is 38."""

MIN_BASELINE_SQNR_DB = 28.0
"""For kernels that truncate."""

Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Candidate:
    """One way to compute a linear layer: prepared once, then run for its time.

    Args:
        prepare: takes x bf16 [M, K] and weight bf16 [N, K] and gives what is timed, its result [M, N].
        min_sqnr_db: what the result must reach.
    """

    prepare: Callable[[torch.Tensor, torch.Tensor], Run]
    min_sqnr_db: float = MIN_SQNR_DB


def _cublas(x: torch.Tensor, weight: torch.Tensor) -> Run:
    return lambda: F.linear(x, weight)


def _int8_by(backend: str) -> Candidate:
    """int8 whose matmul is a backend's; the input is quantised the fastest way, whoever multiplies."""

    def prepare(x: torch.Tensor, weight: torch.Tensor) -> Run:
        q, scales = quantize_weight(weight)

        def run() -> torch.Tensor:
            quantized = quantize_rows(x, DEFAULT)
            (out,) = matmul_rows(quantized, [q], [scales], [], DEFAULT, x.dtype, backend=backend)
            return out

        return run

    return Candidate(prepare)


def candidates() -> dict[str, Candidate]:
    """Name → what is compared; the first is the yardstick."""
    found = {"bf16_cublas": Candidate(_cublas, min_sqnr_db=45.0), "int8_int_mm": _int8_by(INT_MM)}
    return {**found, "int8_triton": _int8_by(TRITON)} if has_triton() else found


def int8_bench(
    *,
    tokens: int = PRO_TOKENS,
    repetitions: int = 20,
    more: Mapping[str, Candidate] | None = None,
) -> dict[str, Any]:
    """Times of Pro's four linear layers, quantisation of the input included.

    Args:
        tokens: M.
        repetitions: timed runs of each, of which the median counts.
        more: further candidates.

    Returns:
        ``{"benchmark", "gpu", "tokens", "shapes": {name: {"k", "n", "seconds": {candidate: s},
        "tops": {…}, "speedup_over_bf16": {…}, "sqnr_db": {…}, "quantisation_s"}}}``.

    Raises:
        ValueError: a size below 1.
        NotImplementedError: no CUDA device that has int8 tensor cores.
        ArithmeticError: a candidate's result is wrong.
    """
    if tokens < 1 or repetitions < 1:
        raise ValueError(
            f"int8 bench with {tokens} tokens, {repetitions} repetitions; at least 1 each"
        )
    if not torch.cuda.is_available():
        raise NotImplementedError("timing int8 needs a CUDA device, and there is none here")
    device = torch.device("cuda", torch.cuda.current_device())
    if INT_MM not in backends_for(device):
        name = torch.cuda.get_device_name(device)
        raise NotImplementedError(f"{name} has no int8 path; Ampere (sm_80) or newer has")
    compared = {**candidates(), **(more or {})}
    shapes = {
        name: _measure(tokens, *sizes, compared, repetitions, device)
        for name, sizes in PRO_SHAPES.items()
    }
    return {
        "benchmark": "int8",
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "tokens": tokens,
        "shapes": shapes,
    }


def _measure(
    tokens: int,
    depth: int,
    columns: int,
    compared: Mapping[str, Candidate],
    repetitions: int,
    device: torch.device,
) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "generator": generator}
    x = torch.randn(tokens, depth, **options)
    weight = torch.randn(columns, depth, **options) * depth**-0.5
    seconds: dict[str, float] = {}
    sqnr_db: dict[str, float] = {}
    for name, candidate in compared.items():
        run = candidate.prepare(x, weight)
        sqnr_db[name] = check(name, run(), x, weight, candidate.min_sqnr_db)
        seconds[name] = median_seconds(run, repetitions)
    quantising = median_seconds(lambda: quantize_activation(x, DEFAULT)[0], repetitions)
    yardstick = next(iter(seconds.values()))
    operations = 2.0 * tokens * depth * columns
    return {
        "k": depth,
        "n": columns,
        "seconds": seconds,
        "tops": {name: round(operations / time / 1e12, 1) for name, time in seconds.items()},
        "speedup_over_bf16": {n: round(yardstick / time, 3) for n, time in seconds.items()},
        "sqnr_db": sqnr_db,
        "quantisation_s": quantising,
    }


def check(
    name: str, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, min_sqnr_db: float
) -> float:
    """SQNR in dB of the first and last rows of a result [M, N] against float32.

    Raises:
        ArithmeticError: it is below what is asked for, or not finite.
    """
    rows = torch.cat([torch.arange(len(x))[:CHECKED_ROWS], torch.arange(len(x))[-CHECKED_ROWS:]])
    rows = rows.to(x.device)
    exact = x[rows].float() @ weight.float().t()
    found = quality(out[rows], exact)["sqnr_db"]
    if not found >= min_sqnr_db:
        raise ArithmeticError(
            f"{name} gives {found} dB, at least {min_sqnr_db} are right: not timed"
        )
    return found


def median_seconds(run: Run, repetitions: int) -> float:
    """Median time of a run on the current CUDA device, after three that do not count."""
    return statistics.median(gpu_seconds(run, repetitions, warm_up=3))

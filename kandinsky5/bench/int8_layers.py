"""The int8 package's own benchmarks as K1 runs them: against its baseline and targets, and where it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from int8.accuracy import int8_accuracy
from int8.backends import has_triton
from int8.bench import MIN_BASELINE_SQNR_DB, PRO_TOKENS, Candidate, int8_bench
from kandinsky5.bench.baselines import baseline
from kandinsky5.circumstances import circumstances

OWN, RIVAL = "int8_triton", "int8_truncating_128"
SPEEDUP_LIMIT = 1.4
"""Of every one of Pro's four layers over cuBLAS in bf16 (B5)."""
LEAST_DB = {"gaussian": 38.0, "outliers": 34.0, "gelu": 36.0}
GAIN_LIMIT = 0.001


def int8_layers(*, tokens: int = PRO_TOKENS, repetitions: int = 20) -> dict[str, Any]:
    """Time Pro's four linear layers in int8, in bf16, and as the community's kernels compute them.

    Args:
        tokens: M.
        repetitions: timed runs of each, of which the median counts.

    Returns:
        What :func:`int8.bench.int8_bench` gives, ``reached`` {B5}: None unless M is that of the target, and
        the circumstances.

    Raises:
        ValueError, NotImplementedError, ArithmeticError: as :func:`int8.bench.int8_bench`.
    """
    measured = int8_bench(tokens=tokens, repetitions=repetitions, more=rivals())
    return {**measured, "reached": {"B5": speed_reached(measured)}, **circumstances()}


def rivals() -> dict[str, Candidate]:
    """The kernels of ``benchmarks/int8_baseline.py``, which need Triton; none where they are not."""
    module = baseline("int8_baseline") if has_triton() else None
    return {} if module is None else {RIVAL: Candidate(module.prepare, MIN_BASELINE_SQNR_DB)}


def speed_reached(measured: Mapping[str, Any]) -> bool | None:
    """Whether every layer is as much faster than bf16 as B5 asks; None where it was not measured for that."""
    shapes = [shape["speedup_over_bf16"] for shape in measured["shapes"].values()]
    if measured["tokens"] != PRO_TOKENS or not all(OWN in speedups for speedups in shapes):
        return None
    return all(speedups[OWN] >= SPEEDUP_LIMIT for speedups in shapes)


def accuracy(
    *, tokens: int = 128, features: int = 4096, outputs: int = 256, seed: int = 0
) -> dict[str, Any]:
    """SQNR of the int8 schemes on three kinds of input.

    Args:
        tokens, features, outputs, seed: as for :func:`int8.accuracy.int8_accuracy`.

    Returns:
        What that gives, ``reached``: for each kind of input whether the own scheme has the signal to noise
        and the gain that are asked for (A5), and the circumstances.

    Raises:
        ValueError: as :func:`int8.accuracy.int8_accuracy`.
    """
    table = int8_accuracy(tokens=tokens, features=features, outputs=outputs, seed=seed)
    own = table["schemes"]["own"]
    reached = {kind: is_accurate(own[kind], least_db) for kind, least_db in LEAST_DB.items()}
    return {**table, "reached": {"A5": all(reached.values()), **reached}, **circumstances()}


def is_accurate(found: Mapping[str, float], least_db: float) -> bool:
    """Whether signal to noise and gain of one kind of input are what they should be."""
    return found["sqnr_db"] >= least_db and abs(found["gain"] - 1) <= GAIN_LIMIT

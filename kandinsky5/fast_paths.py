"""Fast paths of this machine, each with its self-test: attention, quantised weights, Triton.

What judges is pure; torch and what stands on it are imported only while something is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import TYPE_CHECKING

from kandinsky5.checks import MISSING, OK, WARNING, Check
from kandinsky5.machine import imported, installed_version

if TYPE_CHECKING:
    import torch

    from kandinsky5.model.fast_weights import WeightsPath

PLAIN_WAYS = {"torch": "plain torch", "dequantised": "dequantising them block by block"}
"""Ways to compute with quantised weights that are right and slow, as people call them."""


def fast_paths(torch: ModuleType) -> Iterable[Check]:
    """A line for each, on the first GPU or, without one, the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield from _engines(torch, device)
    yield from _weights(torch, device)


def torch_itself(torch: ModuleType) -> Check:
    """torch itself, with a self-test of its attention against the plain formula."""
    query, key, value = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    fast = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    plain = torch.softmax(query @ key.transpose(-1, -2) / 8**0.5, dim=-1) @ value
    error = float((fast - plain).abs().max())
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    found = f"{torch.__version__}, {build}, {torch.get_num_threads()} threads; attention sdpa"
    if error > 1e-4:
        return Check("torch", MISSING, f"{found} is wrong by {error:.1e}", "install torch again")
    return Check("torch", OK, f"{found} right to {error:.0e}")


def _engines(torch: ModuleType, device: torch.device) -> Iterable[Check]:
    """Attention engines beside torch's own, each with its self-test."""
    from kandinsky5.model.engines import KINDS, examine, nabla_problem

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for kind in KINDS.values():
        found = examine(kind.name, device)
        yield judge_engine(kind.name, found.version, found.problem, found.installed, found.error)
    problem = nabla_problem(device, dtype, 128)
    if problem is None:
        how = "compiled for the GPU" if device.type == "cuda" else "in plain torch, slow"
        yield Check("attention nabla", OK, f"{how}, right by its self-test")
    else:
        advice = "presets with sparse attention run with full attention, slower; it needs triton"
        yield Check("attention nabla", WARNING, problem, advice)


def judge_engine(
    name: str, version: str | None, problem: str | None, installed: bool, error: float | None
) -> Check:
    """An engine that passed, is absent, or is there and cannot be used."""
    title = f"attention {name}"
    if problem is None:
        return Check(title, OK, f"{version or 'installed'}, right to {error or 0.0:.0e}")
    if not installed:
        return Check(title, MISSING, problem, "not needed: sdpa is used instead")
    return Check(
        title, WARNING, f"{version or 'installed'}: {problem}", "not used: sdpa is instead"
    )


def _weights(torch: ModuleType, device: torch.device) -> Iterable[Check]:
    """Quantised weights; seconds on a GPU, where kernels are compiled."""
    from kandinsky5.model.fast_weights import weights_path
    from kandinsky5.model.text_nf4 import nf4_problem

    looks: dict[str, Callable[[], Check]] = {
        "int8": lambda: judge_weights("int8", device.type, weights_path("int8", device)),
        "fp8": lambda: judge_weights("fp8", device.type, weights_path("fp8", device)),
        "nf4": lambda: judge_nf4(installed_version("bitsandbytes"), nf4_problem(device)),
    }
    for weights, look in looks.items():
        try:
            yield look()
        except torch.OutOfMemoryError:
            advice = "end what else uses the GPU, and look again"
            yield Check(f"weights {weights}", WARNING, "no memory free for the self-test", advice)


def judge_weights(weights: str, kind: str, path: WeightsPath) -> Check:
    """How int8 or fp8 weights are computed on a kind of device (``cpu``, ``cuda``)."""
    title = f"weights {weights}"
    where = "the CPU" if kind == "cpu" else "the GPU"
    if path.way is None:
        return Check(
            title, WARNING, str(path.failed), f"not used: choose --weights bf16 on {where}"
        )
    way = PLAIN_WAYS.get(path.way, path.way)
    if path.failed is not None:
        advice = (
            f"auto chooses another format where that fits; {weights} itself runs by {way}, slower"
        )
        return Check(title, WARNING, path.failed, advice)
    if path.lacking is not None:
        status = OK if kind == "cpu" else WARNING
        advice = "" if kind == "cpu" else f"{weights} files run all the same, slower"
        return Check(title, status, f"by {way}: {path.lacking}", advice)
    return Check(title, OK, f"by {way} on {where}, right by its self-test")


def judge_nf4(version: str | None, problem: str | None) -> Check:
    """Whether the text encoder's weights can be NF4."""
    title = "weights nf4"
    if problem is None:
        return Check(title, OK, f"bitsandbytes {version}, right by its self-test")
    if version is None:
        return Check(title, MISSING, problem, "not needed: the text encoder runs in bf16")
    return Check(title, WARNING, f"bitsandbytes {version}: {problem}", "not used: bf16 is instead")


def triton_itself() -> Check:
    """Whether it can be imported."""
    triton = imported("triton")
    if isinstance(triton, ModuleType):
        return Check("triton", OK, str(getattr(triton, "__version__", "can be imported")))
    advice = "not needed for the demo; on a GPU the fast kernels want it: pip install triton"
    return Check("triton", MISSING, triton, advice)

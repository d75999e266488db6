"""Attention engines of other packages, and which of them to trust on this machine.

Each is an optional import behind :class:`~kandinsky5.model.attention.AttentionEngine`. Before one is used it
attends, in the model's number of channels and dtype, over what sdpa attends over as well; an engine that is
absent, raises, or gives other numbers is not used, and the reason is kept.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from kandinsky5.errors import UserError
from kandinsky5.model.attention import AttentionEngine, NablaParams, sdpa
from kandinsky5.model.nabla import TILE, NablaAttention, plain_blocks

LOG = logging.getLogger(__name__)

HEADS = 3
SELF_TOKENS, TEXT_TOKENS = 1031, 77
"""Of the self-test: prime, so that no kernel's tiles fit, and a short context as the text is."""

NABLA_TOLERANCE = 0.01
GPU = "cuda"
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class EngineKind:
    """An engine that may be there.

    Attributes:
        name: as in a request.
        package: to install.
        module, function: where it is.
        tolerance: largest relative error against sdpa in float32; bfloat16 alone makes about 0.003.
        options: keywords of its call beyond query, key and value.
        how: to install it.
    """

    name: str
    package: str
    module: str
    function: str
    tolerance: float
    options: tuple[tuple[str, Any], ...] = ()
    how: str = ""

    def load(self) -> AttentionEngine:
        """The engine, not yet tested.

        Raises:
            ImportError: it is not there, or does not fit what is.
        """
        module = importlib.import_module(self.module)
        try:
            function: Callable[..., Any] = getattr(module, self.function)
        except AttributeError as error:
            raise ImportError(f"{self.module} has no {self.function}") from error
        options = dict(self.options)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            unbatched = query.dim() == 3
            q, k, v = (t.unsqueeze(0) if unbatched else t for t in (query, key, value))
            out = function(q, k, v, **options)
            if isinstance(out, tuple):  # some releases give the log-sum-exp as well
                out = out[0]
            return out.squeeze(0) if unbatched else out

        return attend


KINDS: dict[str, EngineKind] = {
    kind.name: kind
    for kind in (
        EngineKind(
            "flash3",
            "flash_attn_3",
            "flash_attn_interface",
            "flash_attn_func",
            tolerance=0.01,
            how="build flash-attention's hopper/ folder (H100 and H200 only)",
        ),
        EngineKind(
            "flash2",
            "flash_attn",
            "flash_attn",
            "flash_attn_func",
            tolerance=0.01,
            how="pip install flash-attn --no-build-isolation",
        ),
        EngineKind(
            "sage",
            "sageattention",
            "sageattention",
            "sageattn",
            tolerance=0.06,
            options=(("tensor_layout", "NHD"),),
            how="pip install sageattention (2.x, faster, is built from its source)",
        ),
    )
}
"""Engines beside sdpa as ``auto`` prefers them: exact ones first; sage computes q·k in 8 bits."""


@dataclass(frozen=True)
class Examined:
    """What is known of an engine on a device.

    Attributes:
        name: of the engine.
        engine: it, if it may be used.
        version: of its package, where that is known.
        problem: why it is not used.
        installed: whether it could be imported.
        error: relative error against sdpa, if it gave numbers.
    """

    name: str
    engine: AttentionEngine | None
    version: str | None = None
    problem: str | None = None
    installed: bool = True
    error: float | None = None


def choose_engine(
    name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[str, AttentionEngine]:
    """The engine to compute with.

    Args:
        name: ``sdpa``, one of :data:`KINDS`, or ``auto`` (also ``nabla``, whose text attention is chosen so):
            the first that passes its self-test.
        device, dtype, head_dim: of queries, keys and values.

    Returns:
        Its name and itself.

    Raises:
        UserError: the engine asked for by name cannot be used, with what to do.
    """
    if name == "sdpa":
        return name, sdpa
    if name in KINDS:
        found = examine(name, device, dtype, head_dim)
        if found.engine is None:
            kind = KINDS[name]
            advice = f"choose auto or sdpa, or {kind.how}" if not found.installed else "choose sdpa"
            raise UserError("attention", name, f"{found.problem}; {advice}")
        return name, found.engine
    if device.type == GPU and dtype in HALF:
        for kind in KINDS.values():
            found = examine(kind.name, device, dtype, head_dim)
            if found.engine is not None:
                return kind.name, found.engine
            if found.installed:
                LOG.warning("attention engine %s is not used: %s", kind.name, found.problem)
    return "sdpa", sdpa


@cache
def examine(
    name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128
) -> Examined:
    """Whether an engine can be used here; found out once per process."""
    kind = KINDS[name]
    try:
        engine = kind.load()
    except Exception as error:  # noqa: BLE001  an extension may fail in any way while it is loaded
        absent = isinstance(error, ModuleNotFoundError) and error.name == kind.module
        problem = "is not installed" if absent else f"cannot be imported: {_line(error)}"
        return Examined(name, None, None, f"{kind.package} {problem}", installed=not absent)
    version = _version(kind)
    if device.type != GPU or dtype not in HALF:
        problem = (
            f"needs a GPU and bfloat16, not {device.type} and {str(dtype).removeprefix('torch.')}"
        )
        return Examined(name, None, version, f"{kind.package} {problem}")
    return compared(kind, engine, device, dtype, head_dim, version)


def compared(
    kind: EngineKind,
    engine: AttentionEngine,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    version: str | None = None,
) -> Examined:
    """Have the engine attend over the tokens themselves and over a short text, beside sdpa in float32."""
    worst = 0.0
    for context in (SELF_TOKENS, TEXT_TOKENS):
        query, key, value = _sample(context, device, dtype, head_dim)
        expected = sdpa(query.float(), key.float(), value.float())
        try:
            out = engine(query, key, value)
            if out.shape != expected.shape or out.dtype != dtype:
                given = f"{list(out.shape)} in {out.dtype}"
                return Examined(kind.name, None, version, f"{kind.package} gave {given}")
            error = float((out.float() - expected).norm() / expected.norm())
        except Exception as failure:  # noqa: BLE001  a foreign kernel may fail in any way
            problem = f"{kind.package} failed its self-test: {_line(failure)}"
            return Examined(kind.name, None, version, problem)
        if not error <= kind.tolerance:
            problem = f"{kind.package} is wrong by {error:.2g} of its self-test's result"
            return Examined(kind.name, None, version, problem, error=error)
        worst = max(worst, error)
    return Examined(kind.name, engine, version, error=worst)


@cache
def nabla_problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why NABLA cannot be used here, or None; compared with its plain way once per process."""
    grid, params = (6, TILE, 2 * TILE), NablaParams(0.5, 1, 1, 1)
    tokens = grid[0] * grid[1] * grid[2]
    query, key, value = (t[:tokens] for t in _sample(tokens, device, dtype, head_dim))
    expected = NablaAttention(params, grid, device, plain_blocks)(query, key, value).float()
    try:
        out = NablaAttention(params, grid, device)(query, key, value)
    except Exception as failure:  # noqa: BLE001  compiling may fail in any way
        return f"flex attention failed its self-test: {_line(failure)}"
    error = float((out.float() - expected).norm() / expected.norm())
    return None if error <= NABLA_TOLERANCE else f"flex attention is wrong by {error:.2g}"


def _sample(
    context: int, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[torch.Tensor, ...]:
    """Queries [1031, 3, head_dim], keys and values [context, 3, head_dim], normed as the model's are."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((SELF_TOKENS, HEADS, head_dim), *[(context, HEADS, head_dim)] * 2)
    drawn = (torch.randn(shape, generator=generator) for shape in shapes)
    return tuple(tensor.to(device, dtype) for tensor in drawn)


def _version(kind: EngineKind) -> str | None:
    try:
        return importlib.metadata.version(kind.package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

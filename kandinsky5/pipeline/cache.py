"""Step caches: what the transformer's blocks did in one step stands in for them in the next.

A cache lends :meth:`~kandinsky5.model.dit.DiffusionTransformer3D.evaluate` one
:class:`~kandinsky5.model.dit.Residual` for each branch of a step; the model does not know why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from kandinsky5.errors import UserError
from kandinsky5.magcache import SkipRule, Skips, presets_with_ratios, ratios_of, skips_of
from kandinsky5.memory.whole import to_device, to_host
from kandinsky5.model.dit import Residual
from kandinsky5.request import GenerationRequest

_TENSOR = "residual."


class StepCache(Protocol):
    """What the denoising loop asks of a cache."""

    def skips(self, step: int) -> Sequence[bool]:
        """For each branch of the step (counted from 0) whether its blocks are skipped."""
        ...

    def residuals(self, step: int) -> Sequence[Residual | None]:
        """What the step's evaluation takes: for each branch a value, a place for one, or None."""
        ...


class MagCache:
    """Skips the evaluations that :func:`kandinsky5.magcache.skips_of` says.

    What the blocks added is kept only for a branch that is skipped next, in place of its stream: inside the
    blocks a run with this cache takes no more memory than one without, and between steps one unit of
    [S, model_dim] for each branch.

    Args:
        plan: of the whole run.
        device: where residuals are wanted.
        tensors: residuals of a run that is gone on with, as :meth:`tensors` gave them.
    """

    def __init__(
        self,
        plan: Skips,
        *,
        device: torch.device,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._plan = plan
        self._held = {
            int(name.removeprefix(_TENSOR)): Residual(to_device(tensor, device))
            for name, tensor in (tensors or {}).items()
        }

    def skips(self, step: int) -> Sequence[bool]:
        return self._plan[step]

    def residuals(self, step: int) -> Sequence[Residual | None]:
        return [self._of(step, branch, skip) for branch, skip in enumerate(self._plan[step])]

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """In main memory, what going on after ``step`` steps needs."""
        return {
            name: to_host(self._held[branch].value)  # type: ignore[arg-type]
            for branch, name in needed(self._plan, step).items()
        }

    def _of(self, step: int, branch: int, skip: bool) -> Residual | None:
        if skip:
            return self._held[branch]
        self._held.pop(branch, None)
        if branch not in needed(self._plan, step + 1):
            return None
        return self._held.setdefault(branch, Residual())


def needed(plan: Skips, step: int) -> dict[int, str]:
    """Branches whose residuals the evaluation at ``step`` takes, and the names of these in a saved state."""
    skips = plan[step] if step < len(plan) else ()
    return {branch: f"{_TENSOR}{branch}" for branch, skip in enumerate(skips) if skip}


def check_tensors(
    plan: Skips, step: int, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]
) -> None:
    """Refuse residuals that are not those which going on at ``step`` takes.

    Args:
        shape: [tokens, model_dim] of each.

    Raises:
        UserError: one is missing, strange or of another shape.
    """
    names = set(needed(plan, step).values())
    if names != set(tensors) or any(tensor.shape != shape for tensor in tensors.values()):
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise UserError("file", found, f"a step cache with {sorted(names)} of {list(shape)} each")


def skip_plan(request: GenerationRequest, branches: Sequence[int]) -> Skips | None:
    """What a request's cache skips; None without a cache.

    Args:
        request: settled.
        branches: for each step, how many it evaluates.

    Raises:
        UserError: there are no ratios for its preset.
    """
    if request.cache == "none":
        return None
    rule = SkipRule(threshold=request.cache_threshold, retention=request.cache_retention)
    return skips_of(measured_ratios(request), branches, rule)


def measured_ratios(request: GenerationRequest) -> tuple[float, ...]:
    """Those of the request's preset.

    Raises:
        UserError: there are none.
    """
    ratios = ratios_of(request.preset)
    if ratios is None:
        raise UserError(
            "cache",
            request.cache,
            f"no ratios have been measured for {request.preset}; use none, or one of the presets"
            f" {', '.join(presets_with_ratios())}",
        )
    return ratios

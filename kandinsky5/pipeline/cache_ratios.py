"""Measures the ratios that MagCache needs: how much longer what the blocks add becomes from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kandinsky5.model.dit import Residual


class RatioMeter:
    """A step cache that skips nothing and looks at what the blocks add.

    Args:
        branches: for each step, how many it evaluates.
    """

    def __init__(self, branches: Sequence[int]) -> None:
        self._branches = branches
        self._now: list[Residual] = []
        self._before: list[torch.Tensor] = []
        self._measured: list[list[float]] = []

    def skips(self, step: int) -> Sequence[bool]:
        return (False,) * self._branches[step]

    def residuals(self, step: int) -> Sequence[Residual | None]:
        self._look()
        self._now = [Residual() for _ in range(self._branches[step])]
        return self._now

    def ratios(self) -> list[list[float]]:
        """For each step from the second on, for each branch; a step that lacks a branch lacks its ratio.

        A ratio is the mean over all tokens of |added now| / |added in the step before|.
        """
        self._look()
        return self._measured

    def _look(self) -> None:
        """Compare what the last step added with what the one before it did, and keep only that."""
        added = [slot.value.float() for slot in self._now if slot.value is not None]
        if not added:
            return
        if self._before:
            pairs = zip(added, self._before, strict=False)
            self._measured.append(
                [float((new.norm(dim=-1) / old.norm(dim=-1)).mean()) for new, old in pairs]
            )
        self._before, self._now = added, []

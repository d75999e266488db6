"""How often a preview is made. Apart from the previews themselves so that asking for them loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_PREVIEWS = 60
"""Of one run; the slider of a longer schedule moves in strides."""


@dataclass(frozen=True)
class PreviewEvery:
    """How often a preview is made: after this many steps, these seconds apart at the least.

    Whatever is asked, a run of ``total`` steps makes no more than :data:`MAX_PREVIEWS`, and its last step
    has one.
    """

    steps: int = 1
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.seconds >= 0:
            raise ValueError(
                f"every {self.steps} steps, {self.seconds} s; 1 step, 0 s at the least"
            )

    def stride(self, total: int) -> int:
        """Steps from one preview to the next in a schedule of ``total``."""
        return max(self.steps, math.ceil(total / (MAX_PREVIEWS - 1)))

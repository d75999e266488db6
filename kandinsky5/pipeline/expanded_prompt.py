"""The result of a job that makes nothing but a rewritten prompt. Only the standard library is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ExpandedPrompt:
    """What came of a job that only has its prompt rewritten.

    Attributes:
        text: None where the answer was of no use.
        seconds: wall time.
        notices: what the user should know.
    """

    text: str | None
    seconds: float
    notices: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Under the names that a :class:`~kandinsky5.request.GenerationResult` has for them."""
        return {
            "expanded_prompt": self.text,
            "seconds": {"total": self.seconds},
            "notices": self.notices,
        }

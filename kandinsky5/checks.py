"""One line of what is known of this machine. Only the standard library is needed here."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, MISSING = "ok", "warning", "missing"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: ``ok``, ``warning`` (works less well) or ``missing``.
        found: what is there, or why it is not.
        advice: what to do; empty when nothing need be done.
    """

    name: str
    status: str
    found: str
    advice: str = ""

"""“System”: what the doctor says of this machine, and the end of the worker's log. Only read here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky5 import __version__
from kandinsky5.ui.views import safe

if TYPE_CHECKING:
    from kandinsky5.ui.machine_notice import MachineNotice

LOG_LINES = 60
LOG_BYTES = 64_000
"""So much of the log's end is read."""
STATES = {"ok": "✓", "missing": "–", "warning": "!", "failed": "✗"}
LOOKING = '<p class="k1-none">The doctor still looks at this machine…</p>'
NO_REPORT = '<p class="k1-none">The doctor gave no report; “k1.py doctor” says more.</p>'


class SystemInfo:
    """What the page shows of the machine.

    Args:
        machine: knows what the doctor said; None where none was asked.
        log_file: of the worker.
    """

    def __init__(self, machine: MachineNotice | None, log_file: Path) -> None:
        self._machine = machine
        self._log_file = log_file

    def look(self) -> tuple[str, str, str]:
        """The doctor's checks, the end of the log, and both as text to be copied."""
        report = {} if self._machine is None else self._machine.report()
        log = log_end(self._log_file)
        shown = LOOKING if report is None else checks_view(report)
        return (
            shown,
            f'<pre class="k1-log">{safe(log or "nothing yet")}</pre>',
            _text(report or {}, log),
        )


def checks_view(report: Mapping[str, Any]) -> str:
    """A row for each check."""
    checks = report.get("checks")
    if not isinstance(checks, Sequence) or not checks:
        return NO_REPORT
    rows = "".join(
        f'<tr data-status="{safe(check["status"])}"><td>{STATES.get(check["status"], "!")}</td>'
        f"<th scope=row>{safe(check['name'])}</th><td>{safe(check['found'])}{_advice(check)}</td></tr>"
        for check in checks
    )
    return (
        f'<section class="k1-info"><p>{safe(report.get("summary", ""))}</p>'
        f'<div class="k1-info-table"><table><tbody>{rows}</tbody></table></div></section>'
    )


def _advice(check: Mapping[str, Any]) -> str:
    return f"<i>{safe(check['advice'])}</i>" if check.get("advice") else ""


def log_end(file: Path) -> str:
    """The last :data:`LOG_LINES` lines of a log; empty where there is none."""
    try:
        with file.open("rb") as log:
            log.seek(max(0, file.stat().st_size - LOG_BYTES))
            text = log.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-LOG_LINES:])


def _text(report: Mapping[str, Any], log: str) -> str:
    lines = [f"K1 {__version__}", str(report.get("summary", ""))]
    for check in report.get("checks") or ():
        advice = f" ({check['advice']})" if check.get("advice") else ""
        lines.append(f"{check['status']:8} {check['name']}: {check['found']}{advice}")
    return "\n".join([*lines, "", "worker.log:", log])

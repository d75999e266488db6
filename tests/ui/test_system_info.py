"""What the doctor says and the worker's log, as the page shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kandinsky5.ui import system_info
from kandinsky5.ui.machine_notice import doctor_command
from kandinsky5.ui.system_info import LOG_LINES, SystemInfo, log_end
from kandinsky5.worker.client import Folders

CHECK = {"name": "gpu", "status": "missing", "found": "<no card>", "advice": "take another"}


class Machine:
    def __init__(self, report: dict[str, Any] | None) -> None:
        self._report = report

    def report(self) -> dict[str, Any] | None:
        return self._report


def looked(report: dict[str, Any] | None, log: Path) -> tuple[str, str, str]:
    return SystemInfo(Machine(report), log).look()


def test_checks_and_log_are_shown_as_text_and_can_be_copied(tmp_path):
    log = tmp_path / "worker.log"
    log.write_text("worker 12\n<script>bad</script>\n")
    checks, tail, text = looked({"summary": "It works.", "checks": [CHECK]}, log)
    assert "&lt;no card&gt;" in checks
    assert "It works." in checks
    assert 'data-status="missing"' in checks
    assert "<script>" not in tail
    assert "worker 12" in tail
    for said in ("K1 ", "gpu: <no card> (take another)", "<script>bad"):
        assert said in text


def test_while_the_doctor_looks_and_where_he_failed_it_is_said(tmp_path):
    assert looked(None, tmp_path / "none")[0] == system_info.LOOKING
    assert looked({}, tmp_path / "none")[0] == system_info.NO_REPORT
    assert SystemInfo(None, tmp_path / "none").look()[0] == system_info.NO_REPORT


def test_of_a_long_log_the_end_is_read(tmp_path):
    log = tmp_path / "worker.log"
    log.write_text("".join(f"line {number} {'x' * 400}\n" for number in range(5000)))
    lines = log_end(log).splitlines()
    assert len(lines) == LOG_LINES
    assert lines[-1].startswith("line 4999 ")


def test_the_doctor_is_asked_about_the_studios_own_folders(tmp_path):
    command = doctor_command(Folders(tmp_path / "o", (tmp_path,)), tmp_path / "s")
    for flag, folder in (("--outdir", "o"), ("--state-dir", "s"), ("--models-dir", "")):
        assert command[command.index(flag) + 1] == str(tmp_path / folder)

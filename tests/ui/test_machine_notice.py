"""The line about the machine, from the doctor's own report."""

from __future__ import annotations

import json
import sys

import pytest

from kandinsky5.ui import views
from kandinsky5.ui.machine_notice import DOCTOR, MachineNotice


def told(report: str) -> str | None:
    notice = MachineNotice((sys.executable, "-c", f"print({report!r})"))
    notice.start()
    return notice.text(timeout_s=60)


def test_without_a_gpu_the_page_says_what_works() -> None:
    text = told(json.dumps({"has_gpu": False, "summary": "The built-in demo works here."}))
    assert text is not None
    assert text.startswith("The built-in demo works here.")
    assert "doctor" in text


def test_with_a_gpu_there_is_nothing_to_say() -> None:
    assert told(json.dumps({"has_gpu": True, "summary": "All is well."})) == ""


def test_what_the_doctor_found_is_there_for_the_plan() -> None:
    cards = [{"name": "a card", "total_bytes": 2, "free_bytes": 1}]
    text = json.dumps({"has_gpu": True, "cards": cards})
    notice = MachineNotice((sys.executable, "-c", f"print({text!r})"))
    assert notice.report() is None
    notice.start()
    assert notice.report(timeout_s=60) == {"has_gpu": True, "cards": cards}


@pytest.mark.parametrize("broken", ["", "no json", "[]", "{}"])
def test_a_doctor_that_fails_leaves_the_page_alone(broken) -> None:
    assert told(broken) == ""


def test_a_doctor_that_hangs_can_be_ended() -> None:
    notice = MachineNotice((sys.executable, "-c", "import time; time.sleep(600)"))
    notice.start()
    assert notice.text() is None
    while notice.text(timeout_s=0.05) is None:
        notice.stop()
    assert notice.text() == ""


def test_the_real_doctor_is_what_is_asked() -> None:
    assert DOCTOR[0] == sys.executable
    assert DOCTOR[2:] == ("doctor", "--json")


def test_the_notice_is_text_and_never_markup() -> None:
    assert "<script>" not in views.notice("<script>alert(1)</script>")
    assert views.notice("") == ""

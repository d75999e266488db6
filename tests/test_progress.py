"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest

from kandinsky5.events import Notice, StageStarted, StepDone
from kandinsky5.progress import BAR_CELLS, ProgressLine, step_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_job(stream: io.StringIO, steps: int) -> str:
    progress = ProgressLine(stream)
    progress(StageStarted("denoise"))
    for step in range(1, steps + 1):
        progress(StepDone(step, steps, 0.5, 0.5 * (steps - step)))
    progress.close()
    return stream.getvalue()


@pytest.mark.parametrize(("steps", "lines"), [(1, 1), (3, 3), (5, 5), (16, 5), (50, 5), (1000, 5)])
def test_in_a_file_a_job_takes_few_lines(steps: int, lines: int) -> None:
    written = run_job(io.StringIO(), steps).splitlines()
    assert len(written) == 1 + lines
    assert f"{steps}/{steps}" in written[-1]
    assert not any("\r" in line for line in written)


def test_on_a_terminal_one_line_changes_and_is_gone_at_the_end() -> None:
    written = run_job(Terminal(), 7)
    assert "\n" not in written
    assert written.count("/7 [") == 7
    assert written.endswith("\r\x1b[K")


def test_a_notice_stays_above_the_changing_line() -> None:
    stream = Terminal()
    progress = ProgressLine(stream)
    progress(StageStarted("denoise"))
    progress(Notice("width set to 64"))
    assert stream.getvalue().endswith("\r\x1b[Knote: width set to 64\n")


@pytest.mark.parametrize(("step", "filled"), [(0, 0), (1, 0), (25, 12), (49, 23), (50, 24)])
def test_the_bar_is_full_only_at_the_end(step: int, filled: int) -> None:
    line = step_line("denoise", StepDone(step, 50, 1.0, 0.0))
    assert line.count("█") == filled
    assert line.count("█") + line.count("·") == BAR_CELLS


@pytest.mark.parametrize(
    ("eta_s", "shown"),
    [(0.2, "0:00 left"), (61, "1:01 left"), (3725, "1:02:05 left"), (-1, "0:00")],
)
def test_the_time_left_reads_as_a_clock(eta_s: float, shown: str) -> None:
    assert shown in step_line("denoise", StepDone(1, 2, 1.0, eta_s))

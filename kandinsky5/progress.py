"""A job's events as lines for a person: one that changes on a terminal, a few that stay elsewhere."""

from __future__ import annotations

from typing import TextIO

from kandinsky5.events import Notice, PipelineEvent, StageStarted, StepDone

BAR_CELLS = 24
LINES_PER_STAGE = 5
"""At most so many lines about steps where they cannot overwrite each other."""


class ProgressLine:
    """An event sink that writes to a text stream.

    Args:
        stream: where to write; asked once whether it is a terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._stage = ""
        self._unfinished = False

    def __call__(self, event: PipelineEvent) -> None:
        if isinstance(event, StageStarted):
            self._stage = event.stage
            self._show(f"{event.stage} …")
        elif isinstance(event, StepDone):
            if self._is_terminal or _is_worth_a_line(event):
                self._show(step_line(self._stage, event))
        elif isinstance(event, Notice):
            self._keep(f"note: {event.text}")

    def close(self) -> None:
        """End the changing line, so that what is written next begins on its own."""
        if self._unfinished:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._unfinished = False

    def _show(self, text: str) -> None:
        if not self._is_terminal:
            self._keep(text)
            return
        self._stream.write(f"\r\x1b[K{text}")
        self._stream.flush()
        self._unfinished = True

    def _keep(self, text: str) -> None:
        self.close()
        self._stream.write(f"{text}\n")
        self._stream.flush()


def step_line(stage: str, event: StepDone) -> str:
    """``denoise  5/20 [██████··················]  0.41 s a step, 0:06 left``."""
    filled = BAR_CELLS * event.step // event.total
    bar = "█" * filled + "·" * (BAR_CELLS - filled)
    count = f"{event.step:{len(str(event.total))}d}/{event.total}"
    return (
        f"{stage} {count} [{bar}] {event.seconds_per_step:.2f} s a step, {_clock(event.eta_s)} left"
    )


def _is_worth_a_line(event: StepDone) -> bool:
    """Whether this step is the first to reach another fifth of the way."""
    reached = event.step * LINES_PER_STAGE // event.total
    return reached > (event.step - 1) * LINES_PER_STAGE // event.total


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

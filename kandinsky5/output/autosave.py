"""When a run is saved while it goes on, and which of its saved states are kept."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kandinsky5.output.unfinished import UnfinishedFiles

if TYPE_CHECKING:
    from kandinsky5.output.run_state import RunState

log = logging.getLogger(__name__)

DEFAULT_MINUTES = 5.0
DEFAULT_KEEP = 2
_NAME = re.compile(r"step-(\d{5})\.safetensors")


class Autosave:
    """Says when the next state is due; pure in time.

    Args:
        every_minutes: since the last save, or since this was made; None never for the time's sake.
        every_steps: since the last save; None never for the steps' sake.
        clock: seconds that only grow.

    Raises:
        ValueError: not above 0.
    """

    def __init__(
        self,
        *,
        every_minutes: float | None = DEFAULT_MINUTES,
        every_steps: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if (every_minutes is not None and not every_minutes > 0) or (
            every_steps is not None and every_steps < 1
        ):
            raise ValueError(f"every {every_minutes} minutes, every {every_steps} steps")
        self._every_minutes, self._every_steps, self._clock = every_minutes, every_steps, clock
        self._saved_at, self._saved_step = clock(), 0

    def is_due(self, step: int) -> bool:
        """Whether to save after this step."""
        waited_s = self._clock() - self._saved_at
        by_time = self._every_minutes is not None and waited_s >= 60.0 * self._every_minutes
        by_steps = self._every_steps is not None and step - self._saved_step >= self._every_steps
        return by_time or by_steps

    def saved(self, step: int) -> None:
        """Count from here."""
        self._saved_at, self._saved_step = self._clock(), step


class StateKeeper:
    """The saved states of one run in a folder of its own: the newest few, written one after the other.

    Args:
        folder: made with the first state.
        autosave: says when one is due.
        keep: how many stay, 1 or more. An older one goes only after a newer one is safely there.
    """

    def __init__(
        self, folder: Path, *, autosave: Autosave | None = None, keep: int = DEFAULT_KEEP
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep {keep} states; 1 at the least")
        self.folder = folder
        self._autosave = autosave or Autosave()
        self._keep = keep
        self._on_stop = threading.Event()

    @property
    def save_on_stop(self) -> bool:
        """Whether a stop of this run is to leave a state behind; may be set from any thread."""
        return self._on_stop.is_set()

    def ask_to_save_on_stop(self) -> None:
        self._on_stop.set()

    def is_due(self, step: int) -> bool:
        """Whether to save after this step."""
        return self._autosave.is_due(step)

    def save(self, state: RunState) -> Path:
        """Write ``step-NNNNN.safetensors`` and drop the oldest beyond those kept.

        A failure also counts as a try: the next one is due after the usual time, not after every step.

        Raises:
            UserError, DiskFull: see :func:`kandinsky5.output.run_state.save_run_state`; the states that
                were there stay.
        """
        from kandinsky5.output.run_state import save_run_state  # torch: not before it is needed

        self._autosave.saved(state.step)
        path = save_run_state(self.folder / f"step-{state.step:05d}.safetensors", state)
        others = [other for other in self._paths() if other != path]
        for old in others[: max(0, len(others) - (self._keep - 1))]:
            _remove(old)
        return path

    def newest(self) -> Path | None:
        """The state of the latest step."""
        paths = self._paths()
        return paths[-1] if paths else None

    def discard(self) -> None:
        """Remove all states and what a killed process left of one; the folder too once it is empty."""
        if not self.folder.is_dir():
            return
        for path in self._paths():
            _remove(path)
        UnfinishedFiles(self.folder).close()
        try:
            self.folder.rmdir()
        except OSError:
            log.debug("%s stays", self.folder)

    def _paths(self) -> list[Path]:
        """By step, the oldest first."""
        try:
            found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        except OSError:
            return []
        return sorted(found, key=lambda path: path.name)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s could not be removed: %s", path, error)

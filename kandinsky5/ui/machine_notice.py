"""What the page knows of the machine, and what it says of it: nothing where all is well.

The page's process imports no torch, so the looking is done by ``k1.py doctor`` in a process of its own.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kandinsky5.worker.client import Folders

log = logging.getLogger(__name__)

DOCTOR = (
    sys.executable,
    str(Path(__file__).resolve().parents[2] / "k1.py"),
    "doctor",
    "--json",
)
PATIENCE_S = 120


def doctor_command(folders: Folders, state_dir: Path) -> tuple[str, ...]:
    """The doctor, asked about the studio's own folders."""
    options = ["--outdir", str(folders.out_dir), "--state-dir", str(state_dir)]
    for folder in folders.model_names:
        options += ["--models-dir", folder]
    return (*DOCTOR, *options)


class MachineNotice:
    """Asks the doctor once, in the background.

    Args:
        command: prints the doctor's report as JSON.
    """

    def __init__(self, command: Sequence[str] = DOCTOR) -> None:
        self._command = tuple(command)
        self._known = threading.Event()
        self._text = ""
        self._report: Mapping[str, Any] | None = None
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Begin looking; returns at once."""
        threading.Thread(target=self._ask, name="doctor", daemon=True).start()

    def stop(self) -> None:
        """End the doctor if it still looks."""
        if self._process is not None:
            self._process.kill()

    def text(self, timeout_s: float = 0.0) -> str | None:
        """The notice, empty where there is nothing to say, None while the doctor still looks."""
        return self._text if self._known.wait(timeout_s) else None

    def report(self, timeout_s: float = 0.0) -> Mapping[str, Any] | None:
        """What the doctor said, empty where it failed, None while it still looks."""
        return (self._report or {}) if self._known.wait(timeout_s) else None

    def _ask(self) -> None:
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            report = json.loads(self._process.communicate(timeout=PATIENCE_S)[0])
            if not report["has_gpu"]:
                self._text = f"{report['summary']} “k1.py doctor” says why."
            self._report = report
        except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
            log.warning("the doctor gave no report: %s", error)
            self.stop()
        finally:
            self._known.set()

"""``k1.py`` in real processes that are quick to start: forked from one that has loaded the libraries."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["kandinsky5.pipeline.pipeline", "transformers"])


class ForkedK1:
    """A command of :class:`kandinsky5.bench.resume_kills.Command`'s kind."""

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        self._process = _CONTEXT.Process(target=_carry_out, args=(tuple(words), str(folder)))
        self._process.start()

    def wait(self, timeout_s: float) -> int | None:
        self._process.join(timeout_s)
        return self._process.exitcode

    def kill(self) -> None:
        try:
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own yet
            self._process.kill()
        self._process.join()


def _carry_out(words: tuple[str, ...], folder: str) -> None:
    os.setsid()
    os.chdir(folder)
    for name, stream in (("stdout", 1), ("stderr", 2)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, stream)
        os.close(file)
    from kandinsky5.cli import main

    code = main(words)
    sys.stdout.flush()
    os._exit(code)

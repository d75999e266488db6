"""The parent's end of one worker process: start it, speak with it, end it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection

from kandinsky5.worker.protocol import Command, Event, WorkerSettings

KILL_WAIT_S = 2.0


class WorkerHandle:
    """A worker process that starts when this is made.

    The thread that makes it must outlive the worker: Linux counts the end of that thread as the parent's end.

    Attributes:
        connection: readable when the worker has said something or is gone.
        ready: set by the owner once the worker said that it is.

    Raises:
        OSError: the system has no room for another process.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.ready = False
        self._process = context.Process(target=_serve, args=(theirs, settings), name="k1-worker")
        try:
            self._process.start()
        except OSError:
            self.connection.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, command: Command) -> None:
        """Tell the worker; if it is gone, :meth:`receive` says so."""
        with contextlib.suppress(OSError):
            self.connection.send(command)

    def receive(self) -> Event:
        """The next event; waits for it.

        Raises:
            EOFError, OSError: the worker is gone.
        """
        event: Event = self.connection.recv()
        return event

    def kill(self) -> None:
        """End the worker and all it started, at once; may be called from any thread."""
        self._process.kill()
        if sys.platform != "win32" and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it had not yet made its group
                os.killpg(self._process.pid, signal.SIGKILL)

    def end(self, grace_s: float) -> int | None:
        """Wait that long for the worker to leave, then kill it.

        Returns:
            Its exit code, −n for signal n; None if not even that ended it.
        """
        self._process.join(grace_s)
        self.kill()
        self._process.join(KILL_WAIT_S)
        self.connection.close()
        return self._process.exitcode


def describe_death(exit_code: int | None, log_file: str) -> str:
    """One line on why a worker is gone that nobody sent away."""
    if exit_code == -signal.SIGKILL:
        return "worker was killed, probably for want of RAM"
    if exit_code is None or exit_code >= 0:
        return f"worker crashed (exit code {exit_code}); see the log {log_file}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = str(-exit_code)
    return f"worker crashed (signal {name}); see the log {log_file}"


def _serve(connection: Connection, settings: WorkerSettings) -> None:
    # The parent must not load what the worker loads, so the import waits until we are in the child.
    from kandinsky5.worker.process import serve

    serve(connection, settings)

"""The bundled ffmpeg as a child process that cannot block, linger or leave without a word."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import Any

import imageio_ffmpeg

from kandinsky5.errors import K1Error

_STDERR_LINES = 12


class Encoder:
    """One running ffmpeg: its input, its last words, its end.

    Args:
        arguments: what stands behind the program's name on the command line.

    Attributes:
        input: the pipe to its standard input.

    Raises:
        K1Error: it cannot be started.
    """

    def __init__(self, arguments: list[str]) -> None:
        try:
            command = [imageio_ffmpeg.get_ffmpeg_exe(), *arguments]
            # A group of its own: Ctrl-C in the terminal is for this program, which then stops ffmpeg.
            if sys.platform == "win32":
                flags = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP
                self._process = self._spawn(command, creationflags=flags)
            else:
                self._process = self._spawn(command, start_new_session=True)
        except (OSError, RuntimeError) as error:
            raise K1Error(
                f"ffmpeg cannot be started ({error}); reinstall imageio-ffmpeg"
            ) from error
        assert self._process.stdin is not None
        self.input = self._process.stdin
        self._lines: deque[str] = deque(maxlen=_STDERR_LINES)
        self._reader = threading.Thread(target=self._read_stderr, name="ffmpeg-stderr", daemon=True)
        self._reader.start()

    @staticmethod
    def _spawn(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            **options,
        )

    def _read_stderr(self) -> None:
        """Runs in a thread of its own: a full pipe would stop ffmpeg."""
        stream = self._process.stderr
        assert stream is not None
        with stream:
            for line in stream:
                self._lines.append(line.decode("utf-8", "replace").strip())

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit code; an ffmpeg that does not end in time is killed."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._reader.join()
        return code

    def last_lines(self) -> list[str]:
        """The end of what it wrote to stderr."""
        return list(self._lines)

    def stop(self) -> None:
        """End the process, whatever it is doing; nothing happens when it has ended."""
        if self._process.poll() is None:
            self._process.kill()
        self.wait()
        with suppress(OSError):  # what the pipe still held has nobody to go to
            self.input.close()

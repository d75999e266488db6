"""The server that the studio runs on, and how it ends."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from gradio.routes import App as GradioApp
from starlette.routing import Mount

SHUTDOWN_S = 2


class StudioServer(uvicorn.Server):
    """uvicorn with the studio in it.

    A shutdown waits only ``SHUTDOWN_S`` for answers under way.
    """

    def __init__(self, studio: FastAPI) -> None:
        self.studio = studio
        super().__init__(
            uvicorn.Config(
                self.studio,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=SHUTDOWN_S,
                server_header=False,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # the streams to open pages would otherwise be cut off, each with a traceback in the terminal
        for route in self.studio.routes:
            if isinstance(route, Mount) and isinstance(route.app, GradioApp):
                route.app.stop_event.set()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn would raise the signal again at its end and so kill the process before the worker is closed
        yield

    @contextmanager
    def told_by_signals(self) -> Iterator[None]:
        """End the server at SIGINT or SIGTERM; only in the main thread, where signals arrive."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

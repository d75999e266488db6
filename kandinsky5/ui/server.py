"""The socket and the server that the studio runs on, and how it ends."""

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

from kandinsky5.errors import UserError

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


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: the port is taken (naming the next free one), or the address is not this machine's.
    """
    try:
        return _listening(host, port)
    except PermissionError as error:
        raise UserError(
            "port", port, "ports below 1024 belong to the system; try --port 7860"
        ) from error
    except OSError as error:
        free = next(
            (other for other in range(port + 1, min(port + 200, 65536)) if _is_free(host, other)),
            None,
        )
        if _answers_to(host) and free is not None:
            raise UserError("port", port, f"{port} is in use: try --port {free}") from error
        raise UserError("host", host, f"an address of this machine ({error.strerror})") from error


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def _is_free(host: str, port: int) -> bool:
    try:
        _listening(host, port).close()
    except OSError:
        return False
    return True


def _answers_to(host: str) -> bool:
    """Whether the address itself can be used, whatever the port."""
    return _is_free(host, 0)

"""The socket that the studio listens on, and the addresses at which it is then found."""

from __future__ import annotations

import socket

from kandinsky5.errors import UserError

EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that mean every interface → the one that this machine reaches itself by."""


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


def shown_address(listener: socket.socket) -> str:
    """Where a browser finds a bound socket: its URL, and the one for other machines if they are let in."""
    host, port = listener.getsockname()[:2]
    if host not in EVERYWHERE:
        return _url(host, port)
    here = _url(EVERYWHERE[host], port)
    return f"{here}, from other machines at {_url(socket.gethostname(), port)}"


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

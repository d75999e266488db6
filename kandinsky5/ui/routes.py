"""The door in front of the studio, and the routes that serve results and previews.

The door is an ASGI middleware around everything: it refuses requests that other web sites make through the
visitor's browser, asks for the password when there is one, and closes the parts of gradio that fetch from
other hosts.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import logging
import socket
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

if TYPE_CHECKING:
    from kandinsky5.ui.options import StudioOptions
    from kandinsky5.worker.client import WorkerClient

log = logging.getLogger(__name__)

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
MEDIA_TYPES = {".mp4": "video/mp4", ".png": "image/png"}
CLOSED_PREFIXES = ("/gradio_api/proxy=", "/gradio_api/file=http", "/gradio_api/runs", "/monitoring")
"""Parts of gradio that talk to other hosts or show what visitors did; the studio needs none."""


class Door:
    """ASGI middleware: 400 for a foreign Host, 403 for a foreign Origin, 401 without the password.

    Args:
        app: what lies behind.
        hosts: names besides this machine's own that may stand in the Host header.
        any_address: accept every IP address as Host, for a studio that listens to the network; a name is
            what a rebinding attack needs, an address is not.
        credentials: (user, password), or None.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str] = (),
        any_address: bool = False,
        credentials: tuple[str, str] | None = None,
    ) -> None:
        self.app = app
        self.hosts = {*LOCAL_NAMES, *(name.lower() for name in hosts)}
        self.any_address = any_address
        self.credentials = credentials

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(scope, Headers(scope=scope))
        elif scope["type"] == "websocket":
            refusal = PlainTextResponse("no websockets here", 403)
        else:
            refusal = None
        await (refusal or self.app)(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if not self._known_host(host):
            log.warning("refused a request for the host %r", host)
            return PlainTextResponse("This host name is not the studio's.", 400)
        if _is_foreign(scope["method"], scope["path"], host, headers):
            log.warning("refused a request from the page %r", headers.get("origin"))
            return PlainTextResponse("Requests from other web sites are refused.", 403)
        if self.credentials and not _knows(self.credentials, headers.get("authorization", "")):
            ask = {"WWW-Authenticate": 'Basic realm="K1", charset="UTF-8"'}
            return PlainTextResponse("User and password, please.", 401, headers=ask)
        if unquote(scope["path"]).lower().startswith(CLOSED_PREFIXES):
            return PlainTextResponse("Not part of the studio.", 403)
        return None

    def _known_host(self, header: str) -> bool:
        try:
            name = (urlsplit(f"//{header}").hostname or "").lower()
        except ValueError:
            return False
        if name in self.hosts:
            return True
        return self.any_address and _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_foreign(method: str, path: str, host: str, headers: Headers) -> bool:
    """Whether another site's page makes this request; programs send neither of the two headers."""
    if method in SAFE_METHODS:
        return path.startswith("/k1/") and headers.get("sec-fetch-site") == "cross-site"
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    return origin.lower().partition("://")[2] != host.lower()


def _knows(credentials: tuple[str, str], header: str) -> bool:
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "basic":
        return False
    try:
        given = base64.b64decode(value, validate=True)
    except binascii.Error:
        return False
    return hmac.compare_digest(given, ":".join(credentials).encode())


def with_door(app: FastAPI, options: StudioOptions) -> None:
    """Put the door for these options in front of an app."""
    names: set[str] = set()
    if options.listen:
        names = {socket.gethostname(), socket.getfqdn(), options.host}
    app.add_middleware(
        Door, hosts=names, any_address=options.listen, credentials=options.credentials
    )


def result_routes(client: WorkerClient) -> APIRouter:
    """Routes that serve what jobs made.

    ``/k1/result/{job_id}`` in ranges so that a video can be sought: the path of the file comes from the store
    alone and must lie where results go or went. ``/k1/preview/{job_id}/{step}``: the client knows the place.
    """
    router = APIRouter()

    @router.api_route("/k1/result/{job_id}", methods=["GET", "HEAD"])
    def result(job_id: str, request: Request) -> Response:
        try:
            output = client.status(job_id).output
        except KeyError:
            return PlainTextResponse("No such job.", 404)
        if not output:
            return PlainTextResponse("This job has made nothing.", 404)
        path = Path(output).resolve()
        if not client.folders.holds_result(path) or path.suffix not in MEDIA_TYPES:
            return PlainTextResponse("Only files in the outputs folder are served.", 403)
        if not path.is_file():
            return PlainTextResponse("The file is no longer there.", 404)
        return FileResponse(
            path,
            media_type=MEDIA_TYPES[path.suffix],
            filename=path.name,
            content_disposition_type="attachment"
            if "download" in request.query_params
            else "inline",
            headers={"X-Content-Type-Options": "nosniff", "Cache-Control": "private, no-cache"},
        )

    @router.api_route("/k1/preview/{job_id}/{step}", methods=["GET", "HEAD"])
    def preview(job_id: str, step: int) -> Response:
        try:
            path = client.preview_path(job_id, step)
            picture = None if path is None else path.read_bytes()
        except (KeyError, OSError):  # older runs' previews go while pages still look at them
            picture = None
        if picture is None:
            return PlainTextResponse("No such preview.", 404)
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        return Response(picture, media_type="image/webp", headers=headers)

    return router

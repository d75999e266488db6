"""A studio that listens on a free port, and a real Chromium that looks at it."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CHROMIUM = "/usr/bin/chromium"
BROWSER_ARGUMENTS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
]
PATIENCE_MS = 120_000


def _load_fake_client() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "fake_client", Path(__file__).with_name("fake_client.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_client"] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Studio:
    """A running studio: its address, its client and its options."""

    url: str
    client: Any
    options: Any


@pytest.fixture(scope="session")
def fake_client() -> ModuleType:
    return _load_fake_client()


@pytest.fixture
def client(fake_client: ModuleType, tmp_path: Path) -> Iterator[Any]:
    """Stands for the worker's; its jobs wait until they are told to go on."""
    made = fake_client.FakeClient(tmp_path / "outputs", held=True)
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., Studio]]:
    """Start a studio over a client (``serve(client, options)``); all are ended with the module."""
    from kandinsky5.ui.app import studio_app
    from kandinsky5.ui.listener import bind
    from kandinsky5.ui.server import StudioServer

    running: list[tuple[Any, threading.Thread, Any]] = []

    def start(client: Any, options: Any) -> Studio:
        listener = bind("127.0.0.1", 0)
        server = StudioServer(studio_app(client, options))
        client.start()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running.append((server, thread, client))
        return Studio(f"http://127.0.0.1:{listener.getsockname()[1]}", client, options)

    yield start
    for server, thread, client in running:
        server.should_exit = True
        thread.join(20)
        client.close()


@pytest.fixture(scope="module")
def studio(
    serve: Callable[..., Studio], fake_client: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Studio:
    """A studio over the fake client."""
    from kandinsky5.ui.options import StudioOptions

    folder = tmp_path_factory.mktemp("studio")
    options = StudioOptions(out_dir=folder / "outputs", state_dir=folder / "state")
    return serve(fake_client.FakeClient(options.out_dir), options)


@pytest.fixture
def quiet_studio(studio: Studio) -> Iterator[Studio]:
    """The studio with an empty queue and no history."""
    studio.client.clear()
    yield studio
    studio.client.clear()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if not shutil.which(CHROMIUM):
        pytest.skip(f"no {CHROMIUM}: install Debian's chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER_ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a page in a context of its own (``open_page(url, **context options)``) and wait for the form."""
    contexts = []

    def opened(url: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1366, "height": 900}, **options})
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        page.requested = []
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(url)
        page.wait_for_selector("#k1-f-prompt textarea")
        return page

    yield opened
    for context in contexts:
        context.close()

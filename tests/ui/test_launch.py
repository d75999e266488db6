"""What is said before the page is there: the address once nothing can be refused, and refusals alone."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kandinsky5.errors import UserError
from kandinsky5.ui import launch as launching
from kandinsky5.ui.launch import launch
from kandinsky5.ui.listener import bind, shown_address
from kandinsky5.ui.options import StudioOptions
from kandinsky5.worker.client import WorkerClient


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        yield holder.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        return holder.getsockname()[1]


def options_in(folder: Path, port: int, **values: object) -> StudioOptions:
    return StudioOptions(port=port, out_dir=folder / "o", state_dir=folder / "s", **values)


def test_a_taken_port_names_a_free_one_and_no_address(taken_port, tmp_path) -> None:
    said: list[str] = []
    with pytest.raises(UserError, match=f"{taken_port} is in use: try --port ") as caught:
        launch(options_in(tmp_path, taken_port), announce=said.append)
    assert caught.value.exit_code == 2
    free = int(str(caught.value).rpartition(" ")[2])
    bind("127.0.0.1", free).close()
    assert said == []
    assert not (tmp_path / "s").exists()


def test_a_state_folder_in_use_is_refused_and_no_address_said(free_port, tmp_path) -> None:
    other = WorkerClient(state_dir=tmp_path / "s", out_dir=tmp_path / "o")
    said: list[str] = []
    try:
        with pytest.raises(UserError, match="another K1"):
            launch(options_in(tmp_path, free_port), announce=said.append)
    finally:
        other.close()
    assert said == []
    bind("127.0.0.1", free_port).close()


def test_the_address_said_is_one_that_can_be_connected_to(free_port, tmp_path, monkeypatch) -> None:
    said: list[str] = []

    def serve(*_: object) -> None:
        (host, port) = re.findall(r"http://([\d.]+):(\d+)", said[0])[0]
        socket.create_connection((host, int(port))).close()

    monkeypatch.setattr(launching, "_serve", serve)
    assert launch(options_in(tmp_path, free_port), announce=said.append) == 0
    assert said == [f"opening the studio at http://127.0.0.1:{free_port} (Ctrl-C ends it)"]
    bind("127.0.0.1", free_port).close()
    WorkerClient(state_dir=tmp_path / "s", out_dir=tmp_path / "o").close()


def test_an_open_studio_says_where_others_find_it(monkeypatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "workshop")
    with bind("0.0.0.0", 0) as listener:
        port = listener.getsockname()[1]
        expected = f"http://127.0.0.1:{port}, from other machines at http://workshop:{port}"
        assert shown_address(listener) == expected


def test_an_ipv6_address_is_written_as_browsers_want_it() -> None:
    try:
        listener = bind("::1", 0)
    except UserError:
        pytest.skip("no IPv6 here")
    with listener:
        assert shown_address(listener) == f"http://[::1]:{listener.getsockname()[1]}"


def test_an_address_of_another_machine_is_said() -> None:
    with pytest.raises(UserError, match="an address of this machine"):
        bind("203.0.113.7", 7860)


def test_a_studio_open_to_strangers_does_not_start() -> None:
    with pytest.raises(UserError, match="--auth"):
        launch(StudioOptions(listen=True))

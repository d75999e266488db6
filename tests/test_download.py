"""Fetching from the hub, tested against a stand-in that speaks its HTTP."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest

from kandinsky5 import download as module
from kandinsky5.download import download
from kandinsky5.errors import CheckpointError, UserError
from kandinsky5.model import files as model_files
from kandinsky5.model.files import QWEN_REPOSITORY
from kandinsky5.presets import PRESETS

PRESET = PRESETS["lite-t2v-5s-sft"]
COMMIT = "0" * 39 + "1"
VAE, CLIP = "hunyuanvideo-community/HunyuanVideo", "openai/clip-vit-large-patch14"
SHELVES = {
    PRESET.repository: {f"model/{PRESET.weights_file}": b"weights" * 1000, "README.md": b"words"},
    VAE: {
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": b"vae",
        "transformer/diffusion_pytorch_model.safetensors": b"not wanted",
    },
    QWEN_REPOSITORY: {
        "config.json": b"{}",
        "model-00001-of-00001.safetensors": b"qwen",
        "model.safetensors.index.json": b"{}",
        "tokenizer.json": b"{}",
        "vocab.json": b"{}",
        "merges.txt": b"",
    },
    CLIP: {
        "config.json": b"{}",
        "model.safetensors": b"clip",
        "pytorch_model.bin": b"a pickle",
        "flax_model.msgpack": b"another",
        "tokenizer.json": b"{}",
        "vocab.json": b"{}",
    },
}


class Hub(ThreadingHTTPServer):
    """As much of the hub as a download needs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Shelf)
        self.served: list[tuple[str, str | None]] = []
        self.cut_after: int | None = None
        self.gated: set[str] = set()


class Shelf(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, *, body: bool = True) -> None:
        path = urlparse(self.path).path.strip("/")
        if path.startswith("api/models/"):
            self._describe("/".join(path.split("/")[2:4]))
            return
        owner, name, _, _, *inner = path.split("/")
        repository, file = f"{owner}/{name}", "/".join(inner)
        if repository in self.server.gated:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
            return
        data = SHELVES[repository][file]
        etag = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if not body:
            self._answer(200, data, headers, body=False)
            return
        asked = self.headers.get("Range")
        self.server.served.append((file, asked))
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._answer(206 if asked else 200, data[start:], headers)

    def _describe(self, repository: str) -> None:
        files = SHELVES[repository]
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        document = {"id": repository, "sha": COMMIT, "siblings": siblings}
        self._answer(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _answer(
        self, status: int, data: bytes, headers: dict[str, str], *, body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        cut = self.server.cut_after
        self.wfile.write(data if cut is None else data[:cut])
        if cut is not None and len(data) > cut:
            self.close_connection = True


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants as constants
    import huggingface_hub.file_download as file_download
    from huggingface_hub import HfApi

    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    cache = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    for place in (constants, file_download.constants):
        monkeypatch.setattr(place, "ENDPOINT", address)
        monkeypatch.setattr(place, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            place,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=address))
    monkeypatch.setattr(model_files, "LITE_CHECKPOINTS", tmp_path / "none")
    yield server
    server.shutdown()
    server.server_close()


def fetched(hub: Hub) -> set[str]:
    return {name for name, _ in hub.served}


def test_a_dry_run_lists_files_and_sizes_and_fetches_nothing(hub: Hub) -> None:
    lines: list[str] = []
    document = download(PRESET.name, dry_run=True, tell=lines.append)
    paths = {(file["repository"], file["path"]) for file in document["files"]}
    assert (PRESET.repository, f"model/{PRESET.weights_file}") in paths
    assert (VAE, "transformer/diffusion_pytorch_model.safetensors") not in paths
    assert not [path for _, path in paths if path.endswith((".bin", ".msgpack"))]
    assert document["to_fetch_bytes"] == sum(file["size_bytes"] for file in document["files"])
    assert hub.served == []
    assert len(lines) == len(paths)


def test_what_was_fetched_is_found_and_not_fetched_again(hub: Hub) -> None:
    download(PRESET.name, tell=lambda line: None)
    assert f"model/{PRESET.weights_file}" in fetched(hub)
    parts = model_files.parts_at_hand(PRESET)
    assert set(parts) == {
        "transformer",
        "vae",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
    }
    assert (
        parts["transformer"].read_bytes()
        == SHELVES[PRESET.repository][f"model/{PRESET.weights_file}"]
    )
    hub.served.clear()
    assert download(PRESET.name, tell=lambda line: None)["fetched"] == 0
    assert hub.served == []


def test_a_download_that_was_cut_off_goes_on(hub: Hub) -> None:
    hub.cut_after = 3000
    with pytest.raises(CheckpointError, match="goes on where this stopped"):
        download(PRESET.name, tell=lambda line: None)
    hub.cut_after = None
    hub.served.clear()
    download(PRESET.name, tell=lambda line: None)
    weights = model_files.parts_at_hand(PRESET)["transformer"]
    assert weights.read_bytes() == SHELVES[PRESET.repository][f"model/{PRESET.weights_file}"]


def test_parts_that_lie_elsewhere_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / PRESET.weights_file).write_bytes(b"mine")
    download(PRESET.name, models_dirs=[folder], tell=lambda line: None)
    assert f"model/{PRESET.weights_file}" not in fetched(hub)


def test_a_gated_repository_says_what_to_do(hub: Hub) -> None:
    hub.gated.add(VAE)
    with pytest.raises(CheckpointError, match="hf auth login"):
        download(PRESET.name, tell=lambda line: None)


def test_too_little_room_is_said_before_anything_is_fetched(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=module.ROOM_LEFT_BYTES + 10)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="HF_HOME"):
        download(PRESET.name, tell=lambda line: None)
    assert hub.served == []


def test_offline_it_says_what_is_missing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        download(PRESET.name, tell=lambda line: None)


@pytest.mark.parametrize(("name", "says"), [("demo-t2v", "built in"), ("pro", "lite-t2v-5s-sft")])
def test_only_published_presets_can_be_fetched(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        download(name, tell=lambda line: None)


def test_a_hub_that_cannot_be_reached_is_one_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(CheckpointError) as caught:
        download(PRESET.name, tell=lambda line: None)
    assert "\n" not in str(caught.value)

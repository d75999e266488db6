"""Fetching from the hub, tested against a stand-in that speaks its HTTP."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest

from kandinsky5 import download as module
from kandinsky5 import hub as hub_module
from kandinsky5.cli import main
from kandinsky5.download import download
from kandinsky5.errors import CheckpointError, UserError
from kandinsky5.hub import BEGUN_SUFFIX
from kandinsky5.model import files as model_files
from kandinsky5.model.parts import QWEN_REPOSITORY
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest

K1 = Path(__file__).resolve().parents[1] / "k1.py"
PRESET = PRESETS["lite-t2v-5s-sft"]
COMMIT = "0" * 39 + "1"
VAE, CLIP = "hunyuanvideo-community/HunyuanVideo", "openai/clip-vit-large-patch14"
WEIGHTS = b"weights" * 1000
HALF = 3000
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
SHELVES = {
    PRESET.repository: {f"model/{PRESET.weights_file}": WEIGHTS, "README.md": b"words"},
    VAE: {
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": b"vae",
        "transformer/diffusion_pytorch_model.safetensors": b"not wanted",
    },
    QWEN_REPOSITORY: {
        "config.json": b"{}",
        SHARDS[0]: b"qwen, the first half",
        SHARDS[1]: b"qwen, the second half",
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
        ).encode(),
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
        self.left_bytes: int | None = None
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
        data = data[start:]
        headers["Content-Length"] = str(len(data))
        if (left := self.server.left_bytes) is not None:
            self.close_connection = len(data) > left
            data = data[:left]
            self.server.left_bytes = left - len(data)
        self._answer(206 if asked else 200, data, headers)

    def _describe(self, repository: str) -> None:
        files = SHELVES[repository]
        siblings = []
        for name, data in files.items():
            sibling = {"rfilename": name, "size": len(data)}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(data).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(sibling)
        document = {"id": repository, "sha": COMMIT, "siblings": siblings}
        self._answer(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _answer(
        self, status: int, data: bytes, headers: dict[str, str], *, body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        self.wfile.write(data)


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
    monkeypatch.setattr(file_download.constants, "DOWNLOAD_CHUNK_SIZE", 100)
    monkeypatch.setattr(hub_module, "LARGE_BYTES", len(WEIGHTS))
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


def test_a_download_that_was_cut_off_goes_on(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.left_bytes = HALF
    with pytest.raises(CheckpointError, match="goes on where this stopped"):
        download(PRESET.name, tell=lambda line: None)
    hub.left_bytes = None
    hub.served.clear()
    dry = download(PRESET.name, dry_run=True, tell=lambda line: None)
    others = sum(file["size_bytes"] for file in dry["files"]) - len(WEIGHTS)
    assert dry["to_fetch_bytes"] == others + len(WEIGHTS) - HALF
    free = shutil.disk_usage("/")._replace(free=module.ROOM_LEFT_BYTES + dry["to_fetch_bytes"])
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: free)
    download(PRESET.name, tell=lambda line: None)
    name = f"model/{PRESET.weights_file}"
    assert [asked for file, asked in hub.served if file == name] == [f"bytes={HALF}-"]
    weights = model_files.parts_at_hand(PRESET)["transformer"]
    assert weights.read_bytes() == WEIGHTS
    assert not list(weights.resolve().parent.glob("*.incomplete"))


def test_what_was_begun_and_is_another_size_is_fetched_anew(hub: Hub) -> None:
    part = snapshot(PRESET.repository).parents[1] / "blobs"
    part.mkdir(parents=True)
    (part / (hashlib.sha256(WEIGHTS).hexdigest() + BEGUN_SUFFIX)).write_bytes(WEIGHTS * 2)
    download(PRESET.name, tell=lambda line: None)
    assert model_files.parts_at_hand(PRESET)["transformer"].read_bytes() == WEIGHTS


def test_two_downloads_at_once_do_not_write_into_one_file(hub: Hub) -> None:
    part = snapshot(PRESET.repository).parents[1] / "blobs"
    part.mkdir(parents=True)
    name = hashlib.sha256(WEIGHTS).hexdigest() + BEGUN_SUFFIX
    with (part / name).open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another program"):
            download(PRESET.name, tell=lambda line: None)
    assert (part / name).stat().st_size == 0


def snapshot(repository: str) -> Path:
    """The folder in which the library keeps what was fetched."""
    cached = model_files.hub_cache() / f"models--{repository.replace('/', '--')}"
    return cached / "snapshots" / COMMIT


def refusal(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> str:
    """The one line of ``generate`` where the preset's files are not all there."""
    words = ["generate", "--preset", PRESET.name, "--prompt", "x"]
    capfd.readouterr()
    assert main([*words, "--state-dir", str(tmp_path / "state")]) == CheckpointError.exit_code
    (line,) = capfd.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("repository", "lost"),
    [
        (QWEN_REPOSITORY, SHARDS[1]),
        (QWEN_REPOSITORY, "model.safetensors.index.json"),
        (VAE, "vae/config.json"),
        (PRESET.repository, f"model/{PRESET.weights_file}"),
    ],
    ids=["half the shards", "no index", "no configuration", "no transformer"],
)
def test_files_that_are_half_there_are_said_and_the_rest_is_fetched(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str], repository: str, lost: str
) -> None:
    download(PRESET.name, tell=lambda line: None)
    link = snapshot(repository) / lost
    link.resolve().rename(link.resolve().with_suffix(".incomplete"))
    link.unlink()
    said = refusal(capfd, tmp_path)
    assert f"python k1.py download {PRESET.name}" in said
    assert str(link) in said or "the transformer is missing" in said
    hub.served.clear()
    download(PRESET.name, tell=lambda line: None)
    assert fetched(hub) == {lost}
    assert len(model_files.parts_at_hand(PRESET)) == 6


def test_a_download_that_only_began_names_the_command(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.left_bytes = HALF
    with pytest.raises(CheckpointError):
        download(PRESET.name, tell=lambda line: None)
    blobs = snapshot(PRESET.repository).parents[1] / "blobs"
    assert [path.stat().st_size for path in blobs.glob("*.incomplete")] == [HALF]
    said = refusal(capfd, tmp_path)
    assert "the transformer is missing" in said
    assert f"python k1.py download {PRESET.name}" in said


def test_when_all_is_there_no_hub_is_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    download(PRESET.name, tell=lambda line: None)
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(PRESET.name, tell=lambda line: None)["fetched"] == 0
    assert model_files.locate_model(
        GenerationRequest(preset=PRESET.name, prompt="x")
    ).transformer.is_file()


def test_the_program_goes_by_the_hubs_own_variables(hub: Hub, tmp_path: Path) -> None:
    """``HF_ENDPOINT`` and ``HF_HOME``, read by the library as a process starts."""
    (tmp_path / "home").mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, str(K1), "download", PRESET.name, "--json"]
    command += ["--state-dir", str(tmp_path / "state")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["folder"] == str(tmp_path / "home" / "hub")
    assert document["fetched"] == len(document["files"]) > 0
    assert f"model/{PRESET.weights_file}" in fetched(hub)


def test_a_transformer_under_another_name_than_expected_is_fetched_and_found(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHELVES, PRESET.repository, {"model/renamed.safetensors": WEIGHTS})
    download(PRESET.name, tell=lambda line: None)
    assert fetched(hub) >= {"model/renamed.safetensors"}
    found = model_files.locate_model(GenerationRequest(preset=PRESET.name, prompt="x"))
    assert found.transformer.name == "renamed.safetensors"


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


def test_on_a_full_disk_nothing_missing_is_no_fault(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    download(PRESET.name, tell=lambda line: None)
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    assert download(PRESET.name, tell=lambda line: None)["fetched"] == 0

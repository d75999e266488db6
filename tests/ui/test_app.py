from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from kandinsky5.ui.listener import bind
from kandinsky5.ui.options import StudioOptions

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'ui'}"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_pages_process_imports_no_torch_and_writes_no_source(tmp_path):
    code = (
        "import sys, pathlib; from kandinsky5.ui.app import studio_app;"
        "from kandinsky5.ui.options import StudioOptions; from fake_client import FakeClient;"
        "here = pathlib.Path(sys.argv[1]);"
        "import kandinsky5.worker.client;"
        "studio_app(FakeClient(here), StudioOptions(out_dir=here, state_dir=here));"
        "print({'torch', 'transformers', 'diffusers'} & set(sys.modules))"
    )
    process = run_python(code, str(tmp_path))
    output, errors = process.communicate(timeout=300)
    assert output.strip() == "set()", errors
    assert not list((ROOT / "kandinsky5" / "ui").glob("*.pyi")), "gradio wrote into the sources"


SERVED = """
import pathlib, sys
import kandinsky5.worker.client as client
from fake_client import FakeClient
from kandinsky5.ui.launch import launch
from kandinsky5.ui.options import StudioOptions

class Told(FakeClient):
    def __init__(self, *, out_dir, **_):
        super().__init__(out_dir, held=True)
    def start(self):
        super().start()
        print("started", flush=True)
    def close(self, timeout_s=8.0):
        super().close(timeout_s)
        print("closed", flush=True)

client.WorkerClient = Told
here = pathlib.Path(sys.argv[2])
sys.exit(launch(StudioOptions(port=int(sys.argv[1]), out_dir=here, state_dir=here)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_studio_in_order_even_with_a_page_open(number, tmp_path):
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    process = run_python(SERVED, str(port), str(tmp_path))
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "started\n", process.communicate()[1]
        address = f"http://127.0.0.1:{port}"
        with httpx.Client(transport=httpx.HTTPTransport(retries=10), timeout=300) as visitor:
            assert visitor.get(address).status_code == 200
            session = {"session_hash": "abc"}
            with visitor.stream(
                "GET", f"{address}/gradio_api/heartbeat/abc", params=session
            ) as open_page:
                assert open_page.status_code == 200
                process.send_signal(number)
                output, errors = process.communicate(timeout=300)
        assert output == "closed\n"
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
    finally:
        process.kill()


def test_the_studio_serves_no_file_of_the_machine(studio, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with httpx.Client(base_url=studio.url, timeout=300) as visitor:
        for path in (secret, "/etc/passwd", ROOT / "README.md", f"{studio.options.state_dir}/x"):
            assert visitor.get(f"/gradio_api/file={path}").status_code == 403
        # nor is one copied to where it would be served, or read: a path in a call must be of an upload
        for kind in ("image", "file"):
            function = function_of(visitor, kind)
            data = [None] * function["length"]
            data[function["place"]] = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
            call = {"data": data, "fn_index": function["id"], "session_hash": "abc"}
            assert visitor.post("/gradio_api/run/predict", json=call).status_code != 200
    copies = [path for path in studio.options.uploads_dir.rglob("*") if path.is_file()]
    assert not [path for path in copies if path.read_bytes() == b"secret"]


def test_a_file_over_the_limit_is_refused_as_it_comes_in(serve, fake_client, tmp_path):
    """A picture of a gigabyte in the same way as one of a hundred kilobytes where fewer are allowed."""
    assert StudioOptions().upload_bytes == 64_000_000
    options = StudioOptions(
        out_dir=tmp_path / "outputs", state_dir=tmp_path / "state", upload_bytes=100_000
    )
    small = serve(fake_client.FakeClient(options.out_dir), options)
    with httpx.Client(base_url=small.url, timeout=300) as visitor:

        def sent(size_bytes: int) -> httpx.Response:
            files = {"files": ("picture.png", b"x" * size_bytes, "image/png")}
            return visitor.post("/gradio_api/upload", files=files)

        assert sent(90_000).status_code == 200
        refused = sent(110_000)
    assert refused.status_code == 413
    kept = [path for path in options.uploads_dir.rglob("*") if path.is_file()]
    assert [path.stat().st_size for path in kept] == [90_000]


def function_of(visitor: httpx.Client, kind: str) -> dict[str, int]:
    """Number of a function of the page that takes a control of a kind, and its place among the inputs."""
    config = visitor.get("/config").json()
    control = next(part["id"] for part in config["components"] if part["type"] == kind)
    function = next(part for part in config["dependencies"] if control in part["inputs"])
    return {
        "id": function["id"],
        "length": len(function["inputs"]),
        "place": function["inputs"].index(control),
    }


def test_programs_reach_the_promised_names(quiet_studio):
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(quiet_studio.url, verbose=False)
    job_id = client.predict({"prompt": "by a program", "seed": 5}, api_name="/submit")
    quiet_studio.client.wait(lambda: quiet_studio.client.status(job_id).state == "done")
    status = client.predict(job_id, api_name="/status")
    assert (status["state"], status["request"]["seed"]) == ("done", 5)
    assert Path(status["output"]).is_file()
    assert client.predict(api_name="/queue") == []
    assert client.predict(job_id, "discard", api_name="/stop") == "done"
    with pytest.raises(gradio_client.exceptions.AppError, match="prompt"):
        client.predict({"prompt": ""}, api_name="/submit")


def test_the_queue_of_gradio_does_not_keep_a_core_awake(fake_client, tmp_path):
    from kandinsky5.ui.app import QUEUE_SLEEP_S, build
    from kandinsky5.ui.settings import StudioSettings
    from kandinsky5.ui.user_presets import UserPresets

    settings = StudioSettings(StudioOptions(state_dir=tmp_path))
    page = build(fake_client.FakeClient(tmp_path), settings, UserPresets(tmp_path))
    assert page._queue.sleep_when_free == QUEUE_SLEEP_S >= 0.01


def test_only_the_promised_names_are_public(studio):
    with httpx.Client(base_url=studio.url, timeout=300) as visitor:
        named = visitor.get("/gradio_api/info").json()["named_endpoints"]
    promised = {"/submit", "/expand", "/status", "/stop", "/resume", "/discard", "/queue"}
    promised |= {"/pause", "/move", "/replace", "/duplicate", "/delete", "/history"}
    assert set(named) == promised

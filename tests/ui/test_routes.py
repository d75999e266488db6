from __future__ import annotations

import base64
import dataclasses

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kandinsky5.ui.options import StudioOptions
from kandinsky5.ui.routes import result_routes, with_door

HERE = "http://127.0.0.1:7860"


def visitor(options: StudioOptions | None = None, address: str = HERE) -> TestClient:
    """A client before a door with one route behind it that reads and changes."""
    app = FastAPI()
    with_door(app, options or StudioOptions())
    app.add_api_route("/act", lambda: "done", methods=["GET", "POST"])
    return TestClient(app, base_url=address)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:7860", "localhost:7860", "localhost", "[::1]:7860", "LOCALHOST:7860"]
)
def test_this_machines_names_come_in(host):
    assert visitor().get("/act", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:7860", "localhost.evil.example", "192.168.0.9:7860", "", "[::1"],
)
def test_a_rebound_name_is_refused(host):
    answer = visitor().get("/act", headers={"Host": host})
    assert answer.status_code == 400
    assert "\n" not in answer.text


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:7860", "http://["],
)
def test_another_sites_page_cannot_act(origin):
    assert visitor().post("/act", headers={"Origin": origin}).status_code == 403


def test_the_studios_own_page_and_programs_can_act():
    assert visitor().post("/act", headers={"Origin": HERE}).status_code == 200
    assert visitor().post("/act").status_code == 200


def test_a_form_of_another_site_without_origin_is_refused():
    answer = visitor().post("/act", headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 403


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=http://evil.example/x",
        "/gradio_api/file=http://evil.example/x",
        "/gradio_api/file=HTTPS://evil.example/x",
        "/gradio_api/file%3dhttp://evil.example",
        "/monitoring/summary",
    ],
)
def test_nothing_is_fetched_from_elsewhere_on_behalf_of_a_visitor(path):
    assert visitor().get(path).status_code == 403


def test_who_listens_asks_everyone_for_the_password():
    options = StudioOptions(listen=True, auth="eva:pässword")
    outside = visitor(options, "http://192.168.0.9:7860")

    def basic(text: str) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}

    asked = outside.get("/act")
    assert asked.status_code == 401
    assert asked.headers["WWW-Authenticate"].startswith("Basic")
    for wrong in ({}, basic("eva:other"), basic("eva"), {"Authorization": "Basic ???"}):
        assert outside.get("/act", headers=wrong).status_code == 401
    assert outside.get("/act", headers=basic("eva:pässword")).status_code == 200
    rebound = {"Host": "evil.example", **basic("eva:pässword")}
    assert outside.get("/act", headers=rebound).status_code == 400


@pytest.fixture
def results(fake_client, tmp_path):
    """(client of the routes, function that makes a finished job with this output)."""
    client = fake_client.FakeClient(tmp_path / "outputs")
    (tmp_path / "outputs").mkdir()
    app = FastAPI()
    app.include_router(result_routes(client))

    def finished(output: str | None) -> str:
        job = fake_client.JobSnapshot("j1", "done", {"prompt": "x"}, output=output)
        client._jobs["j1"] = dataclasses.replace(job)
        return "/k1/result/j1"

    return TestClient(app), finished


def test_a_result_is_served_in_ranges_so_that_it_can_be_sought(results, tmp_path):
    visitor, finished = results
    file = tmp_path / "outputs" / "clip.mp4"
    file.write_bytes(bytes(range(100)))
    path = finished(str(file))
    whole = visitor.get(path)
    assert (whole.status_code, whole.headers["content-type"]) == (200, "video/mp4")
    assert whole.headers["accept-ranges"] == "bytes"
    part = visitor.get(path, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, bytes(range(10, 20)))
    assert visitor.get(f"{path}?download").headers["content-disposition"].startswith("attachment")


@pytest.mark.parametrize("name", ["../secret.mp4", "../outputs2/x.mp4", "link.mp4", "notes.txt"])
def test_no_file_outside_the_outputs_is_served(results, tmp_path, name):
    visitor, finished = results
    for folder in (tmp_path, tmp_path / "outputs2"):
        folder.mkdir(exist_ok=True)
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (tmp_path / "outputs2" / "x.mp4").write_bytes(b"secret")
    (tmp_path / "outputs" / "notes.txt").write_bytes(b"secret")
    (tmp_path / "outputs" / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    answer = visitor.get(finished(str(tmp_path / "outputs" / name)))
    assert answer.status_code == 403
    assert b"secret" not in answer.content


def test_missing_jobs_results_and_files_are_not_found(results, tmp_path):
    visitor, finished = results
    assert visitor.get("/k1/result/nobody").status_code == 404
    assert visitor.get("/k1/result/..%2f..%2fetc%2fpasswd").status_code == 404
    assert visitor.get(finished(None)).status_code == 404
    assert visitor.get(finished(str(tmp_path / "outputs" / "gone.mp4"))).status_code == 404

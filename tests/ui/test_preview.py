"""The live preview and the ways on of a job that was cut short: fragments, handlers and routes."""

from __future__ import annotations

import io
from types import SimpleNamespace

import gradio as gr
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from kandinsky5.request import GenerationRequest
from kandinsky5.ui.handlers import Handlers
from kandinsky5.ui.options import StudioOptions
from kandinsky5.ui.preview_views import preview_data
from kandinsky5.ui.routes import result_routes, with_door
from kandinsky5.worker.client import JobSnapshot


def job(**values) -> JobSnapshot:
    return JobSnapshot(**{"id": "a", "state": "running", "request": {"prompt": "x"}, **values})


@pytest.fixture
def handlers(client, tmp_path):
    return Handlers(client)


@pytest.fixture
def at_step_2(client):
    """A job of five steps that stands after its second."""
    job_id = client.submit(GenerationRequest(prompt="a red circle"))
    client.allow(2)
    client.wait(lambda: client.status(job_id).step == 2)
    return job_id


def stopped_with_a_state(client, handlers, job_id) -> None:
    handlers.stop_watched(job_id)
    client.wait(lambda: client.status(job_id).state == "stopped")


def pressed(act: str, job_id: str) -> SimpleNamespace:
    return SimpleNamespace(_data={"act": act, "job": job_id})


def browser_of(client, tmp_path) -> TestClient:
    app = FastAPI()
    app.include_router(result_routes(client))
    with_door(app, StudioOptions())
    return TestClient(app, base_url="http://127.0.0.1:7860")


def test_nothing_is_shown_before_the_first_preview_and_after_the_result():
    assert preview_data(None, beside_result=False) == ""
    assert preview_data(job(), beside_result=False) == ""
    assert preview_data(job(state="done", previews=(1, 2)), beside_result=False) == ""


def test_the_data_changes_with_the_step_and_not_with_the_clock():
    first = preview_data(job(step=2, eta_s=9.0, previews=(1, 2), total=5), beside_result=False)
    later = preview_data(job(step=2, eta_s=4.0, previews=(1, 2), total=5), beside_result=False)
    assert first == later and 'data-steps="1 2"' in first
    assert first != preview_data(job(step=3, previews=(1, 2, 3), total=5), beside_result=False)


def test_what_people_typed_is_text_in_the_data_too():
    hostile = job(previews=(1,), request={"prompt": '"><script>${x}'})
    assert "<script>" not in preview_data(hostile, beside_result=False)
    assert "${" not in preview_data(hostile, beside_result=False)


def test_a_page_is_told_of_a_running_job_s_previews(handlers, at_step_2):
    *_, preview, _ = handlers.refresh(at_step_2, None, {})
    assert 'data-steps="1 2"' in preview and 'data-live="yes"' in preview


def test_a_result_chosen_to_be_looked_at_stays_beside_the_preview(handlers, client, at_step_2):
    *_, preview, _ = handlers.refresh(at_step_2, at_step_2, {})
    assert 'data-beside="yes"' in preview


def test_a_stopped_job_keeps_its_last_picture_and_can_go_on(handlers, client, at_step_2):
    stopped_with_a_state(client, handlers, at_step_2)
    progress, *_, preview, _ = handlers.refresh(None, None, {})
    assert "Resume from step 2" in progress and f'data-drop="{at_step_2}"' in progress
    assert 'data-steps="1 2"' in preview and 'data-live=""' in preview
    watched, problem = handlers.progress_pressed(pressed("resume", at_step_2))
    assert (watched, problem) == (at_step_2, "")
    client.release()
    client.wait(lambda: client.status(at_step_2).state == "done")


def test_a_job_cut_short_is_offered_while_another_one_runs(handlers, client, at_step_2):
    stopped_with_a_state(client, handlers, at_step_2)
    client.hold()
    other = client.submit(GenerationRequest(prompt="another"))
    client.wait(lambda: client.status(other).state == "running")
    progress, *_ = handlers.refresh(None, None, {})
    assert f'data-job="{other}"' in progress
    assert f'data-resume="{at_step_2}"' in progress and "2/5" in progress


def test_what_was_saved_can_be_dropped(handlers, client, at_step_2):
    stopped_with_a_state(client, handlers, at_step_2)
    handlers.progress_pressed(pressed("drop", at_step_2))
    progress, *_ = handlers.refresh(None, None, {})
    assert "data-resume" not in progress
    _, problem = handlers.progress_pressed(pressed("resume", at_step_2))
    assert "no saved state" in problem


def test_a_button_of_a_job_that_is_gone_says_so(handlers):
    for act in ("resume", "drop"):
        _, problem = handlers.progress_pressed(pressed(act, "nobody"))
        assert "no longer there" in problem
    assert handlers.progress_pressed(pressed("stop", "nobody"))[1] == ""


def test_stopping_to_discard_leaves_nothing_to_resume(handlers, client, at_step_2):
    handlers.stop_watched(at_step_2, "discard")
    client.wait(lambda: client.status(at_step_2).state == "stopped")
    assert not client.status(at_step_2).is_resumable


def test_programs_save_resume_and_discard(handlers, client, at_step_2):
    handlers.stop(at_step_2, "save")
    client.wait(lambda: client.status(at_step_2).state == "stopped")
    state = handlers.status(at_step_2)
    assert (state["resumable"], state["saved_step"], state["previews"]) == (True, 2, [1, 2])
    assert handlers.resume(at_step_2) == "stopped"
    with pytest.raises(gr.Error, match="no saved state"):
        handlers.resume(at_step_2)
    with pytest.raises(gr.Error, match="no such job"):
        handlers.discard("nobody")


def test_a_preview_is_served_and_kept_by_no_cache(client, at_step_2, tmp_path):
    answer = browser_of(client, tmp_path).get(f"/k1/preview/{at_step_2}/2")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    with Image.open(io.BytesIO(answer.content)) as picture:
        assert picture.format == "WEBP" and picture.n_frames > 1


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("{job}/3", 404),
        ("{job}/0", 404),
        ("{job}/-1", 404),
        ("nobody/1", 404),
        ("{job}/x", 422),
        ("..%2f..%2fetc/1", 404),
        ("{job}/1/../../../etc/passwd", 404),
    ],
)
def test_no_other_file_is_served(client, at_step_2, tmp_path, path, status):
    answer = browser_of(client, tmp_path).get(f"/k1/preview/{path.format(job=at_step_2)}")
    assert answer.status_code == status


def test_another_site_cannot_look_at_previews(client, at_step_2, tmp_path):
    headers = {"Sec-Fetch-Site": "cross-site"}
    answer = browser_of(client, tmp_path).get(f"/k1/preview/{at_step_2}/1", headers=headers)
    assert answer.status_code == 403


def test_a_preview_that_was_removed_meanwhile_is_not_found(client, at_step_2, tmp_path):
    client.preview_path(at_step_2, 1).unlink()
    assert browser_of(client, tmp_path).get(f"/k1/preview/{at_step_2}/1").status_code == 404

from __future__ import annotations

import pytest

from kandinsky5.ui import views

HOSTILE = "<script>alert(1)</script> ${1+1} {{7}} `x` \"' 🎨"


@pytest.fixture
def job(fake_client):
    def make(state: str = "running", **changes):
        values = {"id": "j1", "state": state, "request": {"prompt": HOSTILE, "preset": "demo-t2v"}}
        return fake_client.JobSnapshot(**{**values, **changes})

    return make


def test_texts_of_people_are_inert_everywhere(job):
    done = job("done", output="/o/x.mp4", result={"frames": 25}, notices=(HOSTILE,))
    failed = job("failed", message=HOSTILE)
    pages = [
        views.progress(failed, (job("queued", id="j2", place=1),)),
        views.player(done),
        views.gallery([done], "j1"),
        views.problem("prompt", HOSTILE),
    ]
    for page in pages:
        assert "alert(1)" in page
        assert "🎨" in page
        for dangerous in ("<script", "${", "{{", "`x"):
            assert dangerous not in page


def test_a_running_job_tells_stage_step_speed_and_time_left(job):
    page = views.progress(
        job(stage="denoise", step=7, total=20, seconds_per_step=0.41, eta_s=75.0), ()
    )
    assert "Painting" in page
    assert "step 7 of 20 · 0.4 s a step · about 1 min 15 s left" in page
    assert 'aria-valuenow="35"' in page
    assert 'data-title="35 % · 1 min 15 s left · K1"' in page
    assert 'data-active="yes"' in page


def test_a_waiting_job_tells_its_place(job):
    page = views.progress(job("queued", place=2), ())
    assert "In the queue" in page
    assert "2 ahead of it" in page


@pytest.mark.parametrize("state", ["done", "failed", "stopped", "interrupted"])
def test_a_job_that_is_over_is_not_active(job, state):
    assert "data-active" not in views.progress(job(state), ())


def test_other_jobs_can_be_stopped_one_by_one(job):
    page = views.progress(job(), (job(), job("queued", id="j2", place=1)))
    assert page.count("data-stop") == 1
    assert 'data-stop="j2"' in page


def test_a_picture_is_shown_as_a_picture(job):
    assert "<img" in views.player(job("done", output="/o/x.png", result={"frames": 1}))
    assert "<video" in views.player(job("done", output="/o/x.mp4", result={"frames": 25}))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (3725, "1 h 02 min")],
)
def test_durations_read_at_a_glance(seconds, text):
    assert views.duration_text(seconds) == text

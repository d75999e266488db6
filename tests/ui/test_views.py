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


def test_what_streaming_costs_is_told_where_it_costs(job):
    step = {"stage": "denoise", "step": 7, "total": 20, "seconds_per_step": 54.0}
    page = views.progress(job(**step, h2d_bytes=8_600_000_000, stall_s=3.2), ())
    assert "8.6 GB moved a step · 3.2 s of it waiting" in page
    assert "moved" not in views.progress(job(**step), ())
    assert "waiting" not in views.progress(job(**step, h2d_bytes=9, stall_s=0.01), ())


def test_a_prompt_is_seen_as_it_is_rewritten_and_kept_with_the_result(job):
    page = views.progress(job(stage="expand", expanded_prompt="word " * 60 + HOSTILE), ())
    assert "Expanding the prompt" in page
    assert "word word &lt;script&gt;" in page
    assert page.count("word ") < 60
    page = views.player(job("done", output="/o/x.mp4", result={"expanded_prompt": HOSTILE}))
    assert "as it was expanded</summary><p>&lt;script&gt;" in page
    assert "expanded" not in views.player(job("done", output="/o/x.mp4", result={}))


def test_a_stop_that_was_heard_is_told_before_the_step_ends(job):
    page = views.progress(job(stage="denoise", step=7, total=20, is_stopping=True), ())
    assert "Stopping" in page
    assert "data-active" not in page


def test_a_result_tells_peaks_bytes_moved_and_evaluations_spared(job):
    made = {
        "peak_vram_bytes": 11_400_000_000,
        "h2d_bytes": 431_000_000_000,
        "evaluations_run": 60,
        "evaluations_skipped": 40,
        "seconds": {"denoise": 200.0, "decode": 5.0, "total": 205.0},
        "stage_peaks": {"denoise": {"vram_bytes": 11_400_000_000, "rss_bytes": 5}},
    }
    page = views.player(job("done", output="/o/x.mp4", result=made, started_at=1, finished_at=101))
    for fact in (
        "11.4 GB",
        "431.0 GB",
        "40 of 100 evaluations",
        "3 min 25 s",
        "Decoding frames</th><td>5.0 s</td><td></td>",
    ):
        assert fact in page
    assert "moved" not in views.player(job("done", output="/o/x.mp4", result={"h2d_bytes": 0}))


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


def test_an_early_result_tells_where_it_was_stopped_and_can_go_on(job):
    early = job("done", output="/o/a.mp4", total=5, saved_state="/s", saved_step=2)
    card = views.progress(early, ())
    assert "at step 2 of 5; what was there by then was decoded" in card
    assert "Resume from step 2" in card
    assert "/k1/result/" in views.player(early) and "?step=2" in views.player(early)

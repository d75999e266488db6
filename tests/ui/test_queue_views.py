"""Queue and history as fragments of the page."""

from __future__ import annotations

import pytest

from kandinsky5.ui import history_views, queue_views
from kandinsky5.ui.history_views import PAGE_LENGTH, page_start

HOSTILE = "<script>alert(1)</script> ${1+1} {{7}} `x` \"' 🎨"


@pytest.fixture
def job(fake_client):
    def make(state: str = "queued", **changes):
        request = {"prompt": HOSTILE, "preset": "demo-t2v", "seed": 3, "steps": 20}
        values = {"id": "j1", "state": state, "request": request, "place": 1}
        return fake_client.JobSnapshot(**{**values, **changes})

    return make


def past(*jobs) -> str:
    return history_views.history(jobs, offset=0, total=len(jobs))


def test_texts_of_people_are_inert_everywhere(job):
    done = job("done", output="/o/<b>.mp4", outputs=("/o/`${2}.mp4",))
    pages = [
        queue_views.running([job("running")]),
        queue_views.waiting([job()]),
        queue_views.editing_line(job()),
        past(done, job("failed", message=HOSTILE)),
    ]
    for page in pages:
        for dangerous in ("<script", "${", "{{", "`x", "<b>."):
            assert dangerous not in page
    assert pages[3].count("alert(1)") >= 3


def test_what_waits_says_what_it_was_asked_for_and_what_can_be_done(job):
    page = queue_views.waiting([job(), job(id="j2", place=2, seed_drawn=True)])
    assert "Built-in demo · text → video · 64 × 64 · 1 s · 20 steps · seed 3</p>" in page
    assert "seed 3, drawn</p>" in page
    for act in ("up", "down", "edit", "duplicate", "cancel"):
        assert page.count(f'data-act="{act}"') == 2
    assert page.count(" disabled>↑") == page.count(" disabled>↓") == 1


def test_a_job_that_goes_on_from_a_saved_step_says_so_and_is_not_edited(job):
    page = queue_views.waiting([job(resume_from="/s", saved_step=7, total=20)])
    assert "goes on from step 7 of 20" in page
    assert 'data-act="edit"' not in page
    assert 'data-act="cancel"' in page


def test_a_prompt_that_is_rewritten_can_only_be_cancelled(job):
    page = queue_views.waiting([job(kind="expand"), job(id="j2", place=2)])
    first, second = page.split("<li ")[1:]
    assert first.count("data-act=") == 1
    assert 'data-act="cancel"' in first
    assert second.count("disabled") == 2  # it is the only one that could be moved


def test_an_empty_queue_says_what_belongs_there_and_a_pause_what_it_means(job):
    assert "lines up here" in queue_views.waiting([])
    assert "newest first" in past()
    assert queue_views.running([job()]) == ""
    assert "not even after the studio was started" in queue_views.pause_line([], paused=True)
    assert "goes on to its end" in queue_views.pause_line([job("running")], paused=True)
    assert queue_views.pause_line([job()], paused=False) == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": "done", "output": "/o/a.mp4", "total": 20}, "Finished"),
        ({"state": "stopped"}, "Taken off the queue"),
        (
            {"state": "stopped", "started_at": 1.0, "step": 4, "total": 20},
            "Stopped at step 4 of 20",
        ),
        ({"state": "interrupted", "message": "worker was killed"}, "worker was killed"),
        ({"state": "failed", "message": "out of memory"}, "out of memory"),
        (
            {"state": "interrupted", "saved_state": "/s", "saved_step": 5, "total": 20},
            "Resume from step 5",
        ),
        ({"state": "failed", "saved_state": "/s", "saved_step": 20, "total": 20}, "Decode again"),
        (
            {
                "state": "done",
                "output": "/o/a.mp4",
                "saved_state": "/s",
                "saved_step": 5,
                "total": 20,
            },
            "Stopped at step 5 of 20, and decoded",
        ),
    ],
)
def test_a_job_that_is_over_says_how_it_ended_and_what_can_be_done(job, changes, said):
    page = past(job(**changes))
    assert said in page
    assert 'data-act="use"' in page
    assert 'data-act="delete"' in page
    assert ('data-act="resume"' in page) == ("saved_state" in changes)
    assert ("download" in page) == ("output" in changes)


def test_the_question_names_all_that_is_deleted(job):
    page = past(
        job(
            "done",
            outputs=("/o/early.mp4", "/o/whole.mp4"),
            output="/o/whole.mp4",
            previews=(1, 2),
            saved_state="/s",
            saved_step=4,
        )
    )
    told = "early.mp4, whole.mp4, what was saved at step 4 and its previews"
    assert f'data-what="{told}"' in page
    assert 'data-what=""' in past(job("failed"))


@pytest.mark.parametrize(
    ("offset", "total", "start"),
    [(0, 0, 0), (-5, 3, 0), (12, 12, 0), (12, 13, 12), (99, 30, 24), (13, 30, 12)],
)
def test_a_page_is_always_one_that_there_is(offset, total, start):
    assert PAGE_LENGTH == 12
    assert page_start(offset, total) == start


def test_of_one_page_there_is_nothing_to_turn(job):
    assert "k1-pages" not in past(job("done"))
    page = history_views.history([job("done")], offset=12, total=13)
    assert "13 – 13 of 13" in page
    assert page.count("disabled") == 1

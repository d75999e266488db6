"""What the buttons of “Queue & history” do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from kandinsky5.request import GenerationRequest
from kandinsky5.ui import form
from kandinsky5.ui.handlers import Handlers
from kandinsky5.ui.history_views import PAGE_LENGTH
from kandinsky5.ui.queue_calls import QueueCalls
from kandinsky5.ui.queue_handlers import GONE, QueueHandlers

OF_LOOK = ("pause", "stop", "notice", "running", "waiting", "history", "offset", "shown")


@pytest.fixture
def handlers(client):
    return QueueHandlers(client, lambda request, expanded: [request, expanded])


@pytest.fixture
def waiting(client):
    """Three jobs: one that runs, two that wait."""
    ids = [
        client.submit(GenerationRequest(prompt=name, seed=7)) for name in ("one", "two", "three")
    ]
    client.wait(lambda: client.queue()[0].state == "running")
    return ids


def event(act: str, job: str = "", token: str = "") -> Any:
    return SimpleNamespace(_data={"act": act, "job": job, "token": token})


def looked(handlers: QueueHandlers, offset: int = 0, shown: dict | None = None) -> dict[str, Any]:
    return dict(zip(OF_LOOK, handlers.look(offset, shown or {}), strict=True))


def is_skipped(value: Any) -> bool:
    return isinstance(value, dict) and value.get("__type__") == "update" and len(value) == 1


def order(client) -> list[str]:
    return [job.id for job in client.queue()]


def test_two_pages_see_the_same_queue_and_nothing_is_sent_twice(handlers, waiting):
    first, second = looked(handlers), looked(handlers)
    assert first["waiting"] == second["waiting"]
    assert first["waiting"].index("two") < first["waiting"].index("three")
    assert 'data-state="running"' in first["running"]
    assert first["stop"]["interactive"] is True
    again = looked(handlers, shown=first["shown"])
    assert all(is_skipped(again[name]) for name in OF_LOOK[:6])


def test_jobs_move_as_far_as_the_queue_goes(handlers, client, waiting):
    one, two, three = waiting
    assert handlers.pressed(0, event("up", three)) == (0, "")
    assert order(client) == [one, three, two]
    handlers.pressed(0, event("up", three))
    assert order(client) == [one, three, two]
    handlers.pressed(0, event("down", three))
    assert order(client) == [one, two, three]
    assert "has begun" in handlers.pressed(0, event("up", one))[1]


def test_a_double_click_duplicates_once_and_as_the_last(handlers, client, waiting):
    for _ in range(2):
        handlers.pressed(0, event("duplicate", waiting[1], token="press"))
    *before, copy = client.queue()
    assert [job.id for job in before] == waiting
    assert copy.request == client.status(waiting[1]).request
    assert copy.id not in waiting


def test_a_cancelled_job_is_kept_in_the_history_and_a_running_one_goes_on(
    handlers, client, waiting
):
    handlers.pressed(0, event("cancel", waiting[1]))
    assert order(client) == [waiting[0], waiting[2]]
    assert "Taken off the queue" in looked(handlers)["history"]
    assert "has begun" in handlers.pressed(0, event("cancel", waiting[0]))[1]
    assert not client.status(waiting[0]).is_stopping


def test_the_pause_button_does_what_the_page_it_stands_on_says(handlers, client):
    shown = looked(handlers)["shown"]
    handlers.pause_pressed(shown)
    handlers.pause_pressed(shown)  # the second of two pages that both show “Pause”
    assert client.is_paused()
    page = looked(handlers)
    assert page["pause"]["value"] == "Go on"
    assert "no further job begins" in page["notice"]
    job_id = client.submit(GenerationRequest(prompt="later"))
    assert client.status(job_id).state == "queued"
    handlers.pause_pressed(page["shown"])
    client.wait(lambda: client.status(job_id).state == "running")


def test_a_pause_is_told_in_create_too_and_ended_there(client):
    handlers = Handlers(client)
    client.set_paused(True)
    assert "The queue is paused" in handlers.refresh(None, None, {})[0]
    handlers.progress_pressed(event("go"))
    assert not client.is_paused()
    assert "paused" not in handlers.refresh(None, None, {})[0]


def test_stop_ends_the_job_that_the_page_shows_and_no_other(handlers, client, waiting):
    stale = {"stop": waiting[1]}
    shown = looked(handlers)["shown"]
    handlers.stop_running(shown, "discard")
    client.wait(lambda: client.status(waiting[0]).state == "stopped")
    client.wait(lambda: client.status(waiting[1]).state == "running")
    handlers.stop_running(shown, "discard")
    assert client.status(waiting[1]).state == "running"
    assert not client.status(waiting[1]).is_stopping
    handlers.stop_running(stale, "discard")
    client.wait(lambda: client.status(waiting[1]).state == "stopped")


def test_a_waiting_job_fills_the_form_and_is_replaced_in_its_place(handlers, client, waiting):
    request, expanded, _, editing, problem, _ = handlers.to_form(event("edit", waiting[1]))
    assert (request.prompt, expanded, editing, problem) == ("two", None, waiting[1], "")
    line, generate, replace, timer, said = handlers.editing(editing, "")
    assert "no. 1 of the queue" in line
    assert (generate["visible"], replace["visible"], timer.active) == (False, True, True)
    values = form.values_of(GenerationRequest(prompt="two, but blue", seed=9)).values()
    watched, _, problem, left = Handlers(client).replace_waiting(editing, None, "t", *values)
    assert (watched, problem, left) == (waiting[1], "", None)
    assert order(client) == waiting
    assert client.status(waiting[1]).request["prompt"] == "two, but blue"
    again = Handlers(client).replace_waiting(
        None, watched, "t", *values
    )  # the second of two presses
    assert again[0] == watched
    assert order(client) == waiting
    line, generate, replace, timer, _ = handlers.editing(None, said)
    assert (line, generate["visible"], timer.active) == ("", True, False)


def test_a_drawn_seed_is_left_to_the_program_again_when_a_job_is_edited(handlers, client, waiting):
    drawn = client.submit(GenerationRequest(prompt="four"))
    client._set(drawn, request=GenerationRequest(prompt="four", seed=55).to_dict())
    assert handlers.to_form(event("edit", drawn))[0].seed is None
    assert handlers.to_form(event("edit", waiting[1]))[0].seed == 7
    assert handlers.to_form(event("use", drawn))[0].seed == 55


def test_a_job_that_begins_while_it_is_edited_stays_as_it_is_and_a_new_one_is_made(
    handlers, client, waiting
):
    client.stop(waiting[0])
    client.wait(lambda: client.status(waiting[1]).state == "running")
    assert "Generate makes a new one" in handlers.editing(waiting[1], "")[0]
    values = form.values_of(GenerationRequest(prompt="blue")).values()
    made, _, problem, editing = Handlers(client).replace_waiting(waiting[1], None, "t", *values)
    assert (problem, editing) == ("", None)
    assert client.status(made).request["prompt"] == "blue"
    assert client.status(waiting[1]).request["prompt"] == "two"


def test_what_is_wrong_with_an_edited_job_is_said_and_it_waits_unchanged(client, waiting):
    values = {**form.values_of(GenerationRequest(prompt="x")), "steps": 0}.values()
    _, _, problem, editing = Handlers(client).replace_waiting(waiting[1], None, "t", *values)
    assert 'data-field="steps"' in problem
    assert editing == waiting[1]
    assert client.status(waiting[1]).request["prompt"] == "two"


def test_settings_of_a_past_job_fill_the_form_with_what_came_of_it(handlers, client):
    job_id = client.submit(GenerationRequest(prompt="a tale", seed=5))
    client.release()
    client.wait(lambda: client.status(job_id).state == "done")
    client._set(job_id, result={**client.status(job_id).result, "expanded_prompt": "longer"})
    request, expanded, tabs, editing, _, timer = handlers.to_form(event("use", job_id))
    assert (request.prompt, request.seed, expanded, editing) == ("a tale", 5, "longer", None)
    assert (tabs.selected, timer.active) == ("create", False)
    *stays, problem, _ = handlers.to_form(event("edit", job_id))
    assert all(map(is_skipped, stays))
    assert "can no longer be changed" in problem


def test_a_job_is_deleted_with_its_file_and_a_waiting_one_refused(handlers, client, waiting):
    client.release()
    client.wait(lambda: not client.queue())
    path = client.folders.out_dir / f"{waiting[0]}.mp4"
    assert path.is_file()
    assert handlers.pressed(0, event("delete", waiting[0]))[1] == ""
    assert not path.exists()
    assert GONE in handlers.pressed(0, event("delete", waiting[0]))[1]
    client.set_paused(True)
    later = client.submit(GenerationRequest(prompt="later"))
    assert "stop it first" in handlers.pressed(0, event("delete", later))[1]


def test_files_that_stay_are_told(handlers, client, monkeypatch):
    monkeypatch.setattr(client, "delete", lambda _: ["/a<b>.mp4 stays: another job uses it"])
    problem = handlers.pressed(0, event("delete", "x"))[1]
    assert "/a&lt;b&gt;.mp4 stays: another job uses it" in problem


def test_the_history_is_paged_and_a_page_that_is_gone_becomes_the_last(
    handlers, client, fake_client
):
    for number in range(PAGE_LENGTH + 1):
        client._jobs[f"j{number}"] = fake_client.JobSnapshot(
            f"j{number}",
            "failed",
            {"prompt": f"p{number}", "preset": "demo-t2v"},
            message="why",
            finished_at=float(number),
        )
    page = looked(handlers)
    assert page["history"].count("<li") == PAGE_LENGTH
    assert f"1 – {PAGE_LENGTH} of {PAGE_LENGTH + 1}" in page["history"]
    offset, _ = handlers.pressed(0, event("page", "1"))
    last = looked(handlers, offset)
    assert ">p0<" in last["history"]
    assert last["offset"] == PAGE_LENGTH
    client.delete("j0")
    assert looked(handlers, offset)["offset"] == 0
    assert looked(handlers, handlers.pressed(0, event("page", "-1"))[0])["offset"] == 0


def test_an_unknown_button_does_nothing(handlers, client, waiting):
    assert handlers.pressed(3, event("explode", waiting[1])) == (3, "")
    assert order(client) == waiting


def test_programs_pause_move_replace_duplicate_and_delete(client, waiting):
    calls = QueueCalls(Handlers(client))
    assert calls.pause() is True
    assert [job["id"] for job in calls.move(waiting[2], -1)] == [waiting[0], waiting[2], waiting[1]]
    calls.replace(waiting[1], {"prompt": "by a program", "seed": 4})
    assert client.status(waiting[1]).request["prompt"] == "by a program"
    copy = calls.duplicate(waiting[1])
    assert client.status(copy).request == client.status(waiting[1]).request
    client.stop(copy)
    assert calls.history(limit=1)[0]["id"] == copy
    assert calls.delete(copy) == []
    assert calls.history() == []
    assert calls.pause(False) is False


@pytest.mark.parametrize(
    ("call", "arguments", "said"),
    [
        ("move", ("nobody", 1), "no such job"),
        ("move", ("job2", "up"), "a whole number"),
        ("move", ("job1", 1), "does not wait"),
        ("replace", ("job1", {"prompt": "x"}), "a job that waits"),
        ("replace", ("job2", {"prompt": "x", "out": "/etc/x.mp4"}), "out"),
        ("delete", ("job2",), "stop it first"),
        ("delete", ("../../etc",), "no such job"),
    ],
)
def test_programs_are_told_what_cannot_be_done(client, waiting, call, arguments, said):
    before = client.queue()
    with pytest.raises(gr.Error, match=said):
        getattr(QueueCalls(Handlers(client)), call)(*arguments)
    assert [job.request for job in client.queue()] == [job.request for job in before]

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from kandinsky5.request import GenerationRequest
from kandinsky5.ui import form
from kandinsky5.ui.handlers import Handlers


@pytest.fixture
def handlers(client, tmp_path):
    return Handlers(client)


def values(**changes: Any) -> list[Any]:
    filled = form.values_of(GenerationRequest(prompt="a red circle"))
    return list({**filled, **changes}.values())


def skipped(value: Any) -> bool:
    return isinstance(value, dict) and value.get("__type__") == "update" and len(value) == 1


def test_a_double_click_makes_one_job_and_two_tabs_two(handlers, client):
    first, _, _ = handlers.generate(None, "tab-1", *values())
    again, _, _ = handlers.generate(first, "tab-1", *values())
    other, _, _ = handlers.generate(None, "tab-2", *values())
    assert first == again != other
    assert len(client.queue()) == 2


def test_the_second_tab_sees_its_place_in_the_queue(handlers, client):
    handlers.generate(None, "tab-1", *values())
    client.wait(lambda: client.queue()[0].state == "running")
    second, _, _ = handlers.generate(None, "tab-2", *values())
    progress = handlers.refresh(second, None, {})[0]
    assert "In the queue" in progress
    assert "1 ahead of it" in progress


def test_a_bad_value_starts_nothing_and_is_said_at_its_field(handlers, client):
    watched, _, problem = handlers.generate("before", "t", *values(steps=0))
    assert watched == "before"
    assert 'data-field="steps"' in problem
    assert client.queue() == ()


def test_an_unexpected_refusal_of_the_client_is_one_line(handlers, client, monkeypatch):
    from kandinsky5.errors import K1Error

    def refuse(*_: Any, **__: Any) -> str:
        raise K1Error("the disk <is> full")

    monkeypatch.setattr(client, "submit", refuse)
    assert "the disk &lt;is&gt; full" in handlers.generate(None, "t", *values())[2]


def test_a_page_without_a_job_of_its_own_finds_the_running_one(handlers, client):
    job_id = client.submit(GenerationRequest(prompt="from another tab"))
    client.wait(lambda: client.queue()[0].state == "running")
    progress, _, _, stop, *_ = handlers.refresh(None, None, {})
    assert f'data-job="{job_id}"' in progress
    assert stop["interactive"] is True


def test_nothing_is_sent_twice(handlers):
    *first, shown = handlers.refresh(None, None, {})
    assert not any(map(skipped, first))
    *second, _ = handlers.refresh(None, None, shown)
    assert all(map(skipped, second))


def test_a_stop_that_was_heard_cannot_be_pressed_again(handlers, client):
    job_id = client.submit(GenerationRequest(prompt="a tale"))
    client.wait(lambda: client.queue()[0].state == "running")
    client._set(job_id, is_stopping=True)
    progress, _, _, stop, *_ = handlers.refresh(None, None, {})
    assert "Stopping" in progress
    assert stop["interactive"] is False


def test_stop_reaches_a_job_of_another_tab(handlers, client):
    job_id = client.submit(GenerationRequest(prompt="from another tab"))
    client.wait(lambda: client.queue()[0].state == "running")
    handlers.stop_watched(None)
    client.wait(lambda: client.status(job_id).state == "stopped")


def test_a_waiting_job_is_stopped_from_the_list_and_the_running_one_goes_on(handlers, client):
    first = client.submit(GenerationRequest(prompt="one"))
    second = client.submit(GenerationRequest(prompt="two"))
    handlers.stop_listed(SimpleNamespace(_data={"job": second}))
    handlers.stop_listed(SimpleNamespace(_data={"job": "no such"}))
    assert client.status(second).state == "stopped"
    assert client.status(first).state in ("queued", "running")


def test_a_failed_job_is_told_to_a_page_that_was_reloaded(handlers, client):
    job_id = client.submit(GenerationRequest(prompt="fail"))
    client.release()
    client.wait(lambda: client.status(job_id).state == "failed")
    progress, player, *_ = handlers.refresh(None, None, {})
    assert "out of memory &lt;b&gt;now&lt;/b&gt;" in progress
    assert "<video" not in player


def test_a_page_that_was_loaded_again_shows_what_was_made_last(handlers, client):
    job_id = client.submit(GenerationRequest(prompt="a tale"))
    client.release()
    client.wait(lambda: client.status(job_id).state == "done")
    progress, player, *_ = handlers.refresh(None, None, {})
    assert "<b>Finished</b>" in progress
    assert "a tale" in progress
    assert f"/k1/result/{job_id}" in player


@pytest.mark.parametrize("field", ["dit", "model_dir", "lora_1"])
def test_a_file_known_to_be_wrong_is_refused_at_its_field(handlers, client, tmp_path, field):
    named = tmp_path / "named"
    named.mkdir() if field == "model_dir" else named.touch()
    wrong = {"problem": "not Kandinsky 5 (looks like <Wan>)"}
    client.told = {"dit": wrong, "model_dir": wrong, "loras": [wrong]}
    problem = handlers.generate(None, "t", *values(**{field: str(named)}))[2]
    assert f'data-field="{field}"' in problem
    assert "looks like &lt;Wan&gt;" in problem
    assert client.queue() == ()


def test_a_file_that_is_still_looked_at_holds_nothing_up(handlers, client, tmp_path):
    (tmp_path / "mine.safetensors").touch()
    job_id, _, problem = handlers.generate(
        None, "t", *values(dit=str(tmp_path / "mine.safetensors"))
    )
    assert (job_id, problem) == (client.queue()[0].id, "")


def test_programs_submit_look_and_stop(handlers, client):
    job_id = handlers.submit({"prompt": "by a program", "seed": 3})
    assert [job["id"] for job in handlers.queue()] == [job_id]
    state = handlers.status(job_id)
    assert {"state", "step", "total", "eta", "output"} <= set(state)
    assert state["request"]["seed"] == 3
    handlers.stop(job_id)
    client.wait(lambda: client.status(job_id).state == "stopped")


@pytest.mark.parametrize(
    ("request_values", "said"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "colour": "red"}, "colour"),
        ({"prompt": "x", "steps": "many", "seed": -5, "colour": 1}, "(?s)seed: .*steps: .*colour"),
        ("{not json", "not JSON"),
        ([], "JSON object"),
        ({"prompt": "x", "out": "/etc/motd.mp4"}, "out"),
        ({"prompt": "x", "save_latents": "../../x.safetensors"}, "save_latents"),
    ],
)
def test_programs_are_told_what_is_wrong_with_a_request(handlers, client, request_values, said):
    with pytest.raises(gr.Error, match=said):
        handlers.submit(request_values)
    assert client.queue() == ()


def test_programs_are_told_of_unknown_jobs(handlers):
    for call in (handlers.status, handlers.stop):
        with pytest.raises(gr.Error, match="no such job"):
            call("nobody")

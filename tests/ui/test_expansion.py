"""The prompt is rewritten where it can be seen and edited, before anything is made of it."""

from __future__ import annotations

from typing import Any

import pytest

from kandinsky5.request import GenerationRequest
from kandinsky5.ui import expansion, form
from kandinsky5.ui.expansion import Expansion, Shown

PRESET = "lite-t2v-5s-sft"
NAMES = ("running", "box", "line", "button", "timer", "written_for")


@pytest.fixture
def expand(client):
    return Expansion(client)


def pressed(expand: Expansion, running: str | None = None, **changes: Any) -> dict[str, Any]:
    filled = form.values_of(GenerationRequest(preset=PRESET, prompt="a fox"))
    answer = expand.pressed(running, "", *{**filled, **changes}.values())
    return dict(zip((*NAMES, "problem"), answer, strict=True))


def looked(expand: Expansion, running: str | None) -> dict[str, Any]:
    return dict(zip(NAMES, expand.look(running, PRESET), strict=True))


def written(expand: Expansion, client: Any, prompt: str) -> dict[str, Any]:
    """What the page shows once the text is there."""
    client.release()
    running = pressed(expand, prompt=prompt)["running"]
    client.wait(lambda: client.status(running).finished_at)
    return looked(expand, running)


def test_the_text_streams_into_the_box_and_ends_up_there_to_be_edited(expand, client):
    began = pressed(expand)
    job_id = began["running"]
    assert began["timer"].active
    assert began["box"]["interactive"] is False
    client.allow(2)
    client.wait(lambda: client.status(job_id).expanded_prompt == "a fox,")
    seen = looked(expand, job_id)
    assert (seen["running"], seen["box"]["value"]) == (job_id, "a fox,")
    assert "2 words" in seen["line"]
    assert seen["button"]["value"] == expansion.STOP_BUTTON
    client.release()
    client.wait(lambda: client.status(job_id).state == "done")
    seen = looked(expand, job_id)
    assert seen["box"] == {
        "value": "a fox, in detail, on a table",
        "interactive": True,
        "__type__": "update",
    }
    assert (seen["running"], seen["timer"].active, seen["written_for"]) == (None, False, "a fox")
    assert seen["button"]["value"] == expansion.BUTTON


def test_only_a_job_is_queued_with_what_the_form_says(expand, client):
    job_id = pressed(expand, expanded_prompt="what stood there", seed="7")["running"]
    (job,) = client.queue()
    assert (job.id, job.kind) == (job_id, "expand")
    request = GenerationRequest.from_dict(job.request)
    assert (request.expand, request.expanded_prompt, request.seed) == (True, None, 7)


def test_pressed_again_it_stops_and_leaves_what_was_written(expand, client):
    job_id = pressed(expand)["running"]
    client.allow(1)
    client.wait(lambda: client.status(job_id).expanded_prompt == "a")
    again = pressed(expand, running=job_id)
    assert again["running"] == job_id
    client.wait(lambda: client.status(job_id).state == "stopped")
    seen = looked(expand, job_id)
    assert seen["box"]["interactive"] is True
    assert "value" not in seen["box"]
    assert len(client.queue()) == 0


def test_a_failure_is_one_line_and_leaves_the_box(expand, client):
    seen = written(expand, client, "fail")
    assert "weights &lt;b&gt;missing&lt;/b&gt;" in seen["line"]
    assert "value" not in seen["box"]


def test_an_answer_of_no_use_is_said_and_leaves_the_prompt(expand, client):
    seen = written(expand, client, "useless")
    assert seen["box"]["value"] == ""
    assert "was blank" in seen["line"]


def test_a_value_that_cannot_be_is_said_at_its_field_and_nothing_starts(expand, client):
    seen = pressed(expand, steps=0)
    assert 'data-field="steps"' in seen["problem"]
    assert (seen["running"], client.queue()) == (None, ())


def test_a_page_that_was_loaded_again_finds_what_is_being_written(expand, client):
    assert expand.found()[0] is None
    job_id = pressed(expand)["running"]
    found, timer = expand.found()
    assert (found, timer.active) == (job_id, True)


@pytest.mark.parametrize(
    ("shown", "line"),
    [
        (Shown("demo-t2v", True, "", ""), expansion.MUTE),
        (Shown(PRESET, False, "a text", "a"), expansion.OFF),
        (Shown(PRESET, True, " ", "a"), expansion.IDLE),
        (Shown(PRESET, True, "a text", "a"), expansion.IN_USE),
        (Shown(PRESET, True, "a text", " a ", "a"), expansion.IN_USE),
        (Shown(PRESET, True, "a text", "b", "a"), expansion.OF_ANOTHER),
    ],
)
def test_the_line_says_what_becomes_of_the_prompt(shown, line):
    assert line.replace("'", "&#x27;") in shown.line


def test_the_demos_encoder_does_not_write_and_its_button_cannot_be_pressed(expand):
    line, button = expand.changed(None, "demo-t2v", True, "", "a fox", None)
    assert "does not write" in line
    assert button["interactive"] is False
    assert expand.changed(None, PRESET, True, "", "a fox", None)[1]["interactive"] is True

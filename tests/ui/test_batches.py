"""Several jobs of one form: said before they are made, each its own, none twice."""

from __future__ import annotations

from typing import Any

import gradio as gr
import pytest
from PIL import Image

from kandinsky5.errors import K1Error, UserError
from kandinsky5.request import MAX_SEED, GenerationRequest
from kandinsky5.ui import form
from kandinsky5.ui.batches import (
    BATCH_FIELDS,
    LABEL,
    MAX_JOBS,
    batch_told,
    requests_from,
    submitted,
)
from kandinsky5.ui.handlers import Handlers


def filled(**changes: Any) -> dict[str, Any]:
    request = GenerationRequest(prompt="a red circle", preset=changes.pop("preset", "demo-t2v"))
    return {**form.values_of(request), **changes}


def told(label: str = LABEL, **changes: Any) -> tuple[str, Any]:
    values = filled(**changes)
    return batch_told(label, *(values[name] for name in BATCH_FIELDS))


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    paths = [str(tmp_path / f"{name}.png") for name in ("first", "second", "third")]
    for path in paths:
        Image.new("RGB", (64, 64)).save(path)
    return paths


def test_one_job_is_what_the_form_alone_would_be():
    assert requests_from(filled(seed="7")) == [form.request_from(filled(seed="7"))]
    assert requests_from(filled())[0].seed is None
    assert told() == ("", gr.skip())


def test_a_count_gives_the_next_seeds():
    made = requests_from(filled(seed="7", count=3))
    assert [request.seed for request in made] == [7, 8, 9]
    assert {request.prompt for request in made} == {"a red circle"}
    line, label = told(seed="7", count=3)
    assert "3 jobs: seeds 7 to 9" in line and label == "Generate 3 jobs"
    drawn = [request.seed for request in requests_from(filled(count=3))]
    assert drawn == [drawn[0], drawn[0] + 1, drawn[0] + 2]
    assert told("Generate 3 jobs", count=3)[1] == gr.skip(), "the button blinks while one types"


def test_each_line_of_the_prompt_is_a_job_when_asked_for():
    prompt = " a red circle \n\n a blue square\r\n"
    (whole,) = requests_from(filled(prompt=prompt))
    assert whole.prompt == prompt
    made = requests_from(filled(prompt=prompt, per_line=True, seed="5", count=2))
    assert [(request.prompt, request.seed) for request in made] == [
        ("a red circle", 5),
        ("a red circle", 6),
        ("a blue square", 5),
        ("a blue square", 6),
    ]
    assert (
        "4 jobs: 2 prompts × seeds 5 to 6"
        in told(prompt=prompt, per_line=True, seed="5", count=2)[0]
    )
    seeds = [request.seed for request in requests_from(filled(prompt=prompt, per_line=True))]
    assert seeds == [None, None], "each draws its own"


def test_each_picture_is_a_job(pictures):
    values = filled(preset="demo-i2v", image=pictures[0], images=pictures[1:])
    assert [request.image for request in requests_from(values)] == pictures
    assert "3 jobs: 3 images" in told(preset="demo-i2v", image=None, images=pictures)[0]
    alone = filled(preset="demo-i2v", images=pictures[:1])
    assert [request.image for request in requests_from(alone)] == pictures[:1]
    left_over = requests_from(filled(images=pictures))
    assert [request.image for request in left_over] == [None]


def test_a_broken_picture_among_several_starts_nothing(pictures, tmp_path):
    (tmp_path / "third.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="not a readable image"):
        requests_from(filled(preset="demo-i2v", images=pictures))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"count": 0}, "count"),
        ({"count": MAX_JOBS + 1}, "count"),
        ({"count": 2.5}, "count"),
        ({"count": float("nan")}, "count"),
        ({"count": "many"}, "count"),
        ({"count": 20, "prompt": "a\nb", "per_line": True}, "count"),
        ({"prompt": "x\n" * 5000, "per_line": True}, "count"),
        ({"prompt": " \n ", "per_line": True}, "prompt"),
        ({"prompt": "a\nb\0", "per_line": True}, "prompt"),
        ({"seed": str(MAX_SEED), "count": 2}, "seed"),
        ({"seed": "-1", "count": 2}, "seed"),
        ({"steps": 0, "count": 2}, "steps"),
    ],
)
def test_what_cannot_be_is_said_at_its_field_and_nothing_starts(client, changes, field):
    values = filled(**changes)
    with pytest.raises(UserError) as caught:
        requests_from(values)
    assert caught.value.field == field
    handlers = Handlers(client)
    _, _, problem = handlers.generate(None, "token", *values.values())
    assert f'data-field="{field}"' in problem
    assert client.queue() == ()
    line, _ = told(**changes)
    assert ("data-over" in line) == (field == "count")


def test_an_expanded_prompt_is_for_one_prompt_alone():
    asked = {"preset": "lite-t2v-5s-sft", "expanded_prompt": "A red circle, in detail."}
    (request,) = requests_from(filled(**asked, prompt="one line", per_line=True))
    assert request.expanded_prompt
    with pytest.raises(UserError, match="for one prompt"):
        requests_from(filled(**asked, prompt="one\ntwo", per_line=True))


def test_each_job_is_queued_once_and_a_double_click_adds_none(client):
    handlers = Handlers(client)
    values = filled(seed="7", count=3).values()
    first, _, problem = handlers.generate(None, "tab-1", *values)
    again, _, _ = handlers.generate(first, "tab-1", *values)
    assert (first, problem) == (again, "")
    assert [job.request["seed"] for job in client.queue()] == [7, 8, 9]
    assert client.status(first).request["seed"] == 7


def test_a_refusal_in_the_middle_says_how_many_are_queued(client, monkeypatch):
    requests = requests_from(filled(seed="7", count=3))
    accept = client.submit

    def submit(request: GenerationRequest, *, token: str | None = None) -> str:
        if request.seed == 9:
            raise K1Error("the disk is full")
        return accept(request, token=token)

    monkeypatch.setattr(client, "submit", submit)
    with pytest.raises(K1Error, match="2 of 3 jobs are queued; then: the disk is full"):
        submitted(client, requests, "token")
    assert len(client.queue()) == 2

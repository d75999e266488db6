"""The studio as a person meets it: real page, real worker, real demo model."""

from __future__ import annotations

import pytest

from kandinsky5.ui.options import StudioOptions
from kandinsky5.worker.client import WorkerClient

pytestmark = pytest.mark.browser

PROMPT = "#k1-f-prompt textarea"
STEPS = "#k1-f-steps input[type=number]"
PICTURE_AFTER = """step => { const now = document.querySelector('#k1-preview img');
const at = now && Number(now.src.split('/').pop()); return at > step && now.complete && at; }"""
PLAYING = (
    "() => { const v = document.querySelector('#k1-player video'); return v && v.readyState >= 2; }"
)
PLAYING_OF = """job => { const v = document.querySelector(`#k1-player [data-job="${job}"] video`);
return v && v.readyState >= 2 && v.offsetParent; }"""


@pytest.fixture(scope="module")
def real_studio(serve, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    options = StudioOptions(out_dir=folder / "outputs", state_dir=folder / "state")
    client = WorkerClient(state_dir=options.state_dir, out_dir=options.out_dir)
    return serve(client, options)


def test_a_prompt_becomes_a_playing_video_of_one_second(real_studio, open_page) -> None:
    page = open_page(real_studio.url)
    page.fill(PROMPT, "a red circle moves right")
    page.click("#k1-generate")
    page.wait_for_function(PLAYING, timeout=180_000)
    duration = page.eval_on_selector("#k1-player video", "v => v.duration")
    assert duration == pytest.approx(25 / 24, abs=0.1)
    assert [job.state for job in real_studio.client.history()] == ["done"]
    page.wait_for_selector("#k1-plan .k1-plan[data-fits=yes]:has-text('1 run here')")


def test_the_picture_changes_a_stopped_run_shows_what_is_there_and_goes_on_to_its_video(
    real_studio, open_page
) -> None:
    client = real_studio.client
    page = open_page(real_studio.url)
    page.fill(PROMPT, "a blue square moves left")
    page.fill(STEPS, "90")
    page.click("#k1-generate")
    first = page.wait_for_function(PICTURE_AFTER, arg=0, timeout=180_000).json_value()
    page.wait_for_function(PICTURE_AFTER, arg=first)
    page.click("#k1-stop")
    page.click("#k1-ask button[value=decode]")
    page.wait_for_selector(".k1-resume")
    stopped = client.history()[0]
    assert first < stopped.saved_step < 90
    assert stopped.result["steps_run"] == stopped.saved_step
    page.wait_for_function(PLAYING_OF, arg=stopped.id)

    page.click(".k1-resume")
    page.wait_for_function(PICTURE_AFTER, arg=stopped.saved_step)
    page.wait_for_function(PLAYING_OF, arg=stopped.id, timeout=180_000)
    done = client.status(stopped.id)
    assert (done.state, done.result["steps_run"]) == ("done", 90)

"""The studio as a person meets it: real page, real worker, real demo model."""

from __future__ import annotations

import pytest

from kandinsky5.ui.options import StudioOptions
from kandinsky5.worker.client import WorkerClient

pytestmark = pytest.mark.browser

PROMPT = "#k1-f-prompt textarea"
STEPS = "#k1-f-steps input[type=number]"
PLAYING = (
    "() => { const v = document.querySelector('#k1-player video'); return v && v.readyState >= 2; }"
)


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

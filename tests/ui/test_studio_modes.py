"""Every mode through the studio's own names, on tiny models in both layouts they are published in."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_checkpoints import LAYOUTS, MODES, STEPS, quick, write_model

from kandinsky5.output.metadata import read_metadata, request_of, video_info
from kandinsky5.presets import PRESETS
from kandinsky5.ui.options import StudioOptions
from kandinsky5.worker.client import FileNames, WorkerClient

PATIENCE_S = 240
SMALL = {"width": 64, "height": 64}
FRAMES = 5


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """``<mode>-<layout>`` folders."""
    folder = tmp_path_factory.mktemp("models")
    for mode in MODES:
        for layout in LAYOUTS:
            write_model(folder / f"{mode}-{layout}", mode, layout)
    return folder


@pytest.fixture(scope="module")
def studio(serve, tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("modes")
    options = StudioOptions(out_dir=folder / "outputs", state_dir=folder / "state", device="cpu")
    client = WorkerClient(state_dir=options.state_dir, out_dir=options.out_dir, device="cpu")
    return serve(client, options)


@pytest.fixture(scope="module")
def program(studio) -> Any:
    """A program that speaks to the studio by its stable names."""
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(studio.url, verbose=False)


@pytest.fixture(scope="module")
def asked(program, models) -> dict[tuple[str, str], str]:
    """One job for each mode and layout, all in the queue at once."""
    return {
        (mode, layout): program.predict(
            small(mode, models / f"{mode}-{layout}"), api_name="/submit"
        )
        for mode in MODES
        for layout in LAYOUTS
    }


def small(mode: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """Values of a request that hardly takes any time."""
    values = quick(mode, folder, **SMALL, **changes)
    return {**values, "seconds": (FRAMES - 1) / 24} if "seconds" in values else values


def over(program: Any, job_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_S
    while (job := program.predict(job_id, api_name="/status"))["place"] != -1:
        assert time.monotonic() < deadline, job
        time.sleep(0.2)
    return job


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_runs_from_a_request_to_a_served_file(studio, program, asked, mode, layout) -> None:
    job = over(program, asked[mode, layout])
    assert job["state"] == "done", job["message"]
    made, is_video = job["result"], PRESETS[MODES[mode].preset].is_video
    frames = FRAMES if is_video else 1
    assert (made["frames"], made["width"], made["height"]) == (frames, 64, 64)
    assert (made["steps_run"], made["evaluations_run"]) == (STEPS, 2 * STEPS)
    served = httpx.get(f"{studio.url}/k1/result/{job['id']}")
    assert served.content == Path(job["output"]).read_bytes()
    assert served.headers["content-type"] == ("video/mp4" if is_video else "image/png")
    info = video_info(Path(job["output"]))
    assert (info["frames"], info["width"], info["height"]) == (frames, 64, 64)
    found = request_of(read_metadata(Path(job["output"])))
    assert (found.preset, found.seed, found.steps) == (MODES[mode].preset, 3, STEPS)


def test_the_worker_tells_the_page_what_the_model_in_a_folder_is(studio, models) -> None:
    names = FileNames("lite-t2v-5s-sft", model_dir=str(models / "t2v-official"))
    deadline = time.monotonic() + PATIENCE_S
    while (told := studio.client.describe(names)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert told["model_dir"]["config"]["num_visual_blocks"] == MODES["t2v"].config.num_visual_blocks
    assert told["missing"] == []


def test_an_expansion_is_written_alone_edited_and_what_was_edited_is_used(program, models) -> None:
    """The tiny encoder is random: that it writes counts, not what; after some words that is enough."""
    values = small("t2i", models / "t2i-diffusers", expand=True)
    job_id = program.predict(values, api_name="/expand")
    deadline = time.monotonic() + PATIENCE_S
    while not (job := program.predict(job_id, api_name="/status"))["expanded_prompt"]:
        assert (job["kind"], job["place"]) == ("expand", 0) and time.monotonic() < deadline, job
        time.sleep(0.1)
    assert job["stage"] == "expand"
    program.predict(job_id, "discard", api_name="/stop")
    job = over(program, job_id)
    assert (job["state"], job["output"]) == ("stopped", None)

    edited = "A red circle moves slowly to the right."
    values |= {"expand": False, "expanded_prompt": edited}
    job = over(program, program.predict(values, api_name="/submit"))
    assert job["state"] == "done", job["message"]
    assert job["result"]["expanded_prompt"] == edited
    assert "expand" not in job["result"]["seconds"]
    made = read_metadata(Path(job["output"]))
    assert made["expanded_prompt"] == request_of(made).expanded_prompt == edited
    assert request_of(made).prompt == values["prompt"]


def test_the_demo_which_cannot_write_says_so(program) -> None:
    job = over(program, program.predict({"prompt": "a red circle"}, api_name="/expand"))
    assert job["state"] == "failed"
    assert "text encoder writes" in job["message"]

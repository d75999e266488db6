"""Memory that lies in pieces: the job goes on in a new worker, once, from its saved state (fault 1)."""

from __future__ import annotations

from pathlib import Path

import pytest
from demo_runs import Ran, quick, ran

from kandinsky5.output.state import load_latents
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.worker.pump import IN_PIECES

STEPS = 3
LONG_S = 300.0
"""Two processes load torch, one after the other, beside whatever else the machine does."""
WHERE = "out of GPU memory during denoise, step 2 of 3"


def test_a_new_worker_goes_on_from_the_saved_step(studio, over, asking) -> None:
    client = studio.start()
    job_id = client.submit(asking("in pieces"))
    job = over(client, job_id)
    assert (job.id, job.state, job.message) == (job_id, "done", None)
    assert f"{WHERE}: {IN_PIECES}" in job.notices and "resumed after step 1" in job.notices
    first, second = [text for text in job.notices if text.startswith("pid ")]
    assert first != second == f"pid {client.worker_pid()}"
    assert Path(job.output).exists() and not job.is_resumable
    assert [done.id for done in client.history()] == [job_id]


def test_memory_in_pieces_again_ends_it_resumable(studio, over, asking) -> None:
    client = studio.start()
    job = over(client, client.submit(asking("always in pieces")))
    assert (job.state, job.saved_step) == ("failed", 1)
    assert job.message == f"{WHERE}; step 1 is kept: resume it"
    assert len([text for text in job.notices if text.startswith("pid ")]) == 2
    assert job.is_resumable
    assert over(client, client.submit(asking())).state == "done"


def test_a_job_that_was_to_stop_is_not_begun_again(studio, over, asking, monkeypatch) -> None:
    from kandinsky5.worker.live_job import LiveJob

    client = studio.start()
    begins = LiveJob.begins

    def told_to_stop(live, *given):
        live.stop_mode = live.told_mode = "save"  # told already, and not heard in time
        return begins(live, *given)

    monkeypatch.setattr(LiveJob, "begins", told_to_stop)
    job = over(client, client.submit(asking("in pieces")))
    assert (job.state, job.is_resumable, job.saved_step) == ("stopped", True, 1)
    assert len([text for text in job.notices if text.startswith("pid ")]) == 1


def test_a_job_that_was_to_be_decoded_early_is_decoded_by_the_new_worker(
    studio, over, asking, monkeypatch
) -> None:
    from kandinsky5.worker.live_job import LiveJob

    goes_on = LiveJob.goes_on_from

    def told_to_decode(live, saved_state):
        live.stop_mode = live.told_mode = "decode"  # while the old worker was at its step
        return goes_on(live, saved_state)

    monkeypatch.setattr(LiveJob, "goes_on_from", told_to_decode)
    client = studio.start()
    job = over(client, client.submit(asking("in pieces, hold")))
    assert job.state == "done" and Path(job.output).exists()
    assert job.result["steps_run"] == 2  # of 3: the stop was passed on again


@pytest.fixture
def whole(tmp_path: Path) -> Ran:
    """The run that always had memory, in one process."""
    return ran(tmp_path / "whole", quick(steps=STEPS), pipeline=Pipeline())


def test_the_real_pipeline_comes_to_the_same_latents_in_a_new_process(
    studio, tmp_path, until, whole, monkeypatch
) -> None:
    monkeypatch.setenv("K1_TEST_FIRST_PROCESS", str(tmp_path / "first"))
    client = studio.start(pipeline="pieces_pipeline:pipeline_in_pieces")
    latents = tmp_path / "latents.safetensors"
    job_id = client.submit(quick(save_latents=str(latents), steps=STEPS))
    until(lambda: client.status(job_id).place == -1, patience_s=LONG_S)
    job = client.status(job_id)
    assert (job.state, job.message) == ("done", None)
    (notice,) = [text for text in job.notices if IN_PIECES in text]
    assert notice.startswith("out of memory during denoise, step 2 of 3")
    assert any("going on with less" in text for text in job.notices)
    assert int((tmp_path / "first").read_text()) != client.worker_pid()
    assert load_latents(latents)[0].equal(whole.latents)
    assert job.result["evaluations_run"] == whole.result.evaluations_run

"""A stop that decodes what is there: the job is done early, and can go on all the same."""

from __future__ import annotations

from pathlib import Path

from kandinsky5.worker.live_job import LiveJob


def test_what_is_there_becomes_a_result_and_the_job_can_go_on_to_its_end(
    studio, in_step_2, over, asking
) -> None:
    client = studio.start()
    job_id = client.submit(asking("hold"))
    in_step_2(client, job_id)
    client.stop(job_id, "decode")
    early = over(client, job_id)
    assert early.state == "done" and early.saved_step in (1, 2)
    assert early.result["steps_run"] == early.saved_step
    assert Path(early.output).exists() and early.is_resumable
    client.resume(job_id)
    done = over(client, job_id)
    assert (done.state, done.result["steps_run"]) == ("done", 3)
    assert done.output != early.output and Path(early.output).exists()
    assert not done.is_resumable and not Path(early.saved_state).exists()


def test_an_early_result_stays_when_the_job_that_went_on_is_stopped(
    studio, in_step_2, over, until, asking
) -> None:
    client = studio.start()
    job_id = client.submit(asking("hold"))
    in_step_2(client, job_id)
    client.stop(job_id, "decode")
    early = over(client, job_id)
    other = client.submit(asking("hold"))
    in_step_2(client, other)
    client.resume(job_id)
    client.stop(job_id, "save")
    again = client.status(job_id)
    assert (again.state, again.output, again.is_resumable) == ("done", early.output, True)
    client.stop(other)
    client.discard(job_id)
    assert not client.status(job_id).is_resumable and Path(early.output).exists()


def test_the_decode_of_what_is_there_can_be_stopped_too(
    studio, in_step_2, over, until, asking
) -> None:
    client = studio.start(stop_grace_s=0.2)
    job_id = client.submit(asking("hold, then for ever"))
    in_step_2(client, job_id)
    client.stop(job_id, "decode")
    until(lambda: client.status(job_id).stage == "decode")
    decoding = client.status(job_id)
    assert decoding.state == "running" and not decoding.is_stopping
    client.stop(job_id, "save")
    stopped = over(client, job_id)
    assert (stopped.state, stopped.output) == ("stopped", None) and stopped.is_resumable


def test_a_worker_has_its_step_s_time_to_obey_and_all_of_it_to_decode() -> None:
    live = LiveJob("job", seconds_per_step=1000.0)
    assert live.stop_to_pass_on(0.0) is None
    assert live.asks_to_stop("decode") and not live.asks_to_stop("decode")
    assert live.stop_to_pass_on(0.0).mode == "decode" and live.stop_to_pass_on(0.0) is None
    assert live.kill_at is None and not live.is_overdue
    assert live.asks_to_stop("save") and not live.asks_to_stop("discard")
    assert live.stop_to_pass_on(0.0).mode == "save"
    assert live.kill_at is not None and not live.is_overdue

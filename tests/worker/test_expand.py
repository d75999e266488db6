"""A prompt that is rewritten before anything is made of it: a job of its own that makes no file."""

from __future__ import annotations

import sqlite3

from kandinsky5.worker.jobs import JobStore
from kandinsky5.worker.protocol import FileNames


def test_a_prompt_is_rewritten_and_nothing_else_comes_of_it(studio, over, asking) -> None:
    client = studio.start()
    job = over(client, client.expand(asking("a red circle", seed=4)))
    assert (job.kind, job.state, job.output) == ("expand", "done", None)
    assert job.result["expanded_prompt"] == "a red circle, in detail"
    assert job.request["seed"] == 4
    assert client.history() == ()
    assert not studio.out_dir.exists()


def test_its_text_grows_for_whoever_looks_and_it_can_be_stopped(
    studio, over, until, asking
) -> None:
    client = studio.start()
    job_id = client.expand(asking("hold"))
    until(lambda: client.status(job_id).expanded_prompt == "in")
    assert client.status(job_id).stage == "expand"
    client.stop(job_id)
    assert over(client, job_id).state == "stopped"


def test_whoever_waits_for_a_prompt_comes_before_the_jobs_that_wait(
    studio, over, in_step_2, asking
) -> None:
    client = studio.start()
    running = client.submit(asking("hold"))
    in_step_2(client, running)
    waiting, written = client.submit(asking()), client.expand(asking("a circle"))
    assert [job.id for job in client.queue()] == [running, written, waiting]
    assert [client.status(job_id).place for job_id in (written, waiting)] == [1, 2]
    client.stop(running)
    assert over(client, waiting).started_at >= over(client, written).finished_at


def test_a_text_that_nobody_waits_for_any_more_is_not_written(tmp_path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite3")
    forgotten = store.add({}, kind="expand")
    store.close()
    store = JobStore(tmp_path / "jobs.sqlite3")
    assert (store.get(forgotten).state, store.claim_next()) == ("stopped", None)
    store.close()
    rows = sqlite3.connect(tmp_path / "jobs.sqlite3").execute("SELECT kind FROM jobs").fetchall()
    assert rows == [("expand",)]


def test_files_are_described_beside_a_running_job(
    studio, until, in_step_2, asking, tmp_path
) -> None:
    client = studio.start()
    job_id = client.submit(asking("hold"))
    in_step_2(client, job_id)
    wrong = tmp_path / "model.safetensors"
    wrong.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    names = FileNames("demo-t2v", dit=str(wrong))
    assert client.describe(names) is None
    told = until(lambda: client.describe(names))
    assert "LFS" in told["dit"]["problem"]
    assert client.status(job_id).state == "running"

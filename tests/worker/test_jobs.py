from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from kandinsky5.errors import K1Error, UserError
from kandinsky5.worker.job_schema import SCHEMA_VERSION
from kandinsky5.worker.jobs import LEFT_RUNNING, JobStore


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "jobs.sqlite3"


@pytest.fixture
def store(file: Path):
    store = JobStore(file)
    yield store
    store.close()


def test_jobs_are_claimed_in_their_order(store):
    ids = [store.add({"prompt": str(n)}) for n in range(3)]
    claimed = [store.claim_next() for _ in range(4)]
    assert [job and job.id for job in claimed] == [*ids, None]
    assert claimed[0].request == {"prompt": "0"} and claimed[0].state == "running"


def test_a_running_job_is_interrupted_by_reopening_and_a_queued_one_stays(store, file):
    running, queued = store.add({}), store.add({})
    store.claim_next()
    store.record_progress(running, stage="denoise", step=12, total=50, notices=["slow"])
    store.close()
    again = JobStore(file)
    job = again.get(running)
    assert (job.state, job.message, job.place) == ("interrupted", LEFT_RUNNING, -1)
    assert (job.stage, job.step, job.total, job.notices) == ("denoise", 12, 50, ("slow",))
    assert (again.get(queued).state, again.get(queued).place) == ("queued", 1)
    again.close()


def test_a_token_names_one_job_even_after_it_ended(store):
    job_id = store.add({}, token="press")
    store.stop_queued(job_id)
    assert store.add({}, token="press") == job_id
    assert store.queue() == ()


def test_jobs_without_tokens_are_all_different(store):
    assert len({store.add({}) for _ in range(3)}) == 3


def test_a_running_job_cannot_be_taken_out_of_the_queue(store):
    job_id = store.add({})
    store.claim_next()
    assert not store.stop_queued(job_id)
    assert store.get(job_id).state == "running"


def test_a_job_that_is_over_stays_as_it_ended(store):
    job_id = store.add({})
    store.finish(job_id, "done", result={"output": "a.mp4"})
    store.finish(job_id, "interrupted", message="too late")
    job = store.get(job_id)
    assert (job.state, job.output, job.result, job.message) == (
        "done",
        "a.mp4",
        {"output": "a.mp4"},
        None,
    )


def test_only_final_states_end_a_job(store):
    with pytest.raises(ValueError, match="'running' does not end a job"):
        store.finish(store.add({}), "running")


def test_history_is_newest_first_and_paged(store):
    ids = [store.add({}) for _ in range(5)]
    for job_id in ids:
        store.finish(job_id, "done")
    waiting = store.add({})
    assert [job.id for job in store.history(10)] == ids[::-1]
    assert [job.id for job in store.history(2, 1)] == ids[::-1][1:3]
    assert store.history(-1) == ()
    assert [job.id for job in store.queue()] == [waiting]


def test_the_database_is_in_wal_mode_and_has_its_version(store, file):
    store.add({})
    with sqlite3.connect(file) as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert other.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    other.close()


def test_a_newer_store_is_refused(store, file):
    store.close()
    with sqlite3.connect(file) as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(UserError, match="version 99.*update K1"):
        JobStore(file)


def test_a_file_that_is_no_store_is_refused(file):
    file.parent.mkdir()
    file.write_text("<html>" * 1000)
    with pytest.raises(UserError, match="not a usable job store"):
        JobStore(file)


def test_a_state_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="state folder: .* can be written"):
        JobStore(tmp_path / "file" / "state" / "jobs.sqlite3")


def test_a_second_owner_is_refused_until_the_first_closes(store, file):
    with pytest.raises(UserError, match="another K1 is at work there"):
        JobStore(file)
    store.close()
    JobStore(file).close()


def test_a_closed_store_says_so(store):
    store.close()
    store.close()
    with pytest.raises(K1Error, match="closing"):
        store.queue()

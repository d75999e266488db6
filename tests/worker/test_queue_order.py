"""The order of the queue, its pause, and jobs that are changed while they wait."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from kandinsky5.errors import UserError
from kandinsky5.worker.client import asked_for
from kandinsky5.worker.job_schema import MIGRATIONS
from kandinsky5.worker.jobs import JobStore


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "jobs.sqlite3"


@pytest.fixture
def store(file: Path):
    store = JobStore(file)
    yield store
    store.close()


def order(store: JobStore) -> list[str]:
    return [job.id for job in store.queue()]


def test_jobs_move_as_far_as_the_queue_goes_and_run_in_their_new_order(store):
    a, b, c, d = (store.add({"prompt": name}) for name in "abcd")
    assert store.move(d, -2)
    assert order(store) == [a, d, b, c]
    assert store.move(a, 99) and store.move(c, -99)
    assert order(store) == [c, d, b, a]
    assert [store.get(job).place for job in (c, d, b, a)] == [1, 2, 3, 4]
    assert store.claim_next().id == c
    assert not store.move(c, 1) and not store.move("nobody", 1)
    assert order(store) == [c, d, b, a]


def test_the_order_survives_a_restart_and_a_new_job_is_the_last(store, file):
    a, b = store.add({}), store.add({})
    store.move(b, -1)
    store.close()
    again = JobStore(file)
    c = again.add({})
    assert order(again) == [b, a, c]
    again.close()


def test_a_rewriting_of_a_prompt_is_not_moved_and_stays_first(store):
    a, b = store.add({}), store.add({})
    asked = store.add({}, kind="expand")
    store.move(b, -9)
    assert not store.move(asked, 1)
    assert order(store) == [asked, b, a]


def test_a_job_that_is_resumed_takes_the_place_that_it_was_moved_to(store):
    a, b, c = store.add({}), store.add({}), store.add({})
    store.move(c, -2)
    assert store.claim_next().id == c
    store.record_saved_state(c, "/x", step=1, saved_at=1.0)
    store.finish(c, "stopped")
    store.requeue(c)
    assert order(store) == [c, a, b]


def test_moves_of_many_threads_lose_no_job(store):
    ids = [store.add({}) for _ in range(6)]
    together = threading.Barrier(6)

    def shuffle(job_id: str) -> None:
        together.wait()
        for places in (-3, 2, -1, 4, -2):
            store.move(job_id, places)

    threads = [threading.Thread(target=shuffle, args=(job_id,)) for job_id in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(order(store)) == sorted(ids)


def test_while_it_is_paused_no_job_begins_even_after_a_restart(store, file):
    job = store.add({})
    store.set_paused(True)
    store.set_paused(True)
    assert store.is_paused() and store.claim_next() is None
    store.close()
    again = JobStore(file)
    assert again.is_paused() and again.claim_next() is None
    rewriting = again.add({}, kind="expand")
    assert again.claim_next().id == rewriting
    again.set_paused(False)
    assert not again.is_paused() and again.claim_next().id == job
    again.close()


def test_only_a_job_that_waits_and_has_nothing_saved_is_replaced(store):
    running, waiting, resumed = store.add({"n": 1}), store.add({"n": 2}), store.add({"n": 3})
    store.claim_next()
    store.finish(resumed, "stopped")
    store.record_saved_state(resumed, "/x", step=1, saved_at=1.0)
    store.requeue(resumed)
    for job_id in (running, resumed, "nobody"):
        assert not store.replace(job_id, {"n": 9})
    assert store.replace(waiting, {"n": 9}, notices=["snapped"], seed_drawn=True)
    job = store.get(waiting)
    assert (job.request, job.notices, job.seed_drawn, job.place) == (
        {"n": 9},
        ("snapped",),
        True,
        1,
    )
    assert [store.get(job_id).request["n"] for job_id in (running, resumed)] == [1, 3]


def test_every_file_that_a_job_made_is_known(store):
    job = store.add({})
    store.claim_next()
    store.record_saved_state(job, "/x", step=1, saved_at=1.0)
    store.finish(job, "done", result={"output": "early.mp4"})
    store.requeue(job)
    store.claim_next()
    store.finish(job, "done", result={"output": "whole.mp4"})
    assert store.get(job).outputs == ("early.mp4", "whole.mp4")
    assert store.get(job).output == "whole.mp4"


def test_an_early_result_of_a_former_version_stays_known(store, file):
    job = store.add({})
    store.finish(job, "done", result={"output": "early.mp4"})
    with sqlite3.connect(file) as other:
        other.execute("UPDATE jobs SET outputs = '[]'")
    other.close()
    store.record_saved_state(job, "/x", step=1, saved_at=1.0)
    store.requeue(job)
    store.finish(job, "done", result={"output": "whole.mp4"})
    assert store.get(job).outputs == ("early.mp4", "whole.mp4")


def test_a_store_of_the_former_version_keeps_its_order(file):
    file.parent.mkdir()
    with sqlite3.connect(file) as old:
        old.executescript(f"{''.join(MIGRATIONS[:3])} PRAGMA user_version = 3;")
        for name in "abc":
            old.execute(
                "INSERT INTO jobs (id, state, request, created_at) VALUES (?, 'queued', '{}', 1.0)",
                (name,),
            )
    old.close()
    store = JobStore(file)
    new = store.add({})
    store.move("c", -1)
    assert order(store) == ["a", "c", "b", new]
    assert not store.is_paused() and store.get("a").outputs == ()
    store.close()


def test_a_paused_client_begins_nothing_until_it_goes_on(studio, over, in_step_2, until, asking):
    client = studio.start()
    held = client.submit(asking("hold"))
    in_step_2(client, held)
    client.set_paused(True)
    waiting = client.submit(asking())
    assert client.status(held).state == "running"
    client.stop(held)
    over(client, held)
    assert client.status(waiting).state == "queued"
    client.close()
    again = studio.start()
    until(again.worker_pid)
    assert again.is_paused() and again.status(waiting).state == "queued"
    again.set_paused(False)
    assert over(again, waiting).state == "done"


def test_a_duplicate_asks_for_the_same_and_draws_a_drawn_seed_anew(studio, asking):
    client = studio.open()
    drawn, chosen = client.submit(asking(steps=3)), client.submit(asking(seed=7))
    copies = [client.status(client.duplicate(job_id, token=job_id)) for job_id in (drawn, chosen)]
    assert client.duplicate(chosen, token=chosen) == copies[1].id
    assert copies[0].request["steps"] == 3 and copies[0].seed_drawn
    assert copies[0].request["seed"] != client.status(drawn).request["seed"]
    assert copies[1].request == client.status(chosen).request and not copies[1].seed_drawn
    assert asked_for(client.status(drawn)).seed is None
    assert [job.id for job in client.queue()] == [drawn, chosen, copies[0].id, copies[1].id]


def test_a_replaced_job_is_settled_like_a_new_one(studio, asking):
    client = studio.open()
    job_id = client.submit(asking("first", seed=3))
    assert client.replace(job_id, asking("second", width=70))
    job = client.status(job_id)
    assert job.request["prompt"] == "second" and job.seed_drawn
    assert 0 <= job.request["seed"] < 2**31 and any("70" in notice for notice in job.notices)
    with pytest.raises(UserError, match="needs an input image"):
        client.replace(job_id, asking(preset="demo-i2v"))
    with pytest.raises(KeyError):
        client.replace("nobody", asking())
    assert client.status(job_id).request["prompt"] == "second"

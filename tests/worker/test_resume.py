"""Jobs that ended early go on from what was saved; previews of a run are kept and found."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from kandinsky5.errors import UserError
from kandinsky5.worker.job_schema import MIGRATIONS
from kandinsky5.worker.jobs import JobStore
from kandinsky5.worker.run_files import (
    KEPT_PREVIEW_FOLDERS,
    MAX_PREVIEWS,
    PreviewFolder,
    RunFiles,
)


def test_a_stop_that_saves_leaves_a_job_that_can_go_on_to_its_end(
    studio, in_step_2, over, asking
) -> None:
    client = studio.start()
    job_id = client.submit(asking("hold"))
    in_step_2(client, job_id)
    client.stop(job_id, "save")
    stopped = over(client, job_id)
    assert (stopped.state, stopped.is_resumable) == ("stopped", True)
    assert stopped.saved_step == stopped.step >= 1
    assert Path(stopped.saved_state).is_relative_to(studio.state_dir)
    client.resume(job_id)
    done = over(client, job_id)
    assert done.state == "done" and Path(done.output).exists()
    assert f"resumed after step {stopped.saved_step}" in done.notices
    assert done.previews == (1, 2, 3)
    assert not done.is_resumable and not Path(stopped.saved_state).exists()


def test_a_stop_that_discards_leaves_nothing_to_go_on_from(studio, in_step_2, over, asking) -> None:
    client = studio.start()
    job_id = client.submit(asking("save and hold"))
    saved = in_step_2(client, job_id)
    client.stop(job_id, "discard")
    job = over(client, job_id)
    assert (job.state, job.is_resumable) == ("stopped", False)
    assert list((studio.state_dir / "states").glob("*/*")) == []
    with pytest.raises(UserError, match="no saved state"):
        client.resume(job_id)
    assert saved.previews in ((), (1,))


def test_a_crashed_worker_s_job_goes_on_from_its_last_saved_step(studio, over, asking) -> None:
    client = studio.start()
    job_id = client.submit(asking("save and leave"))
    job = over(client, job_id)
    assert (job.state, job.saved_step) == ("interrupted", 1)
    assert job.message.endswith("; resume it from step 1")
    client.resume(job_id)
    done = over(client, job_id)
    assert done.state == "done" and "resumed after step 1" in done.notices


def test_closing_the_studio_saves_the_running_job_for_the_next_start(
    studio, in_step_2, over, asking
) -> None:
    first = studio.start()
    job_id = first.submit(asking("hold"))
    in_step_2(first, job_id)
    first.close()
    client = studio.start()
    job = client.status(job_id)
    assert job.state == "interrupted" and job.saved_step == job.step >= 1
    way_on = f"resume it from step {job.saved_step}"
    assert job.message == f"the studio was closed during this job; {way_on}"
    client.resume(job_id)
    assert over(client, job_id).state == "done"


def test_what_cannot_be_resumed_is_said(studio, over, asking) -> None:
    client = studio.start()
    done = over(client, client.submit(asking()))
    with pytest.raises(UserError, match="it is done"):
        client.resume(done.id)
    with pytest.raises(KeyError):
        client.resume("nobody")
    job = over(client, client.submit(asking("save and leave")))
    Path(job.saved_state).unlink()
    with pytest.raises(UserError, match="is gone: start it again"):
        client.resume(job.id)
    assert client.status(job.id).state == "interrupted"


def test_a_double_click_on_resume_queues_once(studio, in_step_2, over, asking) -> None:
    client = studio.start()
    waiting = over(client, client.submit(asking("save and leave")))
    blocker = client.submit(asking("hold"))
    in_step_2(client, blocker)
    client.resume(waiting.id)
    with pytest.raises(UserError, match="it is queued"):
        client.resume(waiting.id)
    assert [job.id for job in client.queue()] == [blocker, waiting.id]
    client.stop(waiting.id)
    assert client.status(waiting.id).state == "stopped"
    assert not client.status(waiting.id).is_resumable


def test_what_was_saved_can_be_dropped_later(studio, over, asking) -> None:
    client = studio.start()
    job = over(client, client.submit(asking("save and leave")))
    client.discard(job.id)
    assert not client.status(job.id).is_resumable and not Path(job.saved_state).exists()
    client.discard(job.id)
    with pytest.raises(KeyError):
        client.discard("nobody")


def test_previews_of_a_run_are_kept_and_found(studio, in_step_2, until, over, asking) -> None:
    client = studio.start()
    job_id = client.submit(asking("hold"))
    in_step_2(client, job_id)
    until(lambda: client.status(job_id).previews == (1,))
    assert client.preview_path(job_id, 1).read_bytes() == b"picture 1"
    assert client.preview_path(job_id, 2) is None
    client.stop(job_id)
    job = over(client, job_id)
    assert job.previews[0] == 1
    assert client.preview_path(job_id, job.previews[-1]) is not None
    with pytest.raises(KeyError):
        client.preview_path("nobody", 1)


def test_a_former_version_s_store_is_brought_up_to_date_with_its_jobs(tmp_path) -> None:
    file = tmp_path / "jobs.sqlite3"
    with sqlite3.connect(file) as old:
        old.executescript(f"{MIGRATIONS[0]} PRAGMA user_version = 1;")
        columns = "id, state, request, created_at, finished_at"
        old.execute(f"INSERT INTO jobs ({columns}) VALUES ('a', 'failed', '{{}}', 1.0, 2.0)")
        old.execute(f"INSERT INTO jobs ({columns}) VALUES ('b', 'queued', '{{}}', 1.0, NULL)")
    old.close()
    store = JobStore(file)
    assert (store.get("a").state, store.get("b").place) == ("failed", 1)
    assert store.get("a").previews == () and not store.get("a").is_resumable
    store.record_saved_state("a", "/x", step=3, saved_at=5.0)
    assert store.requeue("a") and not store.requeue("a")
    claimed = store.claim_next()
    assert claimed is not None and (claimed.id, claimed.resume_from) == ("a", "/x")
    store.close()


def test_a_migration_that_fails_changes_nothing(tmp_path, monkeypatch) -> None:
    from kandinsky5.worker import job_schema

    file = tmp_path / "jobs.sqlite3"
    JobStore(file).close()
    broken = (*MIGRATIONS, "ALTER TABLE jobs ADD COLUMN extra TEXT; ALTER TABLE nothing ADD x;")
    monkeypatch.setattr(job_schema, "MIGRATIONS", broken)
    monkeypatch.setattr(job_schema, "SCHEMA_VERSION", len(broken))
    with pytest.raises(UserError, match="not a usable job store"):
        JobStore(file)
    monkeypatch.undo()
    store = JobStore(file)
    assert store.get(store.add({})).state == "queued"
    store.close()


def test_a_run_s_previews_are_bounded_and_whole(tmp_path) -> None:
    folder = PreviewFolder(tmp_path / "job")
    for step in range(1, MAX_PREVIEWS + 6):
        folder.write(step, b"picture")
    names = sorted(path.name for path in (tmp_path / "job").iterdir())
    assert len(names) == MAX_PREVIEWS and names[0] == "00006.webp"


def test_previews_of_the_jobs_that_ran_last_are_kept(tmp_path) -> None:
    files = RunFiles(tmp_path)
    for number in range(KEPT_PREVIEW_FOLDERS + 5):
        files.begin(f"job{number}")
        PreviewFolder(files.previews_dir(f"job{number}")).write(1, b"picture")
    assert len(list((tmp_path / "previews").iterdir())) == KEPT_PREVIEW_FOLDERS


@pytest.mark.parametrize("job_id", ["", "..", "../jobs", "a/b", "a" * 65, "a\0", "a.b"])
def test_no_path_is_made_of_what_is_no_job_s_id(tmp_path, job_id) -> None:
    files = RunFiles(tmp_path)
    for make in (files.previews_dir, files.states_dir):
        with pytest.raises(ValueError):
            make(job_id)

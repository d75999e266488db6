from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kandinsky5.errors import K1Error, UserError
from kandinsky5.request import GenerationRequest
from kandinsky5.worker.client import output_path

REPOSITORY = Path(__file__).parents[2]


def test_a_job_runs_to_its_file(studio, over, asking):
    client = studio.start()
    job = over(client, client.submit(asking(seed=7)))
    assert job.state == "done" and job.message is None
    assert (job.stage, job.step, job.total, job.place) == ("save", 3, 3, -1)
    assert job.result["seed"] == 7 and job.result["output"] == job.output
    assert Path(job.output).read_bytes() == b"a video"
    assert Path(job.output).parent == studio.out_dir
    assert re.fullmatch(r"\d{8}-\d{6}_demo-t2v_7\.mp4", Path(job.output).name)
    assert job.created_at <= job.started_at <= job.finished_at
    assert client.history() == (job,)


def test_a_running_job_shows_stage_step_and_eta(studio, in_step_2, asking):
    client = studio.start()
    job_id = client.submit(asking("hold"))
    job = in_step_2(client, job_id)
    assert (job.state, job.stage, job.step, job.total, job.place) == ("running", "denoise", 1, 3, 0)
    assert (job.seconds_per_step, job.eta_s) == (0.5, 1.0)
    assert (job.h2d_bytes, job.stall_s, job.is_stopping) == (1000, 0.25, False)
    assert job.expanded_prompt == "hold, in detail"
    assert client.queue() == (job,)


def test_a_job_that_was_told_to_stop_says_so_until_it_is_over(studio, over, in_step_2, asking):
    client = studio.start(stop_grace_s=0.5)
    job_id = client.submit(asking("deaf"))
    in_step_2(client, job_id)
    client.stop(job_id)
    assert client.status(job_id).is_stopping
    assert not over(client, job_id).is_stopping


def test_the_second_job_runs_in_the_same_warm_worker(studio, over, pid_of, asking):
    client = studio.start()
    first = over(client, client.submit(asking()))
    second = over(client, client.submit(asking()))
    assert pid_of(first) == pid_of(second) == client.worker_pid()
    assert "run 1" in first.notices and "run 2" in second.notices
    assert [job.id for job in client.history()] == [second.id, first.id]
    assert client.history(limit=1, offset=1) == (first,)


def test_the_worker_is_started_before_the_first_job(studio, until):
    client = studio.start()
    assert until(client.worker_pid)


def test_a_running_job_stops_within_its_step(studio, over, in_step_2, asking):
    client = studio.start()
    job_id = client.submit(asking("hold"))
    in_step_2(client, job_id)
    client.stop(job_id)
    job = over(client, job_id)
    assert (job.state, job.output) == ("stopped", None)
    assert job.step in (1, 2)  # 1 when it heard of the stop before its second step began
    assert list(studio.out_dir.iterdir()) == []


def test_the_worker_that_stopped_a_job_runs_the_next(studio, over, in_step_2, pid_of, asking):
    client = studio.start()
    held = client.submit(asking("hold"))
    in_step_2(client, held)
    client.stop(held)
    assert pid_of(over(client, held)) == pid_of(over(client, client.submit(asking())))


def test_a_queued_job_stops_at_once_and_never_runs(studio, in_step_2, asking):
    client = studio.start()
    held, waiting = client.submit(asking("hold")), client.submit(asking())
    in_step_2(client, held)
    client.stop(waiting)
    assert client.status(waiting).state == "stopped"
    assert client.status(waiting).started_at is None
    assert [job.id for job in client.queue()] == [held]


def test_a_worker_deaf_to_a_stop_is_ended(studio, over, in_step_2, is_gone, pid_of, asking):
    client = studio.start(stop_grace_s=0.05)
    deaf = client.submit(asking("deaf"))
    pid = pid_of(in_step_2(client, deaf))
    client.stop(deaf)
    job = over(client, deaf)
    assert job.state == "stopped" and "did not answer" in job.message
    assert is_gone(pid)
    assert over(client, client.submit(asking())).state == "done"


def test_stopping_a_job_that_is_over_changes_nothing(studio, over, asking):
    client = studio.start()
    job = over(client, client.submit(asking()))
    client.stop(job.id)
    assert client.status(job.id) == job


def test_unknown_jobs_and_modes_are_refused(studio, asking):
    client = studio.open()
    with pytest.raises(KeyError):
        client.status("nonsense")
    with pytest.raises(KeyError):
        client.stop("nonsense")
    with pytest.raises(UserError, match="mode: got 'explode'; one of discard"):
        client.stop(client.submit(asking()), mode="explode")


def test_one_token_from_two_threads_is_one_job(studio, asking):
    client = studio.open()
    together = threading.Barrier(8)
    ids: list[str] = []

    def press() -> None:
        together.wait()
        ids.append(client.submit(asking(), token="a press"))

    threads = [threading.Thread(target=press) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8 and len(set(ids)) == 1
    assert len(client.queue()) == 1


def test_two_tabs_make_two_jobs_and_the_second_shows_its_place(studio, in_step_2, asking):
    client = studio.start()
    first = client.submit(asking("hold"), token="tab 1")
    in_step_2(client, first)
    second = client.submit(asking(), token="tab 2")
    third = client.submit(asking(), token="tab 3")
    assert [(job.id, job.place) for job in client.queue()] == [(first, 0), (second, 1), (third, 2)]
    assert client.status(third).place == 2
    client.stop(second)
    assert client.status(third).place == 1


def test_a_seed_is_drawn_once_for_record_and_result(studio, over, asking):
    client = studio.start()
    job = over(client, client.submit(asking(seed=None)))
    assert 0 <= job.request["seed"] < 2**31
    assert job.result["seed"] == job.request["seed"]
    assert f"_{job.request['seed']}.mp4" in job.output


def test_the_client_s_device_replaces_auto_only(studio, over, asking):
    client = studio.start(device="cuda:1")
    auto = over(client, client.submit(asking()))
    chosen = over(client, client.submit(asking(device="cpu")))
    assert "device cuda:1" in auto.notices and "device cpu" in chosen.notices


def test_snapped_sizes_are_noticed_from_the_queue_on(studio, asking):
    client = studio.open()
    job = client.status(client.submit(asking(width=70)))
    assert any("70" in notice for notice in job.notices)


def test_a_request_that_cannot_run_is_refused_at_once(studio):
    client = studio.open()
    with pytest.raises(UserError, match="needs an input image"):
        client.submit(GenerationRequest(preset="demo-i2v", prompt="move"))
    assert client.queue() == ()


def test_an_output_folder_that_cannot_be_written_is_refused_at_once(studio, tmp_path, asking):
    (tmp_path / "file").write_text("in the way")
    client = studio.open(out_dir=tmp_path / "file" / "outputs")
    with pytest.raises(UserError, match="output folder: .* can be written .*--outdir"):
        client.submit(asking())
    assert client.queue() == ()


def test_a_refusal_of_the_pipeline_is_one_line(studio, over, asking):
    client = studio.start()
    job = over(client, client.submit(asking("refuse")))
    assert (job.state, job.message) == ("failed", "image: got 'cat.png'; a picture")


def test_an_unexpected_error_is_one_line_and_its_traceback_is_in_the_log(studio, over, asking):
    client = studio.start()
    job = over(client, client.submit(asking("explode")))
    assert job.state == "failed"
    assert job.message.startswith(
        "unexpected error: ValueError: the first line the second line; see the log"
    )
    assert "Traceback" not in job.message and "\n" not in job.message
    text = (studio.state_dir / "worker.log").read_text()
    assert "Traceback" in text and "fake_pipeline.py" in text
    assert over(client, client.submit(asking())).state == "done"


def test_a_pipeline_that_cannot_be_built_fails_the_job_not_the_page(studio, over, asking):
    client = studio.start(pipeline="fake_pipeline:UnbuildablePipeline")
    job = over(client, client.submit(asking()))
    assert job.state == "failed"
    assert job.message.startswith("unexpected error: ImportError: no engine here")


def test_a_killed_worker_interrupts_its_job_and_the_next_gets_a_new_one(
    studio, over, in_step_2, pid_of, asking
):
    client = studio.start()
    held, queued = client.submit(asking("hold")), client.submit(asking())
    pid = pid_of(in_step_2(client, held))
    os.kill(pid, signal.SIGKILL)
    job = over(client, held)
    assert job.state == "interrupted"
    assert job.message == "worker was killed, probably for want of RAM"
    assert (job.stage, job.step) == ("denoise", 1)
    following = over(client, queued)
    assert following.state == "done" and pid_of(following) != pid


@pytest.mark.parametrize(("task", "cause"), [("crash", "SIGSEGV"), ("leave", "exit code 7")])
def test_a_crashed_worker_is_told_from_a_killed_one(studio, over, asking, task, cause):
    client = studio.start()
    job = over(client, client.submit(asking(task)))
    assert job.state == "interrupted" and cause in job.message and "see the log" in job.message


@pytest.mark.parametrize("name", ["SIGBUS", "SIGSEGV", "SIGABRT"])
def test_a_worker_that_dies_of_a_file_names_it(studio, over, asking, name):
    client = studio.start()
    job = over(client, client.submit(asking(f"read /models/dit.safetensors and {name}")))
    assert job.state == "interrupted"  # fault 4
    assert f"signal {name}" in job.message and "see the log" in job.message
    assert "it was reading /models/dit.safetensors: that file may be damaged" in job.message
    assert over(client, client.submit(asking())).state == "done"


def test_a_file_that_was_read_is_not_blamed_for_a_later_crash(studio, over, asking):
    client = studio.start()
    job = over(client, client.submit(asking("read /models/dit.safetensors, then SIGSEGV")))
    assert "SIGSEGV" in job.message and "dit.safetensors" not in job.message


def test_the_stack_of_a_crash_is_in_the_log(studio, over, asking):
    client = studio.start()
    over(client, client.submit(asking("crash")))
    assert "fake_pipeline.py" in (studio.state_dir / "worker.log").read_text()


def test_an_idle_worker_that_dies_is_replaced_at_the_next_job(studio, over, until, asking):
    client = studio.start()
    pid = until(client.worker_pid)
    over(client, client.submit(asking()))
    os.kill(pid, signal.SIGKILL)
    until(lambda: client.worker_pid() is None)
    assert over(client, client.submit(asking())).state == "done"


def test_closing_ends_the_worker_and_interrupts_the_job(studio, in_step_2, is_gone, pid_of, asking):
    client = studio.start()
    held, queued = client.submit(asking("hold")), client.submit(asking())
    pid = pid_of(in_step_2(client, held))
    client.close()
    client.close()
    assert is_gone(pid)
    after = studio.open()
    assert after.status(held).state == "interrupted"
    assert "closed during this job" in after.status(held).message
    assert after.status(queued).state == "queued"


def test_closing_ends_even_a_deaf_worker(studio, in_step_2, is_gone, pid_of, asking):
    client = studio.start()
    deaf = client.submit(asking("deaf"))
    pid = pid_of(in_step_2(client, deaf))
    client.close(timeout_s=0.5)
    assert is_gone(pid)
    assert studio.open().status(deaf).state == "interrupted"


def test_closing_twice_or_unstarted_is_fine_and_then_says_so(studio, asking):
    client = studio.open()
    client.close()
    client.close()
    with pytest.raises(K1Error, match="closing"):
        client.submit(asking())


def test_queued_jobs_go_on_after_a_restart(studio, over, asking):
    before = studio.open()
    first, second = before.submit(asking()), before.submit(asking())
    before.close()
    client = studio.start()
    assert over(client, second).state == over(client, first).state == "done"
    assert [job.id for job in client.history()] == [second, first]


def test_file_names_are_never_taken_twice(tmp_path, asking):
    moment = time.strptime("2026-11-21 10:20:30", "%Y-%m-%d %H:%M:%S")
    video, picture = asking(seed=5), asking(seed=5, preset="image-t2i")
    first = output_path(tmp_path, video, moment)
    assert first.name == "20261121-102030_demo-t2v_5.mp4"
    first.touch()
    assert output_path(tmp_path, video, moment).name == "20261121-102030_demo-t2v_5_2.mp4"
    assert output_path(tmp_path, picture, moment).name == "20261121-102030_image-t2i_5.png"


@pytest.mark.parametrize("module", ["client", "jobs", "protocol", "handle", "pump"])
def test_the_page_s_side_imports_nothing_heavy(module):
    script = f"import sys, kandinsky5.worker.{module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"torch", "numpy", "transformers", "PIL", "gradio", "kandinsky5.worker.process"}
    assert heavy.isdisjoint(loaded)

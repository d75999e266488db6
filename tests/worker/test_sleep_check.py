"""The machine sleeps during a job: the worker is asked whether it is there, and the job is never lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kandinsky5.worker import sleep_check
from kandinsky5.worker.sleep_check import SleepCheck, suspended_s

HOUR_S = 3600.0
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")


@pytest.fixture
def sleep(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``sleep(s)``: the machine was asleep for so long; it is looked at all the time, patience is short."""
    asleep_s = [100.0]
    monkeypatch.setattr(sleep_check, "suspended_s", lambda: asleep_s[0])
    monkeypatch.setattr(sleep_check, "LOOK_EVERY_S", 0.02)

    def slept(seconds: float) -> None:
        asleep_s[0] += seconds

    return slept


@pytest.fixture
def hold(until) -> Callable[[int], None]:
    """``hold(pid)``: stops a process, and comes back when all its threads stand still."""

    def stop(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        until(lambda: all(state_of(task) == "T" for task in tasks))

    return stop


def state_of(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def waiting(studio, tmp_path, in_step_2, pid_of, asking, sleep) -> tuple[Any, str, int, Path]:
    """A job that holds in step 2 until a file is there: the client, its id, its worker's pid, that file."""
    client, go = studio.start(), tmp_path / "go"
    job_id = client.submit(asking(f"wait for:{go}"))
    return client, job_id, pid_of(in_step_2(client, job_id)), go


def test_a_job_goes_on_after_the_machine_slept(waiting, until, over, sleep) -> None:
    client, job_id, pid, go = waiting
    sleep(HOUR_S)
    notice = "the machine slept for 60 min; the job goes on"
    until(lambda: notice in client.status(job_id).notices)
    go.touch()
    job = over(client, job_id)
    assert job.state == "done" and client.worker_pid() == pid  # fault 29


def test_a_worker_that_wakes_late_is_waited_for(waiting, until, over, hold, sleep) -> None:
    client, job_id, pid, go = waiting
    hold(pid)
    sleep(HOUR_S)
    time.sleep(0.5)
    assert client.status(job_id).state == "running" and not client.status(job_id).is_stopping
    os.kill(pid, signal.SIGCONT)
    until(lambda: any("machine slept" in text for text in client.status(job_id).notices))
    go.touch()
    assert over(client, job_id).state == "done"


def test_a_worker_that_does_not_wake_costs_no_more_than_the_steps_since_the_last_state(
    studio, in_step_2, until, over, asking, pid_of, is_gone, hold, sleep, monkeypatch
) -> None:
    monkeypatch.setattr(sleep_check, "ANSWER_WITHIN_S", 0.3)
    client = studio.start()
    job_id, queued = client.submit(asking("save and hold")), client.submit(asking())
    pid = pid_of(in_step_2(client, job_id))
    until(lambda: client.status(job_id).saved_step == 1)
    hold(pid)
    sleep(HOUR_S)
    job = over(client, job_id)
    assert job.state == "interrupted" and job.is_resumable
    assert job.message == f"{sleep_check.NO_ANSWER}; resume it from step 1"
    assert is_gone(pid) and over(client, queued).state == "done"
    client.resume(job_id)
    assert over(client, job_id).state == "done"


def test_a_worker_that_is_held_up_while_the_machine_is_awake_is_left_alone(
    waiting, over, hold, sleep, monkeypatch
) -> None:
    monkeypatch.setattr(sleep_check, "ANSWER_WITHIN_S", 0.1)
    client, job_id, pid, go = waiting
    hold(pid)
    sleep(sleep_check.MIN_SLEEP_S / 2)  # a clock that was set a little
    time.sleep(0.5)
    os.kill(pid, signal.SIGCONT)
    go.touch()
    job = over(client, job_id)
    assert job.state == "done" and not [text for text in job.notices if "slept" in text]


def test_what_the_machine_did_before_the_job_does_not_concern_it(sleep) -> None:
    asked: list[str] = []
    check = SleepCheck()
    sleep(HOUR_S)
    check.begin()
    assert not check.is_overdue(lambda: asked.append("ping")) and asked == []
    sleep(HOUR_S)
    assert not check.is_overdue(lambda: asked.append("ping")) and asked == ["ping"]
    assert not check.is_overdue(lambda: asked.append("ping")) and asked == ["ping"]
    assert "60 min" in check.answered()


def test_a_wall_clock_that_jumps_is_no_sleep_where_the_system_counts_sleep_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not hasattr(time, "CLOCK_BOOTTIME"):
        pytest.skip("this system does not count it")
    before_s = suspended_s()
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 10 * HOUR_S)
    assert abs(suspended_s() - before_s) < 1.0

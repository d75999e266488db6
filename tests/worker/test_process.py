from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kandinsky5.events import Notice, PromptExpanded, StageStarted, StepDone
from kandinsky5.worker.process import MAX_MESSAGE_CHARACTERS, Worker, one_line
from kandinsky5.worker.protocol import (
    JobEvent,
    JobFailed,
    JobFinished,
    JobStarted,
    JobStopped,
    RunJob,
    Shutdown,
    StopJob,
    WorkerReady,
    WorkerSettings,
)

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PATIENCE_S = 60.0

PARENT = """
import sys, time
from pathlib import Path
from kandinsky5.request import GenerationRequest
from kandinsky5.worker.client import WorkerClient

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    client = WorkerClient(state_dir=folder / "state", out_dir=folder / "out",
                          pipeline="fake_pipeline:FakePipeline")
    client.start()
    job = client.submit(GenerationRequest(prompt=sys.argv[2]))
    while client.status(job).step < 1:
        time.sleep(0.005)
    print(client.worker_pid(), job, flush=True)
    if sys.argv[3] == "stay":
        sys.stdin.read()
"""


@pytest.fixture
def conversation(tmp_path, monkeypatch):
    """A worker on a thread of this process: send it commands, hear its events."""
    monkeypatch.syspath_prepend(str(HERE))
    ours, theirs = multiprocessing.Pipe()
    settings = WorkerSettings(
        log_file=str(tmp_path / "worker.log"),
        parent_pid=os.getpid(),
        pipeline="fake_pipeline:FakePipeline",
    )
    orphaned = threading.Event()
    worker = Worker(theirs, settings, when_orphaned=orphaned.set)
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    yield Conversation(ours, tmp_path, orphaned)
    if not ours.closed:
        ours.send(Shutdown())
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@pytest.fixture
def program(tmp_path):
    """Starts a program of its own with a client; it says its worker's pid and job once a step is done."""
    started: list[subprocess.Popen[str]] = []

    def start(prompt: str, then: str) -> subprocess.Popen[str]:
        script = tmp_path / "parent.py"
        script.write_text(PARENT)
        started.append(
            subprocess.Popen(
                [sys.executable, str(script), str(tmp_path), prompt, then],
                env={**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{HERE}"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


class Conversation:
    def __init__(self, connection, folder: Path, orphaned: threading.Event) -> None:
        self.connection, self.folder, self.orphaned = connection, folder, orphaned

    def run(self, job_id: str, prompt: str, **values) -> None:
        request = {"prompt": prompt, "seed": 1, **values}
        self.connection.send(RunJob(job_id, request, str(self.folder / f"{job_id}.mp4")))

    def hear(self):
        assert self.connection.poll(PATIENCE_S), "the worker is silent"
        return self.connection.recv()

    def hear_until(self, kind: type) -> list:
        events = [self.hear()]
        while not isinstance(events[-1], kind):
            events.append(self.hear())
        return events


def step_done(step: int) -> StepDone:
    """What the fake pipeline says after a step of three."""
    return StepDone(step, 3, 0.5, 0.5 * (3 - step), h2d_bytes=1000 * step, stall_s=0.25)


def test_events_come_in_the_order_they_happened(conversation):
    conversation.run("a", "finish")
    events = conversation.hear_until(JobFinished)
    assert isinstance(events[0], WorkerReady) and events[1] == JobStarted("a")
    said = [event.event for event in events if isinstance(event, JobEvent)]
    assert [event for event in said if not isinstance(event, Notice)] == [
        StageStarted("load"),
        PromptExpanded("finish, in detail", done=True),
        StageStarted("denoise"),
        *map(step_done, (1, 2, 3)),
        StageStarted("save"),
    ]
    assert events[-1].result["output"] == str(conversation.folder / "a.mp4")


def test_a_stop_during_a_step_ends_the_job_before_the_next(conversation):
    conversation.run("a", "hold")
    while conversation.hear() != JobEvent("a", step_done(1)):
        pass
    conversation.connection.send(StopJob("a"))
    rest = conversation.hear_until(JobStopped)
    assert rest == [JobEvent("a", step_done(2)), JobStopped("a")]


def test_a_stop_for_one_job_leaves_the_next_alone(conversation):
    conversation.run("a", "hold")
    conversation.run("b", "finish")
    conversation.connection.send(StopJob("a"))
    conversation.hear_until(JobStopped)
    assert conversation.hear_until(JobFinished)[-1].job_id == "b"


def test_a_stop_before_its_turn_keeps_a_job_from_running(conversation):
    conversation.run("a", "hold")
    conversation.run("b", "finish")
    conversation.connection.send(StopJob("b"))
    conversation.connection.send(StopJob("a"))
    conversation.hear_until(JobStopped)
    assert conversation.hear_until(JobStopped) == [JobStarted("b"), JobStopped("b")]
    assert not (conversation.folder / "b.mp4").exists()


def test_a_request_it_cannot_read_fails_with_the_exit_code_of_bad_input(conversation):
    conversation.run("a", "finish", colour="red")
    failure = conversation.hear_until(JobFailed)[-1]
    assert failure.exit_code == 2 and "'colour'" in failure.message


def test_the_end_of_the_connection_is_noticed(conversation):
    assert not conversation.orphaned.is_set()
    conversation.connection.close()
    assert conversation.orphaned.wait(PATIENCE_S)


def test_messages_are_one_line_and_of_bounded_length():
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("x" * 10_000) == "x" * MAX_MESSAGE_CHARACTERS + "…"


@pytest.mark.parametrize("task", ["hold", "deaf"])
def test_the_worker_dies_with_a_killed_parent(program, until, is_gone, task):
    parent = program(task, "stay")
    pid = int(parent.stdout.readline().split()[0])
    assert not is_gone(pid)
    parent.kill()
    parent.wait(PATIENCE_S)
    until(lambda: is_gone(pid))


def test_a_killed_program_s_jobs_are_found_again(program, studio):
    parent = program("hold", "stay")
    job_id = parent.stdout.readline().split()[1]
    parent.kill()
    parent.wait(PATIENCE_S)
    job = studio.open().status(job_id)
    assert job.state == "interrupted" and "start it again" in job.message


def test_a_program_that_merely_ends_leaves_no_worker(program, studio, is_gone):
    parent = program("hold", "end")
    pid, job_id = parent.stdout.readline().split()
    assert parent.wait(PATIENCE_S) == 0
    assert is_gone(int(pid))
    assert studio.open().status(job_id).state == "interrupted"


def test_ctrl_c_does_not_reach_the_worker(program, is_gone):
    parent = program("hold", "stay")
    pid = int(parent.stdout.readline().split()[0])
    os.kill(pid, signal.SIGINT)
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = int(status.split("SigIgn:")[1].split()[0], 16)
    assert ignored & 1 << (signal.SIGINT - 1)
    assert os.getpgid(pid) == pid and not is_gone(pid)

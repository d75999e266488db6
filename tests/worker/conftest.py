"""A client whose worker runs the fake pipeline, and a way to await what happens in other processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kandinsky5.request import GenerationRequest
from kandinsky5.worker.client import JobSnapshot, WorkerClient

PATIENCE_S = 60.0
FAKE_PIPELINE = "fake_pipeline:FakePipeline"


class Studio:
    """Clients on one state folder, one after another, and questions about their jobs."""

    def __init__(self, folder: Path) -> None:
        self.state_dir = folder / "state"
        self.out_dir = folder / "outputs"
        self._clients: list[WorkerClient] = []

    def open(self, **options: Any) -> WorkerClient:
        """A client; it is not started."""
        options = {"pipeline": FAKE_PIPELINE, "out_dir": self.out_dir, **options}
        client = WorkerClient(state_dir=self.state_dir, **options)
        self._clients.append(client)
        return client

    def start(self, **options: Any) -> WorkerClient:
        client = self.open(**options)
        client.start()
        return client

    def close(self) -> None:
        for client in self._clients:
            client.close()


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    studio = Studio(tmp_path)
    yield studio
    studio.close()


@pytest.fixture
def until() -> Callable[[Callable[[], Any]], Any]:
    """Awaits a condition and gives its value."""

    def wait(condition: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
        deadline = time.monotonic() + patience_s
        while not (value := condition()):
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.005)
        return value

    return wait


@pytest.fixture
def over(until: Callable[[Callable[[], Any]], Any]) -> Callable[[WorkerClient, str], JobSnapshot]:
    """Awaits the end of a job and gives it."""

    def wait(client: WorkerClient, job_id: str) -> JobSnapshot:
        until(lambda: client.status(job_id).place == -1)
        return client.status(job_id)

    return wait


@pytest.fixture
def in_step_2(
    until: Callable[[Callable[[], Any]], Any],
) -> Callable[[WorkerClient, str], JobSnapshot]:
    """Awaits that a held job has done its first step."""

    def wait(client: WorkerClient, job_id: str) -> JobSnapshot:
        until(lambda: client.status(job_id).step == 1 or client.status(job_id).place == -1)
        job = client.status(job_id)
        assert job.place != -1, job.message
        return job

    return wait


@pytest.fixture
def pid_of() -> Callable[[JobSnapshot], int]:
    """The process that ran a job."""

    def find(job: JobSnapshot) -> int:
        (notice,) = [text for text in job.notices if text.startswith("pid ")]
        return int(notice.removeprefix("pid "))

    return find


@pytest.fixture
def is_gone() -> Callable[[int], bool]:
    """Whether no process has this id."""

    def check(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"

    return check


@pytest.fixture
def asking() -> Callable[..., GenerationRequest]:
    """A request for the demo with this prompt."""

    def make(prompt: str = "finish", **values: Any) -> GenerationRequest:
        return GenerationRequest(prompt=prompt, **values)

    return make

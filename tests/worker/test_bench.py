"""The warm-start benchmark: what it times are the events of two jobs in one worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from kandinsky5.benches import BENCHES
from kandinsky5.errors import K1Error, UserError
from kandinsky5.worker import bench

MOMENTS = ["started", "denoise", "first_step", "finished"]


@pytest.fixture(autouse=True)
def fake_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_both_jobs_tell_their_moments_in_order() -> None:
    document = bench.warm_start(pipeline="fake_pipeline:FakePipeline")
    assert document["benchmark"] == "warm-start"
    assert document["ready_s"] > 0
    for name in ("first", "second"):
        moments = document[name]
        assert list(moments) == MOMENTS
        assert list(moments.values()) == sorted(moments.values())
        assert moments["started"] >= 0
    assert document["reached"] == (document["second"]["denoise"] <= document["target_s"])


def test_a_job_that_fails_ends_the_benchmark_with_its_line(monkeypatch) -> None:
    monkeypatch.setattr(bench, "PROMPTS", ("refuse", "refuse"))
    with pytest.raises(K1Error, match="a picture"):
        bench.warm_start(pipeline="fake_pipeline:FakePipeline")


def test_a_worker_that_dies_ends_the_benchmark_with_the_cause(monkeypatch) -> None:
    monkeypatch.setattr(bench, "PROMPTS", ("leave", "leave"))
    with pytest.raises(K1Error, match=r"exit code 7"):
        bench.warm_start(pipeline="fake_pipeline:FakePipeline")


def test_bad_options_start_no_worker(monkeypatch) -> None:
    monkeypatch.setattr(bench, "WorkerHandle", lambda settings: pytest.fail("a worker started"))
    for options in ({"preset": "demo"}, {"steps": 0}):
        with pytest.raises(UserError):
            bench.warm_start(**options)


def test_it_can_be_run_by_name() -> None:
    row = BENCHES["warm-start"]
    assert row.target == "kandinsky5.worker.bench:warm_start"
    assert {option.keyword for option in row.options} == {"preset", "steps"}

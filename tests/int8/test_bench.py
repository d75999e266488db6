"""The timing bench: nothing wrong is timed, and a machine without a GPU is told so."""

from __future__ import annotations

import pytest
import torch

from int8.bench import check, int8_bench
from int8.timing import gpu_seconds


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotImplementedError, match="needs a CUDA device"):
        int8_bench()


def test_a_wrong_result_is_refused() -> None:
    x, weight = torch.randn(10, 64), torch.randn(8, 64)
    right = x @ weight.t()
    assert check("right", right, x, weight, 36) > 36
    for wrong in (right * 1.1, torch.full_like(right, float("nan")), right.roll(1, 0)):
        with pytest.raises(ArithmeticError, match="not timed"):
            check("wrong", wrong, x, weight, 36)


def test_rows_at_both_ends_are_checked() -> None:
    x, weight = torch.randn(1000, 64), torch.randn(8, 64)
    out = x @ weight.t()
    out[-1] = 0
    with pytest.raises(ArithmeticError):
        check("unwritten", out, x, weight, 36)


def test_runs_are_timed_between_events_after_those_that_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, marks = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at_ms = clock[0]

        def synchronize(self) -> None:
            marks.append(self)

        def elapsed_time(self, end: Event) -> float:
            assert marks[-1] is end  # waited for, or there is no time to read
            return end.at_ms - self.at_ms

    def run() -> None:
        took.append(100.0 / (len(took) + 1))
        clock[0] += took[-1]

    took: list[float] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert gpu_seconds(run, 3, warm_up=2) == pytest.approx([ms / 1000 for ms in took[2:]])
    assert len(took) == 5


@pytest.mark.parametrize("sizes", [{"tokens": 0}, {"repetitions": 0}])
def test_sizes_below_one_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        int8_bench(**sizes)

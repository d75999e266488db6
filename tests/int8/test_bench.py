"""The timing bench: nothing wrong is timed, and a machine without a GPU is told so."""

from __future__ import annotations

import pytest
import torch

from int8.bench import check, int8_bench


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


@pytest.mark.parametrize("sizes", [{"tokens": 0}, {"repetitions": 0}])
def test_sizes_below_one_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        int8_bench(**sizes)

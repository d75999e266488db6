"""The self-test passes here, and fails when arithmetic is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from int8 import Int8Linear, backends, check, ops
from int8.backends import INT_MM, TORCH, choose
from int8.check import Examination, examine, self_test

CPU = torch.device("cpu")


def test_this_machine_passes() -> None:
    assert self_test("cpu") is None


def test_a_wrong_product_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_one(backend, device):
        return lambda x, w: x.int() @ w.int().t() + 1

    monkeypatch.setattr(ops, "integer_product", off_by_one)
    said = self_test("cpu")
    assert said is not None and "the product is off" in said


def test_a_path_that_raises_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given, **more):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(check, "matmul_rows", broken)
    said = self_test(torch.device("cpu"))
    assert said is not None and said.endswith("RuntimeError: no kernel image")


@pytest.mark.parametrize(
    "said", ["Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublas"]
)
def test_memory_that_runs_out_in_a_kernel_is_no_fault_of_its_backend(said, monkeypatch) -> None:
    def no_room(*given, **more):
        raise RuntimeError(said)

    monkeypatch.setattr(backends, "_distrusted", set())
    examine.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(check, "matmul_rows", no_room)
        with pytest.raises(torch.OutOfMemoryError, match=said.split()[-1]):
            examine(CPU)
    assert backends._distrusted == set()
    assert examine(CPU).is_fast  # the next call tries again
    examine.cache_clear()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """``failing(*names)``: those of int_mm and torch give wrong numbers; gives what is tested."""
    tested: list[str] = []

    def fail(*names: str) -> list[str]:
        def problem_of(backend: str, device: torch.device) -> str | None:
            tested.append(backend)
            return f"int8 by {backend} on {device}: off" if backend in names else None

        monkeypatch.setattr(check, "problem_of", problem_of)
        return tested

    for module in (check, backends):
        monkeypatch.setattr(module, "backends_for", lambda device: (INT_MM, TORCH))
    monkeypatch.setattr(backends, "_distrusted", set())
    examine.cache_clear()
    yield fail
    examine.cache_clear()


def test_the_preferred_backend_is_tested_once_and_used(failing) -> None:
    tested = failing()
    assert [examine(CPU), examine(CPU)] == [Examination(INT_MM)] * 2
    assert tested == [INT_MM] and examine(CPU).is_fast
    assert choose("auto", CPU) == INT_MM


def test_a_backend_that_fails_is_passed_over_from_then_on(failing) -> None:
    failing(INT_MM)
    assert choose("auto", CPU) == INT_MM
    assert examine(CPU) == Examination(TORCH, (f"int8 by {INT_MM} on cpu: off",))
    assert choose("auto", CPU) == TORCH and not examine(CPU).is_fast
    assert choose(INT_MM, CPU) == INT_MM  # asked for by name it is what was asked for


def test_where_nothing_gives_right_numbers_there_is_no_backend(failing) -> None:
    failing(INT_MM, TORCH)
    found = examine(CPU)
    assert found.backend is None and len(found.problems) == 2 and not found.is_fast


def test_layers_compute_by_the_backend_that_is_left(failing, monkeypatch) -> None:
    failing(INT_MM)
    asked: list[str] = []
    product = ops.integer_product
    monkeypatch.setattr(
        ops,
        "integer_product",
        lambda backend, device: asked.append(backend) or product(backend, device),
    )
    layer, x = Int8Linear.from_linear(torch.nn.Linear(300, 20)), torch.randn(3, 300)
    before = layer(x)
    examine(CPU)
    assert torch.equal(layer(x), before)  # the integers are exact whoever adds them
    assert asked == [INT_MM, TORCH]


def test_memory_that_runs_out_is_no_verdict(failing, monkeypatch) -> None:
    tested = failing()

    def out_of_memory(backend: str, device: torch.device) -> str | None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(check, "problem_of", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            examine(CPU)
    assert examine(CPU).backend == INT_MM and tested == [INT_MM]

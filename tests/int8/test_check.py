"""The self-test passes here, and fails when arithmetic is wrong."""

from __future__ import annotations

import pytest
import torch

from int8 import check, ops
from int8.check import self_test


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

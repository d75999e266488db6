"""How int8 and fp8 weights are computed on a device, told after a self-test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from int8 import Examination
from kandinsky5.model import fast_weights, fp8
from kandinsky5.model.fast_weights import WeightsPath, is_examined, weights_path
from kandinsky5.model.fp8 import Fp8Linear, has_product

CPU = torch.device("cpu")
CARD = torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is known, and nothing learned here stays."""
    monkeypatch.setattr(fp8, "_distrusted", set())
    fast_weights._fp8_path.cache_clear()
    yield
    fast_weights._fp8_path.cache_clear()


@pytest.fixture
def with_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's torch has the product on a CPU too, slow: taken for a card's."""
    monkeypatch.setattr(fast_weights, "has_product", lambda device: True)


def test_floats_have_no_path_that_could_fail() -> None:
    assert [is_examined(name) for name in ("bf16", "fp32", "int8", "fp8")] == [
        False,
        False,
        True,
        True,
    ]


def test_int8_on_this_cpu_passes() -> None:
    found = weights_path("int8", CPU)
    assert found.way in ("int_mm", "torch") and (found.failed, found.lacking) == (None, None)


@pytest.mark.parametrize(
    ("backend", "cuda", "lacking"),
    [
        ("triton", "13.0", None),
        (
            "int_mm",
            "13.0",
            "Triton is not installed: int8 runs through torch's own int8 product, slower",
        ),
        ("torch", "12.6", "this card has no int8 tensor cores that K1 uses (sm_80 or newer has)"),
        (
            "torch",
            None,
            "K1's int8 kernels are for NVIDIA cards: plain torch computes in their place",
        ),
    ],
    ids=["fast", "no Triton", "old card", "ROCm"],
)
def test_why_a_card_computes_int8_without_triton_is_said(
    monkeypatch, backend: str, cuda: str | None, lacking: str | None
) -> None:
    monkeypatch.setattr(fast_weights, "examine", lambda device: Examination(backend))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert weights_path("int8", CARD) == WeightsPath(backend, lacking=lacking)


def test_what_failed_is_said_instead_of_what_is_lacking(monkeypatch) -> None:
    found = Examination("int_mm", ("int8 by triton on cuda:1: off",))
    monkeypatch.setattr(fast_weights, "examine", lambda device: found)
    assert weights_path("int8", CARD) == WeightsPath("int_mm", "int8 by triton on cuda:1: off")


def test_where_there_is_no_float8_product_weights_are_dequantised_and_it_is_said() -> None:
    found = weights_path("fp8", CPU)
    assert (found.way, found.failed) == ("dequantised", None)
    assert found.lacking == "a CPU has no float8 product (sm_89 or newer has)"


def test_a_right_product_is_used(with_product) -> None:
    assert weights_path("fp8", CPU) == WeightsPath("scaled_mm")


def test_a_wrong_product_is_named_and_used_by_no_layer_from_then_on(
    with_product, monkeypatch
) -> None:
    product = Fp8Linear._scaled_product
    monkeypatch.setattr(Fp8Linear, "_scaled_product", lambda layer, x: 1.5 * product(layer, x))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert has_product(CARD)
    found = weights_path("fp8", torch.device("cpu", 1))
    assert found.way == "dequantised" and "dB, at least 25 are right" in str(found.failed)
    assert not has_product(CARD) and has_product(torch.device("cuda", 0))


def test_a_product_that_raises_is_named_in_one_line(with_product, monkeypatch) -> None:
    def unsupported(layer: Fp8Linear, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nwhen calling cublasLt")

    monkeypatch.setattr(Fp8Linear, "_scaled_product", unsupported)
    failed = str(weights_path("fp8", CPU).failed)
    assert failed == "fp8 by scaled_mm on cpu: RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED"


def test_memory_that_runs_out_in_the_product_is_no_verdict(with_product, monkeypatch) -> None:
    def no_room(layer: Fp8Linear, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")

    with monkeypatch.context() as patch:
        patch.setattr(Fp8Linear, "_scaled_product", no_room)
        with pytest.raises(torch.OutOfMemoryError):
            weights_path("fp8", CPU)
    assert weights_path("fp8", CPU) == WeightsPath("scaled_mm")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_computes_by_its_own_fast_paths() -> None:
    device, capability = torch.device("cuda", 0), torch.cuda.get_device_capability()
    int8, fp8 = weights_path("int8", device), weights_path("fp8", device)
    assert (int8.failed, fp8.failed) == (None, None)
    assert int8.way == ("triton" if capability >= (8, 0) else "torch")
    assert fp8.way == ("scaled_mm" if capability >= (8, 9) else "dequantised")

"""Engines of other packages, by stand-ins: used after a self-test, named with the reason when not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from kandinsky5.errors import UserError
from kandinsky5.model import engines
from kandinsky5.model.attention import sdpa
from kandinsky5.model.engines import KINDS, choose_engine, compared, examine, nabla_problem

CPU = torch.device("cpu")
BF16 = torch.bfloat16
Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    engines.examine.cache_clear()
    yield
    engines.examine.cache_clear()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets engines run here as if this were a GPU: only the type of the device is asked for."""
    monkeypatch.setattr(engines, "GPU", "cpu")


def installed(monkeypatch: pytest.MonkeyPatch, name: str, function: Function | None) -> None:
    module = ModuleType(KINDS[name].module)
    if function is not None:
        setattr(module, KINDS[name].function, function)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    assert q.dim() == 4 and not causal and dropout_p == 0.0
    return sdpa(q, k, v)


def with_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> Any:
    return sdpa(q, k, v), torch.zeros(q.shape[0], q.shape[2], q.shape[1])


def sage(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """Queries and keys in 8 bits, a scale for each token, as the package does in blocks."""
    assert tensor_layout == "NHD"

    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        return ((x / scale).round() * scale).to(x.dtype)

    return sdpa(rounded(q), rounded(k), v)


def sage_1(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
) -> torch.Tensor:
    """As the packaged 1.x is called."""
    return sage(q, k, v, tensor_layout)


def sage_2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **_: Any,
) -> torch.Tensor:
    """As 2.x is called."""
    assert not return_lse
    return sage(q, k, v, tensor_layout)


def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    return sdpa(q, k, v) * 1.1


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2)


def not_finite(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.full_like(q, torch.nan)


def transposed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    return sdpa(q, k, v).transpose(1, 2)


def raising(*_: Any, **__: Any) -> torch.Tensor:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def chosen(name: str = "auto", dtype: torch.dtype = BF16) -> str:
    return choose_engine(name, device=CPU, dtype=dtype, head_dim=64)[0]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("name", "function"),
    [("flash2", flash), ("flash3", flash), ("flash3", with_lse), ("sage", sage)],
)
def test_an_engine_that_is_right_is_chosen_and_gives_its_numbers(
    monkeypatch: pytest.MonkeyPatch, name: str, function: Function
) -> None:
    installed(monkeypatch, name, function)
    found, engine = choose_engine("auto", device=CPU, dtype=BF16, head_dim=64)
    assert found == name == chosen(name)
    for shape in ((9, 2, 64), (2, 9, 2, 64)):  # alone, and a batch
        given = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for _ in range(3)]
        out = engine(*given)
        assert out.shape == shape
        assert (out - sdpa(*given)).norm() < 0.06 * sdpa(*given).norm()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(("version", "function"), [("1.0.6", sage_1), ("2.2.0", sage_2)])
def test_either_release_of_sage_is_taken_and_named(
    monkeypatch: pytest.MonkeyPatch, version: str, function: Function
) -> None:
    installed(monkeypatch, "sage", function)
    monkeypatch.setattr(engines.importlib.metadata, "version", lambda package: version)
    assert chosen() == chosen("sage") == "sage"
    assert examine("sage", CPU, BF16, 64).version == version


@pytest.mark.usefixtures("as_on_a_gpu")
def test_exact_engines_come_before_the_one_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    for name, function in (("sage", sage), ("flash2", flash), ("flash3", flash)):
        installed(monkeypatch, name, function)
        engines.examine.cache_clear()
        order.append(chosen())
    assert order == ["sage", "flash2", "flash3"]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (wrong, "wrong by 0.1"),
        (causal, "wrong by"),
        (not_finite, "wrong by nan"),
        (transposed, "gave \\[3, 1031, 64\\]"),
        (raising, "RuntimeError: no kernel image is available$"),
        (None, "cannot be imported.*no flash_attn_func"),
    ],
)
def test_an_engine_that_fails_is_not_used_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: Function | None,
    reason: str,
) -> None:
    installed(monkeypatch, "flash2", function)
    assert chosen() == "sdpa"
    found = examine("flash2", CPU, BF16, 64)
    assert found.installed and found.engine is None
    assert found.problem and caplog.messages and found.problem in caplog.text
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.problem)
    with pytest.raises(UserError, match="choose sdpa") as caught:
        chosen("flash2")
    assert caught.value.field == "attention"


def test_an_engine_that_is_not_installed_says_what_to_install() -> None:
    for name, words in (
        ("flash2", "pip install flash-attn"),
        ("flash3", "hopper"),
        ("sage", "pip install sageattention"),
    ):
        if examine(name, CPU).installed:
            pytest.skip(f"{name} is installed here")
        with pytest.raises(UserError, match=words) as caught:
            chosen(name)
        assert "is not installed" in str(caught.value)


def test_without_a_gpu_or_in_float32_it_is_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "flash2", flash)
    assert chosen() == chosen("sdpa") == chosen("nabla") == "sdpa"
    with pytest.raises(UserError, match="needs a GPU and bfloat16, not cpu"):
        chosen("flash2")
    monkeypatch.setattr(engines, "GPU", "cpu")
    engines.examine.cache_clear()
    assert chosen() == "flash2"
    assert chosen(dtype=torch.float32) == "sdpa"


@pytest.mark.usefixtures("as_on_a_gpu")
def test_an_engine_is_tested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append((q.shape[1], k.shape[1]))
        return sdpa(q, k, v)

    installed(monkeypatch, "flash2", counting)
    assert [chosen() for _ in range(3)] == ["flash2"] * 3
    assert calls == [(1031, 1031), (1031, 77)], "the tokens themselves, and a text"


def test_the_tolerance_tells_8_bits_from_an_error() -> None:
    kind = KINDS["sage"]
    fine = compared(kind, lambda q, k, v: sage(q, k, v, "NHD"), CPU, BF16, 128)
    assert fine.problem is None and fine.error and 1e-3 < fine.error < kind.tolerance
    assert compared(kind, lambda q, k, v: sdpa(q, k, v) * 0.9, CPU, BF16, 128).engine is None


def test_nabla_is_compared_with_its_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    nabla_problem.cache_clear()
    assert nabla_problem(CPU, torch.float32, 64) is None
    nabla_problem.cache_clear()
    monkeypatch.setattr(
        "kandinsky5.model.nabla.plain_blocks", lambda query, *_: torch.zeros_like(query)
    )
    assert "wrong by 1" in str(nabla_problem(CPU, torch.float32, 64))
    nabla_problem.cache_clear()
    monkeypatch.setattr("kandinsky5.model.nabla.plain_blocks", raising)
    assert "no kernel image" in str(nabla_problem(CPU, torch.float32, 64))
    nabla_problem.cache_clear()

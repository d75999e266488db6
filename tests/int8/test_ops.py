"""The public functions: any shape, any backend, refusals, fake tensors, torch.compile."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from int8 import (
    COMMUNITY,
    DEFAULT,
    Int8Scheme,
    backends_for,
    int8_matmul,
    ops,
    quantize_activation,
    quantize_weight,
    reference,
)
from int8.backends import choose, integer_product
from int8.ops import GELU, NORM, before_quantising, quantize_op, quantize_rows

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "columns"),
    [((1,), 1), ((0, 100), 5), ((2, 3, 63), 7), ((1, 127), 1000), ((5, 1500), 33)],
)
def test_any_shape_and_dtype(shape: tuple[int, ...], columns: int, dtype: torch.dtype) -> None:
    x, weight = normal(*shape).to(dtype), normal(columns, shape[-1], seed=1)
    found = int8_matmul(x, *quantize_weight(weight), bias=normal(columns, seed=2))
    exact = x.float() @ weight.t() + normal(columns, seed=2)
    assert found.dtype == dtype
    assert found.shape == (*shape[:-1], columns)
    tolerance = 0.02 * float(exact.abs().max()) if exact.numel() else 0
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=tolerance)


@pytest.mark.parametrize("scheme", [DEFAULT, COMMUNITY, Int8Scheme(512, rotate=False)], ids=str)
def test_every_backend_gives_the_same_bits(scheme: Int8Scheme) -> None:
    """The integers are exact and the float32 part is the same code, so nothing may differ."""
    x, weight = normal(9, 1100), normal(70, 1100, seed=1)
    q, scales = quantize_weight(weight, scheme)
    results = [int8_matmul(x, q, scales, scheme=scheme, backend=name) for name in backends_for(CPU)]
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("backend", backends_for(CPU))
def test_the_int32_part_of_a_backend_is_exact_at_the_extremes(backend: str) -> None:
    x = torch.full((33, 1024), 127, dtype=torch.int8)
    x[::2] = -127
    product = integer_product(backend, CPU)(x, x[:17])
    assert torch.equal(product.long(), x.long() @ x[:17].long().t())


def test_large_matmuls_are_the_small_ones_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = normal(6, 300), normal(50, 300, seed=1), normal(50, seed=2)
    q, scales = quantize_weight(weight)
    whole = int8_matmul(x, q, scales, bias)
    monkeypatch.setattr("int8.ops.CHUNK_BYTES", 4 * 300 * 7)
    assert torch.equal(int8_matmul(x, q, scales, bias), whole)


def calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[None]:
    """Grows by one whenever a function of the reference is called."""
    made: list[None] = []
    function = getattr(reference, name)
    monkeypatch.setattr(reference, name, lambda *given: made.append(None) or function(*given))
    return made


def test_off_the_cpu_the_paths_without_a_kernel_go_in_a_dozen_pieces(monkeypatch) -> None:
    """Pro's tokens at 512x768 and its narrowest layer, on a device without memory."""
    x = torch.empty(47_616, 4096, dtype=torch.bfloat16, device="meta")
    pieces = calls(monkeypatch, "_quantize_rows")
    xq, x_scales = reference.quantize(x)
    assert len(pieces) <= 12
    products = calls(monkeypatch, "scaled_sum")
    q, scales = reference.quantize(torch.empty(4096, 4096, device="meta"))
    (out,) = ops._matmul(xq, x_scales, [q], [scales], [], 1024, True, torch.bfloat16, "torch")
    assert out.shape == (47_616, 4096) and len(products) <= 3
    assert ops._columns_at_once(xq) % 8 == 0  # no padding for torch's int8 product


@pytest.mark.parametrize("prologue", [NORM, GELU])
def test_a_prologue_in_parts_is_the_whole(prologue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, shift, scale = normal(9, 200).bfloat16(), normal(200, seed=1), normal(200, seed=2)
    whole = reference.quantize(before_quantising(x, prologue, shift, scale))
    monkeypatch.setattr("int8.ops.CHUNK_BYTES", 4 * 200 * 2)
    parts = quantize_rows(x, DEFAULT, prologue=prologue, shift=shift, scale=scale)
    assert torch.equal(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


def test_rows_of_zeros_give_the_bias_and_stay_finite() -> None:
    x = normal(4, 300)
    x[1] = 0
    weight = normal(20, 300, seed=1)
    weight[3] = 0
    bias = normal(20, seed=2)
    found = int8_matmul(x, *quantize_weight(weight), bias)
    assert found.isfinite().all()
    assert torch.equal(found[1], bias)
    assert torch.equal(found[:, 3], bias[3].expand(4))


def test_a_batch_is_its_rows() -> None:
    x = normal(2, 3, 200)
    q, scales = quantize_activation(x)
    rows_q, rows_scales = quantize_activation(x.reshape(6, 200))
    assert torch.equal(q.reshape(6, 200), rows_q)
    assert torch.equal(scales.reshape(6, 1), rows_scales)


def test_an_input_may_lie_anyhow_in_memory() -> None:
    x = normal(200, 6).t()
    assert torch.equal(quantize_activation(x)[0], quantize_activation(x.contiguous())[0])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda q, s: int8_matmul(torch.ones(2, 0), q[:, :0], s), "allowed|needed"),
        (lambda q, s: quantize_activation(torch.ones(2, 0)), r"\(2, 0\).*K ≥ 1"),
        (lambda q, s: quantize_activation(torch.ones(2, 8, dtype=torch.int32)), "floating"),
        (lambda q, s: quantize_weight(torch.ones(8)), r"\[out, in\]"),
        (lambda q, s: quantize_weight(torch.full((2, 8), float("inf"))), "infinities"),
        (lambda q, s: quantize_weight(torch.full((2, 8), float("nan"))), "infinities or NaN"),
        (lambda q, s: int8_matmul(torch.ones(2, 299), q, s), r"\[out, 299\] torch.int8 is needed"),
        (lambda q, s: int8_matmul(torch.ones(2, 300), q, s[:, :0]), r"scales \(4, 0\)"),
        (lambda q, s: int8_matmul(torch.ones(2, 300), q, s.half()), "torch.float32 is needed"),
        (lambda q, s: int8_matmul(torch.ones(2, 300), q, s, scheme=COMMUNITY), "groups of 128"),
        (lambda q, s: int8_matmul(torch.ones(2, 300), q, s, torch.ones(5)), "bias"),
        (lambda q, s: int8_matmul(torch.ones(2, 300), q, s, backend="magic"), "magic.*there are"),
        (lambda q, s: Int8Scheme(group=100), "allowed"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call, said: str) -> None:
    q, scales = quantize_weight(normal(4, 300))
    with pytest.raises(ValueError, match=said) as refusal:
        call(q, scales)
    assert "\n" not in str(refusal.value)


def test_cards_without_int8_tensor_cores_fall_back_to_plain_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from int8 import backends

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    backends._cuda_backends.cache_clear()
    assert choose("auto", torch.device("cuda", 0)) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    backends._cuda_backends.cache_clear()
    assert choose("auto", torch.device("cuda", 0)) == "triton"
    backends._cuda_backends.cache_clear()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_go_through(device: str) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 5, 3000, dtype=torch.bfloat16, device=device)
        q, scales = quantize_weight(torch.empty(70, 3000, device=device))
        assert (q.shape, scales.shape) == ((70, 3000), (70, 3))
        out = int8_matmul(x, q, scales, torch.empty(70, device=device))
        assert (out.shape, out.dtype, out.device.type) == ((2, 5, 70), torch.bfloat16, device)


def test_the_operators_describe_themselves_rightly_to_torch() -> None:
    vectors = (normal(200, seed=1), normal(200, seed=2))
    torch.library.opcheck(quantize_op, (normal(3, 200), 1024, True, NORM, *vectors, "auto"))


def test_numbers_on_a_cpu_do_not_load_the_compiler() -> None:
    program = """
import sys, torch
from int8 import Int8Linear
layer = Int8Linear.from_linear(torch.nn.Linear(200, 20))
with torch.inference_mode():
    layer(torch.randn(3, 200))
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_torch_compile_keeps_the_operators_whole() -> None:
    q, scales = quantize_weight(normal(20, 300))

    def twice(x: torch.Tensor) -> torch.Tensor:
        return int8_matmul(x * 2, q, scales) + 1

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    x = normal(3, 300, seed=1)
    assert torch.equal(compiled(x), twice(x))

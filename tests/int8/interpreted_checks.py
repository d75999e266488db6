"""The kernels against the reference in Triton's interpreter; ``test_kernels_interpreted.py`` runs this.

The interpreter must be chosen before Triton is imported, hence a process of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from int8 import (
    COMMUNITY,
    DEFAULT,
    Int8Linear,
    Int8Scheme,
    backends_for,
    int8_matmul,
    quantize_activation,
    quantize_weight,
    reference,
)
from int8.accuracy import matmul_truncated, truncated
from int8.configs import MatmulConfig
from int8.launch import matmul
from int8.ops import GELU, NORM, PLAIN, quantize_rows
from kandinsky5.bench.baselines import baseline

MARGIN = 64
POISON = {
    torch.int8: 99,
    torch.float32: math.nan,
    torch.float16: math.nan,
    torch.bfloat16: math.nan,
}


class Guarded:
    """Stands for ``torch.empty``: poisoned memory between margins that nobody may touch."""

    def __init__(self) -> None:
        self.empty = torch.empty
        self.buffers: list[torch.Tensor] = []

    def __call__(self, size, dtype=torch.float32, device=None, **more) -> torch.Tensor:
        count = math.prod(size)
        buffer = self.empty(count + 2 * MARGIN, dtype=dtype, device=device).fill_(POISON[dtype])
        self.buffers.append(buffer)
        return buffer[MARGIN : MARGIN + count].view(size)

    def check(self) -> None:
        assert self.buffers
        for buffer in self.buffers:
            for margin in (buffer[:MARGIN], buffer[-MARGIN:]):
                untouched = torch.full_like(margin, POISON[buffer.dtype])
                assert torch.equal(margin.nan_to_num(7), untouched.nan_to_num(7))


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every output is poisoned before and may not be written beyond its ends."""
    guard = Guarded()
    monkeypatch.setattr(torch, "empty", guard)
    yield
    monkeypatch.undo()
    guard.check()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def test_the_interpreter_is_what_runs() -> None:
    assert backends_for(torch.device("cpu"))[0] == "triton"


@pytest.mark.parametrize("scheme", [DEFAULT, COMMUNITY, Int8Scheme(256)], ids=str)
@pytest.mark.parametrize(
    ("rows", "depth", "dtype"),
    [
        (1, 1, torch.float32),
        (2, 63, torch.bfloat16),
        (3, 100, torch.float16),
        (2, 127, torch.float32),
        (5, 1000, torch.bfloat16),
        (2, 1300, torch.float32),
        (1, 2048, torch.bfloat16),
    ],
)
@pytest.mark.usefixtures("guarded")
def test_quantising_is_the_reference_to_the_bit(
    rows: int, depth: int, dtype: torch.dtype, scheme: Int8Scheme
) -> None:
    x = (normal(rows, depth) * 3).to(dtype)
    q, scales = quantize_activation(x, scheme)
    expected_q, expected_scales = reference.quantize(x, scheme)
    assert torch.equal(q, expected_q)
    assert torch.equal(scales, expected_scales)


@pytest.mark.parametrize("prologue", [NORM, GELU])
@pytest.mark.parametrize(
    ("depth", "dtype"), [(63, torch.float32), (1100, torch.bfloat16), (1000, torch.float16)]
)
@pytest.mark.usefixtures("guarded")
def test_a_fused_prologue_gives_the_integers_of_the_unfused_way(
    prologue: str, depth: int, dtype: torch.dtype
) -> None:
    x = (normal(3, depth) * 2 + 1).to(dtype)
    shift, scale = normal(depth, seed=1), normal(depth, seed=2)
    fused = quantize_rows(x, DEFAULT, prologue=prologue, shift=shift, scale=scale)
    plain = quantize_rows(x, DEFAULT, prologue=prologue, shift=shift, scale=scale, backend="torch")
    off = (fused[0].int() - plain[0].int()).abs()
    # The order of a LayerNorm's sums is free, so now and then a value on the edge falls to its neighbour.
    assert off.max() <= 1
    assert (off > 0).float().mean() < 0.01
    torch.testing.assert_close(
        fused[1], plain[1], rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0
    )


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("prologue", [PLAIN, NORM, GELU])
@pytest.mark.parametrize("scheme", [DEFAULT, COMMUNITY], ids=str)
@pytest.mark.usefixtures("guarded")
def test_one_number_that_is_none_breaks_its_group_and_no_other(
    scheme: Int8Scheme, prologue: str, broken: float
) -> None:
    x, there = normal(4, 1300), {"prologue": prologue}
    x[1, 700] = broken  # in the first of two groups, or in the sixth of eleven
    x[2] = 0
    x[3, :], x[3, 1299] = 0, broken
    if prologue == NORM:
        there |= {"shift": normal(1300, seed=1), "scale": normal(1300, seed=2)}
    _, found = quantize_rows(x, scheme, **there)
    _, expected = quantize_rows(x, scheme, **there, backend="torch")
    assert torch.equal(found.isfinite(), expected.isfinite())
    rows = found.isfinite().all(dim=1)
    assert rows.tolist() == [True, False, True, False]
    assert prologue == NORM or found[1].isfinite().sum() == found.shape[1] - 1


def test_a_weight_with_a_nan_is_refused() -> None:
    weight = normal(20, 300)
    weight[7, 290] = math.nan  # in the tail that is not rotated
    with pytest.raises(ValueError, match="infinities or NaN"):
        quantize_weight(weight)


def test_a_nan_in_an_input_is_one_in_its_row_of_the_product() -> None:
    x, weight = normal(3, 1100), normal(9, 1100, seed=1)
    x[1, 1099] = math.nan
    found = int8_matmul(x, *quantize_weight(weight))
    assert found.isnan().all(dim=1).tolist() == [False, True, False]
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(1, 1, 1), (63, 100, 127), (33, 1000, 1), (1, 127, 63), (70, 128, 65)],
)
@pytest.mark.usefixtures("guarded")
def test_the_int32_part_is_exact(rows: int, depth: int, columns: int) -> None:
    """With scales of 1 and one group the kernel's float32 result is the integer itself (below 2^24)."""
    xq, wq = integers(rows, depth), integers(columns, depth, seed=1)
    ones = torch.ones(rows, 1), torch.ones(columns, 1)
    (found,) = matmul((xq, ones[0]), [wq], [ones[1]], [], DEFAULT, torch.float32)
    assert torch.equal(found.long(), xq.long() @ wq.long().t())


@pytest.mark.parametrize("size", [31, 64])
@pytest.mark.usefixtures("guarded")
def test_the_largest_sum_does_not_overflow(size: int) -> None:
    xq = torch.full((size, 1024), -127, dtype=torch.int8)
    ones = torch.ones(size, 1)
    (found,) = matmul((xq, ones), [xq], [ones], [], DEFAULT, torch.float32)
    assert (found == 127 * 127 * 1024).all()


@pytest.mark.parametrize("scheme", [DEFAULT, COMMUNITY], ids=str)
@pytest.mark.parametrize(
    ("shape", "columns", "dtype"),
    [
        ((2, 3, 1300), 100, torch.float32),
        ((1, 63), 7, torch.bfloat16),
        ((9, 1024), 64, torch.float16),
    ],
)
@pytest.mark.usefixtures("guarded")
def test_a_matmul_is_the_reference_up_to_float32_sums(
    shape: tuple[int, ...], columns: int, dtype: torch.dtype, scheme: Int8Scheme
) -> None:
    x, weight = normal(*shape).to(dtype), normal(columns, shape[-1], seed=1)
    bias = normal(columns, seed=2).to(dtype)
    q, scales = reference.quantize(weight, scheme)
    found = int8_matmul(x, q, scales, bias, scheme=scheme)
    expected = int8_matmul(x, q, scales, bias, scheme=scheme, backend="torch")
    assert found.shape == (*shape[:-1], columns)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-4
    )


@pytest.mark.parametrize(
    "config",
    [MatmulConfig(128, 128, 128, 8, 8, 4), MatmulConfig(16, 32, 64, 2, 4, 2)],
    ids=lambda config: str(config.to_list()),
)
@pytest.mark.parametrize("sections", [1, 2, 3])
@pytest.mark.usefixtures("guarded")
def test_every_tile_of_every_section_is_written_once(config: MatmulConfig, sections: int) -> None:
    xq, x_scales = integers(130, 200), torch.rand(130, 1) + 0.5
    weights = [integers(70, 200, seed=i) for i in range(sections)]
    scales = [torch.rand(70, 1) + 0.5 for _ in weights]
    biases = [normal(70, seed=i) for i in range(sections)]
    outs = matmul((xq, x_scales), weights, scales, biases, DEFAULT, torch.float32, config)
    for out, wq, w_scales, bias in zip(outs, weights, scales, biases, strict=True):
        expected = reference.scaled_sum((xq, x_scales), (wq, w_scales)) + bias
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-2)


@pytest.mark.usefixtures("guarded")
def test_rows_of_zeros_give_the_bias() -> None:
    x = normal(4, 300)
    x[1:3] = 0
    q, scales = quantize_weight(normal(20, 300, seed=1))
    bias = normal(20, seed=2)
    found = int8_matmul(x, q, scales, bias)
    assert torch.equal(found[1:3], bias.expand(2, -1))
    assert found.isfinite().all()
    assert (quantize_activation(x)[1][1:3] == 0).all()


def test_the_kernels_that_the_bench_compares_with_truncate() -> None:
    rival = baseline("int8_baseline")
    assert rival is not None
    x, weight = normal(40, 300), normal(30, 300, seed=1)
    q, scales = rival.truncate(x)
    expected_q, expected_scales = truncated(x)
    assert torch.equal(q, expected_q) and torch.equal(scales, expected_scales)
    torch.testing.assert_close(
        rival.prepare(x, weight)().float(), matmul_truncated(x, weight), rtol=2**-7, atol=1e-4
    )


def test_four_layers_share_one_quantised_input() -> None:
    layers = [Int8Linear.from_linear(torch.nn.Linear(150, 40)) for _ in range(4)]
    x = normal(2, 5, 150)
    for layer, out in zip(layers, Int8Linear.together(x, layers), strict=True):
        assert torch.equal(out, layer(x))


def test_signal_to_noise_is_that_of_the_targets() -> None:
    x, weight = normal(32, 2048), normal(64, 2048, seed=1)
    exact = x.double() @ weight.double().t()
    found = int8_matmul(x, *quantize_weight(weight)).double()
    sqnr_db = 10 * torch.log10(exact.pow(2).sum() / (found - exact).pow(2).sum())
    gain = (found * exact).sum() / exact.pow(2).sum()
    assert sqnr_db >= 38
    assert abs(gain - 1) <= 0.001

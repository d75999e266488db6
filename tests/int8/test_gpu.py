"""The kernels on a real card, against the reference, cuBLAS and torch's own int8 matmul."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from int8 import (
    COMMUNITY,
    DEFAULT,
    Int8Linear,
    backends_for,
    int8_matmul,
    quantize_weight,
    reference,
)
from int8.accuracy import quality
from int8.backends import INT_MM, TRITON
from int8.bench import PRO_SHAPES, int8_bench
from int8.check import self_test
from int8.configs import capability_of, configs_for
from int8.launch import matmul
from int8.ops import GELU, NORM, PLAIN, quantize_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda", 0)
GIB = 1 << 30


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if TRITON not in backends_for(CUDA):
        pytest.skip("needs sm_80 or newer, and Triton")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=CUDA, dtype=dtype)


def test_every_path_passes_the_self_test() -> None:
    assert self_test(CUDA) is None


@pytest.mark.parametrize("scheme", [DEFAULT, COMMUNITY], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "depth"), [(1, 1), (63, 127), (100, 1000), (257, 4096), (5, 16384)]
)
def test_quantising_is_the_reference_to_the_bit(rows, depth, dtype, scheme) -> None:
    x = normal(rows, depth, dtype=dtype)
    found, expected = quantize_rows(x, scheme), reference.quantize(x.cpu(), scheme)
    assert torch.equal(found[0].cpu(), expected[0])
    assert torch.equal(found[1].cpu(), expected[1])


@pytest.mark.parametrize("prologue", [PLAIN, NORM, GELU])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_not_lost(broken: float, prologue: str) -> None:
    """The card's own max passes over NaN."""
    x, shift, scale = normal(40, 2100), normal(2100, seed=1), normal(2100, seed=2)
    x[7, 2099] = broken
    given = {"prologue": prologue, "shift": shift.float(), "scale": scale.float()}
    _, found = quantize_rows(x, DEFAULT, **given)
    _, expected = quantize_rows(x, DEFAULT, **given, backend="torch")
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert found.isfinite().all(dim=1).sum() == 39


@pytest.mark.parametrize("rows", [1, 63, 100, 1000, 3000])
@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (127, 63), (1000, 1000), (1024, 4096)])
def test_the_int32_part_of_every_config_is_exact(rows: int, depth: int, columns: int) -> None:
    generator = torch.Generator(CUDA).manual_seed(0)
    options = {"generator": generator, "device": CUDA, "dtype": torch.int8}
    xq = torch.randint(-127, 128, (rows, depth), **options)
    wq = torch.randint(-127, 128, (columns, depth), **options)
    exact = xq.double() @ wq.double().t()
    ones = torch.ones(rows, 1, device=CUDA), torch.ones(columns, 1, device=CUDA)
    for config in configs_for(capability_of(CUDA), rows, DEFAULT.group):
        (found,) = matmul((xq, ones[0]), [wq], [ones[1]], [], DEFAULT, torch.float32, config)
        assert torch.equal(found.double(), exact), config


@pytest.mark.parametrize("scheme", [DEFAULT, COMMUNITY], ids=str)
def test_triton_and_int_mm_agree(scheme) -> None:
    x, weight, bias = normal(1100, 1800), normal(300, 1800, seed=1), normal(300, seed=2)
    q, scales = quantize_weight(weight, scheme)
    by = {
        name: int8_matmul(x.float(), q, scales, bias, scheme=scheme, backend=name)
        for name in (TRITON, INT_MM)
    }
    torch.testing.assert_close(by[TRITON], by[INT_MM], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("sizes", PRO_SHAPES.values(), ids=list(PRO_SHAPES))
def test_pro_layers_come_close_to_cublas(sizes: tuple[int, int]) -> None:
    depth, columns = sizes
    x, weight = normal(4096, depth), normal(columns, depth, seed=1) * depth**-0.5
    found = int8_matmul(x, *quantize_weight(weight))
    result = quality(found, F.linear(x, weight))
    assert result["sqnr_db"] >= 37.5  # bf16 results on both sides cost half a decibel
    assert abs(result["gain"] - 1) <= 0.001


def test_fused_prologues_give_the_layers_numbers() -> None:
    layers = [Int8Linear.from_linear(torch.nn.Linear(1792, 512)).to(CUDA) for _ in range(3)]
    x = normal(700, 1792)
    shift, scale = normal(1792, seed=1).float(), normal(1792, seed=2).float()
    normed = (F.layer_norm(x.float(), (1792,)) * (1 + scale) + shift).bfloat16()
    for one, out in zip(layers, layers[0].after_norm(x, shift, scale, layers), strict=True):
        assert quality(out, one(normed))["sqnr_db"] >= 45
    assert quality(layers[0].after_gelu(x), layers[0](F.gelu(x)))["sqnr_db"] >= 45


def test_results_beyond_two_billion_elements_are_right_at_the_end() -> None:
    rows, columns = 140_000, 16_384
    if torch.cuda.get_device_properties(CUDA).total_memory < 12 * GIB:
        pytest.skip("needs 12 GiB of GPU memory")
    x, weight = normal(rows, 128), normal(columns, 128, seed=1)
    q, scales = quantize_weight(weight)
    whole = int8_matmul(x, q, scales)
    assert torch.equal(whole[-300:], int8_matmul(x[-300:].contiguous(), q, scales))


def test_torch_compile_runs_the_kernels() -> None:
    layer = Int8Linear.from_linear(torch.nn.Linear(512, 256)).to(CUDA)
    x = normal(100, 512)
    compiled = torch.compile(lambda x: layer(x) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x) + 1)


def test_the_bench_checks_and_times_all_candidates() -> None:
    found = int8_bench(tokens=2048, repetitions=2)
    for shape in found["shapes"].values():
        assert set(shape["seconds"]) == {"bf16_cublas", "int8_int_mm", "int8_triton"}

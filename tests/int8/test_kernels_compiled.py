"""The kernels compiled ahead for every supported card, on a machine without any (A6 of the targets)."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from int8.configs import (
    FEW_ROWS,
    QUANTIZE_ROWS,
    QUANTIZE_WARPS,
    SOME_ROWS,
    MatmulConfig,
    configs_for,
)
from int8.scheme import DEFAULT

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from int8 import kernels  # noqa: E402

MANY_ROWS = 47_616
KIB = 1024
SHARED_BYTES = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 120: 99 * KIB}
"""What one program may use, by CUDA's tables of compute capabilities; targets ask for 99 KB on three."""

INT8_INSTRUCTION = re.compile(r"mma\.sync\.\S*s32\.s8\.s8\.s32|wgmma\.mma_async\.\S*s32\.s8\.s8")


@dataclass(frozen=True)
class Compiled:
    """What is known of a kernel for one card."""

    ptx: str
    shared_bytes: int
    stack_bytes: int


def compile_for(
    card: int, kernel: Any, types: dict[str, str], constants: dict, **options
) -> Compiled:
    names = kernel.arg_names
    types = {name: kind for name, kind in types.items() if name not in constants}
    signature = {name: types.get(name, "constexpr") for name in names}
    whole = {name for name, kind in types.items() if kind.startswith("*")} | {
        "M",
        "N",
        "K",
        "rotated",
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name in whole and name in types
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    done = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    return Compiled(done.asm["ptx"], done.metadata.shared, stack_bytes(done.asm["cubin"]))


def stack_bytes(cubin: bytes) -> int:
    """Local memory of the kernel: what does not fit into registers goes there."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool, "-res-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:\d+ STACK:(\d+).* LOCAL:(\d+)", said.stdout)
    assert found, said.stdout
    return int(found[1]) + int(found[2])


@cache
def matmul_for(
    card: int, config: MatmulConfig, sections: int = 1, even: bool = True, **sizes: int
) -> Compiled:
    types = dict.fromkeys(("xq", "w0", "w1", "w2"), "*i8")
    types |= dict.fromkeys(("x_scales", "scales0", "scales1", "scales2"), "*fp32")
    types |= {f"{name}{i}": "*bf16" for name in ("bias", "out") for i in range(3)}
    types |= dict.fromkeys(("M", "N", "K", "groups"), "i32")
    constants = {
        "SECTIONS": sections,
        "HAS_BIAS": True,
        "GROUP": DEFAULT.group,
        "EVEN_K": even,
        "BY_HAND": False,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SUPER_M": config.super_m,
    }
    constants |= sizes
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return compile_for(card, kernels.matmul_kernel, types, constants, **options)


def quantize_for(
    card: int, *, norm: bool, gelu: bool, dtype: str = "bf16", **sizes: int
) -> Compiled:
    types = dict.fromkeys(("shift", "scale", "signs", "scales"), "*fp32")
    types |= {"x": f"*{dtype}", "values": "*i8"}
    types |= dict.fromkeys(("M", "K", "rotated", "groups"), "i32")
    constants = {
        "NORM": norm,
        "GELU": gelu,
        "ROTATE": True,
        "HAS_TAIL": False,
        "BY_HAND": False,
        "ROWS": QUANTIZE_ROWS,
        "GROUP": DEFAULT.group,
    }
    constants |= sizes
    options = {"num_warps": QUANTIZE_WARPS, "enable_fp_fusion": False}
    return compile_for(card, kernels.quantize_kernel, types, constants, **options)


def table() -> list[tuple[int, MatmulConfig]]:
    return [
        (card, config)
        for card in SHARED_BYTES
        for config in (
            FEW_ROWS,
            SOME_ROWS,
            *configs_for((card // 10, card % 10), MANY_ROWS, DEFAULT.group),
        )
    ]


def check(card: int, done: Compiled) -> None:
    assert done.stack_bytes == 0, "registers are spilt to local memory"
    assert ".local" not in done.ptx
    assert done.shared_bytes <= SHARED_BYTES[card]


@pytest.mark.parametrize(
    ("card", "config"), table(), ids=lambda v: str(v) if isinstance(v, int) else f"{v.to_list()}"
)
def test_the_matmul_uses_int8_tensor_cores_and_no_local_memory(
    card: int, config: MatmulConfig
) -> None:
    done = matmul_for(card, config)
    assert INT8_INSTRUCTION.search(done.ptx)
    check(card, done)


@pytest.mark.parametrize("card", SHARED_BYTES)
def test_three_matmuls_with_a_ragged_depth_fit_as_well(card: int) -> None:
    config = configs_for((card // 10, card % 10), MANY_ROWS, DEFAULT.group)[0]
    done = matmul_for(card, config, sections=3, even=False)
    assert INT8_INSTRUCTION.search(done.ptx)
    check(card, done)


@pytest.mark.parametrize("card", SHARED_BYTES)
@pytest.mark.parametrize("prologue", ["plain", "norm", "gelu"])
def test_the_rotation_stays_within_a_warp(card: int, prologue: str) -> None:
    done = quantize_for(card, norm=prologue == "norm", gelu=prologue == "gelu")
    check(card, done)
    assert done.shared_bytes == 0
    assert "shfl.sync.bfly" in done.ptx
    assert "bar.sync" not in done.ptx
    assert "setp.nan" in done.ptx  # the maximum alone would pass over NaN


def test_sizes_of_one_which_triton_takes_for_constants_compile() -> None:
    sizes = dict.fromkeys(("M", "N", "K", "groups"), 1)
    assert INT8_INSTRUCTION.search(matmul_for(89, FEW_ROWS, even=False, **sizes).ptx)
    del sizes["N"]
    for dtype in ("fp32", "fp16"):
        check(89, quantize_for(89, norm=True, gelu=False, dtype=dtype, **sizes))


def test_hopper_uses_its_own_tensor_core_instructions() -> None:
    config = configs_for((9, 0), MANY_ROWS, DEFAULT.group)[0]
    assert "wgmma.mma_async" in matmul_for(90, config).ptx

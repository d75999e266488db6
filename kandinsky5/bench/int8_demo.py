"""What int8 weights cost in quality: the built-in model's videos and latents, and a block in Pro's shapes."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from int8 import Int8Linear
from kandinsky5.bench.blocks import MODULATION, config_of, shape_of
from kandinsky5.circumstances import circumstances
from kandinsky5.demo.bench import demo_adherence
from kandinsky5.family import TransformerShape
from kandinsky5.model.attention import sdpa
from kandinsky5.model.blocks import VisualBlock
from kandinsky5.model.rope import rope_angles_3d, rope_of
from kandinsky5.output.state import load_latents
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.request import GenerationRequest, GenerationResult

RATES = ("colour", "direction", "shape", "background", "all_right")
MOST_POINTS_DOWN = 1.0
LEAST_LATENTS_DB = 25.0
LEAST_BLOCK_DB = 32.0
FLOAT, INT8 = "bf16", "int8"
"""As ``weights`` of a request; what is not quantised is float32 on a CPU."""
LATENTS_SUFFIX = ".safetensors"
BLOCK_GRID = (1, 4, 8)
"""Tokens along time, height and width."""
BLOCK_TEXT_TOKENS = 16


class LatentsKeeper:
    """Runs jobs and keeps the final latent of each beside its video."""

    def __init__(self) -> None:
        self._pipeline = Pipeline()

    def run(self, request: GenerationRequest, *, out: Path) -> GenerationResult:
        kept = str(out.with_suffix(LATENTS_SUFFIX))
        return self._pipeline.run(dataclasses.replace(request, save_latents=kept), out=out)


def int8_demo(
    *, pairs: int = 60, seed: int = 20_000, mode: str = "t2v", steps: int | None = None
) -> dict[str, Any]:
    """Ask the same questions of the built-in model with float and with int8 weights.

    Args:
        pairs, seed, mode, steps: as :func:`kandinsky5.demo.bench.demo_adherence` takes them.

    Returns:
        JSON-ready: ``float`` and ``int8`` (rates, failures and seconds of each), ``points_down`` for each
        rate in hundredths, ``latents_db`` {mean, worst}, ``block_db``, ``reached``, the circumstances.

    Raises:
        UserError: a value that cannot be used; and what the pipeline raises.
    """
    with tempfile.TemporaryDirectory(prefix="k1-int8-") as scratch:
        folders = {weights: Path(scratch) / weights for weights in (FLOAT, INT8)}
        reports = {
            weights: demo_adherence(
                pairs=pairs,
                seed=seed,
                mode=mode,
                steps=steps,
                keep=folder,
                pipeline=LatentsKeeper(),
                weights=weights,
            )
            for weights, folder in folders.items()
        }
        ratios = [
            sqnr_db(_latent(true), _latent(folders[INT8] / true.name))
            for true in sorted(folders[FLOAT].glob(f"*{LATENTS_SUFFIX}"))
        ]
    down = {
        rate: round(100 * (reports[FLOAT][rate] - reports[INT8][rate]), 2)
        for rate in RATES
        if reports[FLOAT][rate] is not None
    }
    block = block_db(shape_of("pro"))
    return {
        "benchmark": "int8-demo",
        "mode": mode,
        "pairs": pairs,
        "float": _short(reports[FLOAT]),
        "int8": _short(reports[INT8]),
        "points_down": down,
        "latents_db": {
            "mean": round(statistics.fmean(ratios), 2),
            "worst": round(min(ratios), 2),
        },
        "block_db": block,
        "reached": {
            "adherence": max(down.values()) <= MOST_POINTS_DOWN,
            "latents": min(ratios) >= LEAST_LATENTS_DB,
            "block": block["output"] >= LEAST_BLOCK_DB,
        },
        **circumstances(),
    }


@torch.inference_mode()
def block_db(shape: TransformerShape, seed: int = 0) -> dict[str, float]:
    """Signal to noise of a visual block with int8 weights against the same in float32.

    Weights are drawn so that every layer keeps the spread of what goes in, some input channels are larger
    than others, and gates are near 1: what quantising does to the block is not hidden.

    Returns:
        ``output``: of what leaves the block; ``update``: of what it adds to the stream. In dB.
    """
    torch.manual_seed(seed)
    config = config_of(shape)
    true = VisualBlock(config, sdpa, nn.Linear)
    found = VisualBlock(config, sdpa, partial(Int8Linear, device="meta"))
    for name, layer in true.named_modules():
        if isinstance(layer, nn.Linear) and not name.startswith(MODULATION):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            found.set_submodule(name, Int8Linear.from_linear(layer))
        elif isinstance(layer, nn.RMSNorm):
            found.set_submodule(name, layer)
    dim, tokens = shape.model_dim, BLOCK_GRID[0] * BLOCK_GRID[1] * BLOCK_GRID[2]
    spread = torch.exp(0.5 * torch.randn(dim))
    x, text = torch.randn(tokens, dim) * spread, torch.randn(BLOCK_TEXT_TOKENS, dim) * spread
    modulation = 0.3 * torch.randn(9, dim)
    modulation[2::3] += 1.0  # the gates
    scale = (1.0, 1.0, 1.0)
    rope = rope_of(rope_angles_3d(BLOCK_GRID, config.axes_dims, scale, torch.device("cpu")))
    whole, quantised = (
        block(x.clone(), text, modulation.view(1, -1), rope) for block in (true, found)
    )
    return {
        "output": round(sqnr_db(whole, quantised), 2),
        "update": round(sqnr_db(whole - x, quantised - x), 2),
    }


def sqnr_db(true: torch.Tensor, found: torch.Tensor) -> float:
    """Power of the signal over power of the difference, in decibels."""
    return float(20 * torch.log10(true.norm() / (true - found).norm()))


def _latent(path: Path) -> torch.Tensor:
    return load_latents(path)[0]


def _short(report: dict[str, Any]) -> dict[str, Any]:
    """What differs between the two."""
    told = (*RATES, "failures", "seconds_per_clip", "peak_rss_bytes")
    return {name: report[name] for name in told}

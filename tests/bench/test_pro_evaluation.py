"""The GPU benchmark's way on a CPU with a small model, and its refusal without a GPU."""

from __future__ import annotations

import pytest
import torch

from kandinsky5.bench import pro_evaluation as pro_evaluation_module
from kandinsky5.bench.blocks import shape_of
from kandinsky5.bench.pro_evaluation import (
    LATENTS,
    Measured,
    evaluated,
    flops,
    pro_evaluation,
    reached,
)
from kandinsky5.benches import BENCHES
from kandinsky5.errors import UserError
from kandinsky5.family import TransformerShape
from kandinsky5.model.chunks import ActivationChunks
from kandinsky5.pipeline.transformer import Placement

TINY = TransformerShape("custom", 64, 128, 16, 1, 5, (8, 12, 12), text_dim=24, pooled_dim=12)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_streamed_and_resident_evaluations_are_finite_and_the_same(weights: str) -> None:
    resident, streamed = (
        evaluated(
            TINY,
            weights,
            (2, 4, 4),
            Placement(resident=count, source="disk", chunks=ActivationChunks(tokens=4096)),
            device=torch.device("cpu"),
            branches=2,
            steps=1,
        )
        for count in (None, 0)
    )
    assert torch.equal(resident.output, streamed.output)
    assert resident.h2d_bytes == 0 < streamed.h2d_bytes


def test_operations_are_those_of_the_published_table() -> None:
    assert flops(shape_of("pro"), LATENTS["512x768x121"]) / 1e12 == pytest.approx(3584, rel=0.01)
    assert flops(shape_of("lite"), LATENTS["512x768x121"]) / 1e12 == pytest.approx(660, rel=0.01)


def test_targets_are_told_only_of_the_cases_they_speak_of() -> None:
    quick = Measured(5.0, 3 * 10**9, 0, torch.zeros(1))
    both = {"resident": quick, "streamed": quick}
    assert reached("pro", "bf16", "512x768x121", 1, both) == {"B1": True}
    assert reached("pro", "bf16", "512x768x121", 2, both) == {"B6": True}
    assert reached("pro", "int8", "768x1280x121", 2, both) == {"B6": True}
    assert reached("image", "bf16", "1024x1024x1", 2, both) == {"B9": True}
    assert reached("lite", "bf16", "512x768x121", 1, both) == {}


def test_heads_in_groups_reach_the_blocks(monkeypatch) -> None:
    """On a CPU that is taken for a card: only what is asked of the evaluation is looked at."""
    asked: list[Placement] = []

    def evaluation(*given: object, **more: object) -> Measured:
        asked.append(given[3])
        return Measured(5.0, 3 * 10**9, 0, torch.zeros(1))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(pro_evaluation_module, "evaluated", evaluation)
    monkeypatch.setattr(pro_evaluation_module, "circumstances", dict)
    found = BENCHES["pro-evaluation"].run({"heads": 8, "branches": 2, "tokens": 1024})
    assert [placement.chunks for placement in asked] == [ActivationChunks(1024, 8)] * 2
    assert (found["chunk_heads"], found["reached"]) == (8, {"B6": True})
    with pytest.raises(UserError, match="at least 1 step, token and head"):
        pro_evaluation(heads=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    with pytest.raises(UserError, match="a machine with a CUDA device"):
        pro_evaluation()

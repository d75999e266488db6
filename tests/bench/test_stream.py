"""The GPU benchmark's parts that need no GPU: its weights, its step, and its three ways giving the same."""

from __future__ import annotations

import pytest
import torch

from kandinsky5.bench.baselines import baseline
from kandinsky5.bench.blocks import MODULATION, empty_blocks
from kandinsky5.bench.stream import RandomWeights, StackStep, fill_plainly, stream
from kandinsky5.errors import UserError
from kandinsky5.family import TransformerShape
from kandinsky5.memory.layout import BlockLayout
from kandinsky5.memory.source import PinnedSource
from kandinsky5.memory.streamer import Streamer

CPU = torch.device("cpu")
TINY = TransformerShape(
    name="custom",
    model_dim=32,
    ff_dim=64,
    time_dim=8,
    text_blocks=1,
    visual_blocks=6,
    axes_dims=(4, 6, 6),
)


@pytest.fixture
def eviction():
    return baseline("eviction_swap").EvictionSwap


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@torch.inference_mode()
def test_resident_streamed_and_swapped_give_the_same_numbers(weights: str, eviction) -> None:
    stack = empty_blocks(TINY, weights)
    step = StackStep(stack, TINY, (2, 4, 4), CPU)
    layouts = [BlockLayout.of(block, skip=(MODULATION,)) for block in stack]
    source = PinnedSource(layouts, RandomWeights(layouts))
    with Streamer(stack, source, device=CPU, resident=range(6)):
        resident = step()
    with Streamer(stack, source, device=CPU):
        streamed = step()
    source.close()
    fill_plainly(stack)
    swapped = step(eviction(stack, CPU).before)
    assert resident.isfinite().all()
    assert torch.equal(streamed, resident) and torch.equal(swapped, resident)


@torch.inference_mode()
def test_the_random_blocks_differ_so_that_a_mix_up_would_show() -> None:
    stack = empty_blocks(TINY, "bf16")
    fill_plainly(stack)
    step = StackStep(stack, TINY, (2, 4, 4), CPU)
    before = step()
    stack[3] = stack[2]
    assert not torch.equal(step(), before)


def test_the_baseline_fetches_almost_every_block_twice_and_writes_it_back(eviction) -> None:
    swap = eviction(torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(60)), CPU)
    for _ in range(2):
        before = swap.loads, swap.write_backs
        for index in range(60):
            swap.before(index)
    assert (swap.loads - before[0], swap.write_backs - before[1]) == (117, 117)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_what_is_needed() -> None:
    with pytest.raises(UserError, match="CUDA"):
        stream()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_small_run_tells_all_its_numbers() -> None:
    document = stream(model="lite", blocks=6, size="1024x1024x1", steps=1)
    assert document["d2h_copies"] == 0
    assert document["resident_s"] > 0 and document["swapped_over_streamed"] > 0

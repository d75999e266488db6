"""Live bytes of an evaluation: the target, the memory plan's arithmetic, and the counter itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kandinsky5.benches import BENCHES
from kandinsky5.errors import UserError
from kandinsky5.model.bench import CHUNKS, TARGET_UNITS, WHOLE, Case, LiveBytes, activations, count
from kandinsky5.model.chunks import ActivationChunks


def test_pro_needs_little_more_than_three_times_its_stream_at_512x768() -> None:
    counted = count(Case("pro", 768, 512, 121, chunks=CHUNKS))
    assert counted["tokens"] == 47_616
    assert counted["units"] <= 3.25 < TARGET_UNITS
    assert counted["peak_bytes"] == pytest.approx(counted["planned_bytes"], rel=0.10)


@pytest.mark.parametrize(
    "case",
    [
        Case("pro", 768, 512, 121, 1, WHOLE),
        Case("pro", 768, 512, 121, 2, ActivationChunks(8192, 16)),
        Case("pro", 768, 512, 25, 2, ActivationChunks(None, 4)),
        Case("pro", 256, 256, 25, 2, ActivationChunks(512, 1)),
        Case("lite", 768, 512, 25, 1, ActivationChunks(1024, None)),
        Case("lite", 768, 512, 49, 2, ActivationChunks(4096, 4)),
        Case("image", 1024, 1024, 1, 2, ActivationChunks(1024, 10)),
    ],
    ids=str,
)
def test_the_plans_arithmetic_gives_what_is_counted(case: Case) -> None:
    counted = count(case)
    assert counted["peak_bytes"] == pytest.approx(counted["planned_bytes"], rel=0.10)


def test_the_plain_way_needs_more_than_ten_times_its_stream() -> None:
    assert count(Case("pro", 768, 512, 121, chunks=WHOLE))["units"] > 10


def test_a_second_branch_costs_one_more_stream() -> None:
    one, two = (count(Case("pro", 256, 256, 121, n, ActivationChunks(4096, 8))) for n in (1, 2))
    conditioning_bytes = 4096 * (2 * 256 + 4 * (9 * 60 + 2))
    more = two["peak_bytes"] - one["peak_bytes"]
    assert more == one["unit_bytes"] + conditioning_bytes


def test_memory_is_counted_once_while_it_lives_and_weights_are_not() -> None:
    layer = nn.Linear(8, 8, bias=False, device="meta")
    with torch.inference_mode(), LiveBytes(apart_from=layer) as live:
        x = torch.empty(4, 8, device="meta")
        halves = x.chunk(2)
        assert live.now_bytes == 128
        y = layer(x) + 1
        assert (live.now_bytes, live.peak_bytes) == (256, 384)
        layer.weight.t()
        del x, halves
        assert live.now_bytes == 128
        del y
    assert (live.now_bytes, live.peak_bytes) == (0, 384)


def test_the_benchmark_is_in_the_table_and_refuses_what_is_no_chunk() -> None:
    with pytest.raises(UserError, match="heads.*at least 1"):
        BENCHES["activations"].run({"heads": 0})
    with pytest.raises(UserError, match="tokens.*at least 1"):
        activations(tokens=-5)

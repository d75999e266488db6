"""int8 weights against float ones: the latent of a whole run, and a block in Pro's shapes."""

from __future__ import annotations

import dataclasses

import pytest

from kandinsky5.bench.blocks import shape_of
from kandinsky5.bench.int8_demo import (
    LEAST_BLOCK_DB,
    LEAST_LATENTS_DB,
    RATES,
    block_db,
    int8_demo,
)


def test_the_latent_of_a_whole_run_keeps_25_db_and_the_words_are_kept(monkeypatch) -> None:
    block = {"output": LEAST_BLOCK_DB, "update": LEAST_BLOCK_DB}  # has a test of its own below
    monkeypatch.setattr("kandinsky5.bench.int8_demo.block_db", lambda shape: block)
    found = int8_demo(pairs=1)
    worst_db = found["latents_db"]["worst"]
    assert LEAST_LATENTS_DB <= worst_db < 80  # above, nothing would have been quantised
    assert set(found["points_down"]) <= set(RATES) and max(found["points_down"].values()) <= 0
    assert found["reached"] == {"adherence": True, "latents": True, "block": True}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_block_in_pros_shapes_keeps_32_db(seed: int) -> None:
    pro = shape_of("pro")
    narrow = dataclasses.replace(pro, model_dim=512, ff_dim=2048, time_dim=64)
    assert narrow.head_dim == 128
    found = block_db(narrow, seed)
    assert LEAST_BLOCK_DB <= found["update"] <= found["output"] < 60

"""Predicted live bytes of an evaluation; tests/model/test_bench.py holds them against what is allocated."""

from __future__ import annotations

from kandinsky5.family import TRANSFORMERS
from kandinsky5.memory.activations import EvaluationSize, activation_bytes

PRO = TRANSFORMERS["pro"]
SIZE = EvaluationSize(47_616, PRO.model_dim, PRO.ff_dim, PRO.heads, PRO.head_dim)


def test_chunks_bring_pro_under_the_target() -> None:
    """A7: at most 5 tensors of [tokens, model_dim], 3.25 as a stretch, for one evaluation at 512×768."""
    assert activation_bytes(SIZE, chunk_tokens=4096, chunk_heads=16) <= 5.0 * SIZE.unit_bytes
    assert activation_bytes(SIZE, chunk_tokens=1024, chunk_heads=8) <= 3.25 * SIZE.unit_bytes


def test_smaller_chunks_never_take_more() -> None:
    tokens = [activation_bytes(SIZE, chunk_tokens=n) for n in (1024, 2048, 4096, 16384, None)]
    heads = [activation_bytes(SIZE, chunk_tokens=1024, chunk_heads=n) for n in (8, 16, 32)]
    assert tokens == sorted(tokens)
    assert heads == sorted(heads)
    assert tokens[-1] > 2 * tokens[0]


def test_another_branch_adds_one_tensor() -> None:
    guided = EvaluationSize(**{**vars(SIZE), "branches": 2})
    assert activation_bytes(guided) - activation_bytes(SIZE) == SIZE.unit_bytes


def test_sparse_attention_adds_the_maps_of_a_few_heads_however_many_there_are() -> None:
    sparse = EvaluationSize(**{**vars(SIZE), "sparse": True})
    one, eight, all_heads = (
        activation_bytes(sparse, chunk_tokens=1024, chunk_heads=heads)
        - activation_bytes(SIZE, chunk_tokens=1024, chunk_heads=heads)
        for heads in (1, 8, 32)
    )
    assert 0 <= one < eight == all_heads

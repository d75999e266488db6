"""Live bytes of one evaluation of the transformer: arithmetic only, no torch.

Counted in units of one [tokens, model_dim] tensor. It follows kandinsky5/model/layers.py: the stream x is
overwritten in place; queries, keys, values and what attention gives live together for one group of heads;
norms, projections and feed-forward go in chunks of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

NABLA_BLOCK_TOKENS = 64
NABLA_HEADS_TOGETHER = 4
NABLA_MAP_PAIRS = 2**20
"""Heads whose indices exist together, pairs sorted at once: as kandinsky5/model/nabla.py has them."""
NABLA_INDEX_BYTES = 4
NABLA_WINDOW_BYTES = 1
NABLA_SORT_BYTES = 26
"""For each pair of blocks: index; being in the window; probabilities, order, sums, flags while sorted."""


@dataclass(frozen=True)
class EvaluationSize:
    """What the live bytes of an evaluation depend on.

    Attributes:
        tokens: visual tokens S.
        model_dim, ff_dim, heads, head_dim: of the transformer.
        branches: evaluations that go through each block together: 2 with guidance.
        number_bytes: of one number of an activation, 2 or 4.
        sparse: NABLA attention, whose block maps take memory too.
    """

    tokens: int
    model_dim: int
    ff_dim: int
    heads: int
    head_dim: int
    branches: int = 1
    number_bytes: int = 2
    sparse: bool = False

    @property
    def unit_bytes(self) -> int:
        """One [tokens, model_dim] tensor."""
        return self.tokens * self.model_dim * self.number_bytes


def activation_bytes(
    size: EvaluationSize, *, chunk_tokens: int | None = None, chunk_heads: int | None = None
) -> int:
    """Most bytes alive at once inside the visual blocks, weights and latents not counted.

    Args:
        chunk_tokens: visual tokens that go through norms, projections and feed-forward together; None is
            all of them.
        chunk_heads: heads of self-attention whose queries, keys and values exist together; None is all.
    """
    unit, number = size.unit_bytes, size.number_bytes
    tokens = min(chunk_tokens or size.tokens, size.tokens)
    heads = min(chunk_heads or size.heads, size.heads)
    share = heads / size.heads
    in_chunks, in_groups = tokens < size.tokens, heads < size.heads
    dim, part_dim = size.model_dim, heads * size.head_dim

    norm = 3 * 4 * dim  # float32: normed, scaled, shifted
    rotation = number * part_dim + 3 * 4 * part_dim  # of queries or keys, in float32
    projecting = tokens * max(norm, number * (dim + 3 * part_dim), number * 3 * part_dim + rotation)
    kept = 3 * share * unit if in_chunks else 0.0  # q, k, v, filled chunk by chunk
    gathered = unit if in_groups else 0.0  # what the groups before gave
    attending = 4 * share * unit + _sparse_bytes(size, heads)
    adding = unit + tokens * (number * dim + 2 * 4 * dim)
    feeding = tokens * max(norm, number * (2 * size.ff_dim + dim), number * size.ff_dim + 10 * dim)

    peak = max(gathered + kept + projecting, gathered + attending, adding, feeding)
    rope = size.tokens * size.head_dim * 4
    return round(size.branches * unit + peak + rope)


def nabla_map_bytes(size: EvaluationSize, heads: int) -> float:
    """While NABLA chooses blocks for so many heads: indices of a few of them, some rows being sorted."""
    pairs = (size.tokens / NABLA_BLOCK_TOKENS) ** 2
    few = min(heads, NABLA_HEADS_TOGETHER)
    kept = pairs * (few * NABLA_INDEX_BYTES + NABLA_WINDOW_BYTES)
    return kept + min(pairs, NABLA_MAP_PAIRS) * NABLA_SORT_BYTES


def _sparse_bytes(size: EvaluationSize, heads: int) -> float:
    """What NABLA takes beyond full attention: its map, and what a few heads give before it is in place."""
    if not size.sparse:
        return 0.0
    few = min(heads, NABLA_HEADS_TOGETHER)
    return nabla_map_bytes(size, heads) + few / size.heads * size.unit_bytes

"""NABLA, neighbourhood-adaptive block-level attention (arXiv 2507.13546).

Tokens come tile after tile: the 64 of an 8×8 tile of one frame are a block. Per head, the means of the
queries and keys of each block tell which blocks are worth attending to; a sliding window over time, height
and width is added, and attention is computed for those pairs of blocks alone.

What choosing needs grows with the square of the number of blocks. It is done for some rows of one head at
a time, and only for a few heads do the indices exist together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F

from kandinsky5.model.attention import NablaParams

TILE = 8
"""Side of a tile in tokens."""
BLOCK_TOKENS = TILE * TILE
HEADS_TOGETHER = 4
"""Heads whose indices exist together: enough rows of blocks to fill a device."""
MAP_PAIRS = 2**20
"""Pairs of blocks that are sorted at once."""
MOST_SHAPES = 64
"""Different sizes for which a kernel is kept by one process; torch's own limit is 8."""

BlockSparse = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]
"""``attend(query, key, value, counts, indices)``: attention over chosen blocks; see :func:`chosen_blocks`."""


def check_grid(grid: tuple[int, int, int]) -> None:
    """Refuse a grid of tokens that tiles do not cover.

    Raises:
        ValueError: height or width is no multiple of 8 tokens.
    """
    _, height, width = grid
    if height % TILE or width % TILE:
        raise ValueError(
            f"NABLA needs a token grid whose height and width are multiples of {TILE}, got {height}×{width}"
            f" tokens (in pixels: multiples of {16 * TILE})"
        )


def stacked(x: torch.Tensor, tile: tuple[int, int] = (TILE, TILE)) -> torch.Tensor:
    """Cut each frame into tiles and put these one under another.

    The raster order of the result is the order of tiles: (time, tile row, tile column, row, column).

    Args:
        x: [..., T, H, W, channels], H and W multiples of the tile's.
        tile: its height and width.

    Returns:
        [..., T, H·W/width of a tile, width of a tile, channels].
    """
    height, width = tile
    tiles = x.unflatten(-2, (-1, width)).unflatten(-4, (-1, height))
    return tiles.transpose(-4, -3).flatten(-5, -3)


def unstacked(
    x: torch.Tensor, sides: tuple[int, int], tile: tuple[int, int] = (TILE, TILE)
) -> torch.Tensor:
    """Undoes :func:`stacked`: → [..., T, H, W, channels], H and W being ``sides``."""
    rows, columns = (side // part for side, part in zip(sides, tile, strict=True))
    tiles = x.unflatten(-3, (rows, columns, tile[0]))
    return tiles.transpose(-4, -3).flatten(-3, -2).flatten(-4, -3)


def window_of(
    grid: tuple[int, int, int], params: NablaParams, device: torch.device
) -> torch.Tensor:
    """Pairs of blocks that lie near each other.

    Args:
        grid: tokens along time, height and width.

    Returns:
        bool [blocks, blocks]: at most wT//2, wH//2 and wW//2 blocks apart along each axis.
    """
    frames, height, width = grid[0], grid[1] // TILE, grid[2] // TILE

    def near(length: int, window: int) -> torch.Tensor:
        place = torch.arange(length, device=device)
        return (place[:, None] - place).abs() <= window // 2

    time = near(frames, params.wT)[:, None, None, :, None, None]
    rows = near(height, params.wH)[None, :, None, None, :, None]
    columns = near(width, params.wW)[None, None, :, None, None, :]
    blocks = frames * height * width
    return (time & rows & columns).reshape(blocks, blocks)


def block_means(x: torch.Tensor) -> torch.Tensor:
    """Mean of the tokens of each block: [heads, S, d] → [heads, S/64, d], in x's dtype."""
    return x.unflatten(-2, (-1, BLOCK_TOKENS)).mean(dim=-2)


def chosen_pairs(
    query_means: torch.Tensor, key_means: torch.Tensor, share: float, window: torch.Tensor
) -> torch.Tensor:
    """For each row the fewest blocks whose probabilities add up to ``share``, and the window.

    The products are rounded to the means' dtype; softmax and sums are float32, as where this was published.

    Args:
        query_means: [rows, d], of one head.
        key_means: [blocks, d].
        share: P, in (0, 1].
        window: bool [rows, blocks].

    Returns:
        bool [rows, blocks].
    """
    scores = query_means @ key_means.transpose(-2, -1) / math.sqrt(query_means.shape[-1])
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
    del scores
    ascending, order = probabilities.sort(dim=-1, stable=True)
    del probabilities
    kept = ascending.cumsum_(dim=-1) >= 1 - share
    return torch.empty_like(kept).scatter_(-1, order, kept).logical_or_(window)


def chosen_blocks(
    query_means: torch.Tensor, key_means: torch.Tensor, share: float, window: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks each row of blocks attends to.

    Args:
        query_means, key_means: [heads, blocks, d].
        share, window: as :func:`chosen_pairs` takes them, the window for all rows.

    Returns:
        counts int32 [heads, blocks], at least 1 each, and indices int32 [heads, blocks, blocks]: the first
        ``counts`` of a row are its blocks in ascending order, the others follow.
    """
    heads, blocks, _ = query_means.shape
    counts = torch.empty(heads, blocks, dtype=torch.int32, device=window.device)
    indices = torch.empty(heads, blocks, blocks, dtype=torch.int32, device=window.device)
    for head in range(heads):
        for rows in _slabs(blocks):
            pairs = chosen_pairs(query_means[head, rows], key_means[head], share, window[rows])
            counts[head, rows] = pairs.sum(dim=-1, dtype=torch.int32)
            indices[head, rows] = pairs.byte().argsort(dim=-1, descending=True, stable=True).int()
    return counts, indices


class NablaAttention:
    """An attention engine for the visual tokens of one grid in the order of :func:`stacked`.

    Args:
        params: P and the window.
        grid: tokens along time, height, width.
        device: of the tokens.
        attend: computes attention for chosen blocks; None takes what suits the device.

    Raises:
        ValueError: tiles do not cover the grid, or P is not in (0, 1].
    """

    def __init__(
        self,
        params: NablaParams,
        grid: tuple[int, int, int],
        device: torch.device,
        attend: BlockSparse | None = None,
    ) -> None:
        check_grid(grid)
        if not 0 < params.P <= 1:
            raise ValueError(f"P is a share in (0, 1], got {params.P}")
        self._share = params.P
        self._window = window_of(grid, params, device)
        self._attend = attend or (flex_blocks if device.type == "cuda" else plain_blocks)

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend query over key and value, all [..., S, heads, d] with S the grid's tokens."""
        out = torch.empty_like(value)
        for sequence in range(math.prod(value.shape[:-3])):
            part = [t.flatten(0, -4)[sequence] if t.dim() > 3 else t for t in (query, key, value)]
            q, k, v = (t.transpose(0, 1) for t in part)
            whole = out.view(-1, *out.shape[-3:])[sequence].transpose(0, 1)
            for start in range(0, q.shape[0], HEADS_TOGETHER):
                heads = slice(start, start + HEADS_TOGETHER)
                whole[heads] = self._heads(q[heads], k[heads], v[heads])
        return out

    def _heads(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        counts, indices = chosen_blocks(
            block_means(query), block_means(key), self._share, self._window
        )
        return self._attend(query, key, value, counts, indices)


def plain_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
) -> torch.Tensor:
    """Attention over chosen blocks in plain torch, on any device: one row of blocks after the other.

    Args:
        query, key, value: [heads, S, d].
        counts, indices: from :func:`chosen_blocks`.

    Returns:
        [heads, S, d] in the query's dtype.
    """
    q, k, v = (t.unflatten(1, (-1, BLOCK_TOKENS)) for t in (query, key, value))
    heads = []
    for head, row_counts in enumerate(counts.tolist()):
        rows = []
        for row, count in enumerate(row_counts):
            chosen = indices[head, row, :count].long()
            keys, values = (t[head, chosen].flatten(0, 1)[None] for t in (k, v))
            rows.append(F.scaled_dot_product_attention(q[head, row][None], keys, values)[0])
        heads.append(torch.cat(rows))
    return torch.stack(heads)


def flex_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
) -> torch.Tensor:
    """As :func:`plain_blocks`, by torch's flex attention compiled for the device."""
    return _flex(query[None], key[None], value[None], counts[None], indices[None])[0]


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
) -> torch.Tensor:
    from torch.nn.attention.flex_attention import BlockMask

    another = indices.view(indices.shape)  # torch's CPU kernel cannot take one tensor twice
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        another,
        counts,
        indices,
        BLOCK_SIZE=BLOCK_TOKENS,
        compute_q_blocks=False,  # only a backward pass needs them
    )
    # Tiles of a kernel have to divide the blocks; those that torch would choose may be larger.
    tiles = {"BLOCK_M": BLOCK_TOKENS, "BLOCK_N": BLOCK_TOKENS} if query.is_cuda else {}
    with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
        return _compiled()(query, key, value, block_mask=mask, kernel_options=tiles)


@cache
def _compiled() -> Callable[..., torch.Tensor]:
    """flex_attention as one kernel: not compiled it would make all S×S products."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def _slabs(blocks: int) -> Iterator[slice]:
    size = max(1, MAP_PAIRS // blocks)
    for start in range(0, blocks, size):
        yield slice(start, min(start + size, blocks))

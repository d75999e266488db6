"""NABLA: the published choice of blocks, attention over them alone, and the whole model with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kandinsky5.benches import BENCHES
from kandinsky5.errors import UserError
from kandinsky5.family import TRANSFORMERS
from kandinsky5.memory import activations
from kandinsky5.model import bench, nabla
from kandinsky5.model.attention import NablaParams, sdpa
from kandinsky5.model.chunks import ActivationChunks
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.nabla import (
    BLOCK_TOKENS,
    NablaAttention,
    block_means,
    chosen_blocks,
    stacked,
    unstacked,
    window_of,
)
from kandinsky5.model.positions import VisualPositions
from tests.model.test_dit import diffusers_model
from tests.model.tiny_dit import TINY, inputs, randomised, relative_error, tiny

CPU = torch.device("cpu")
GRIDS = [(1, 8, 8), (5, 8, 16), (3, 24, 16), (13, 16, 16)]
SHARES = [0.5, 0.7, 0.8, 0.9, 0.95]


def drawn(grid: tuple[int, int, int], heads: int = 3, dim: int = 64) -> list[torch.Tensor]:
    """Queries, keys and values [S, heads, d] whose blocks differ in what they attend to."""
    generator = torch.Generator().manual_seed(math.prod(grid))
    tokens = math.prod(grid)
    blocks = [torch.randn(tokens // 64, heads, dim, generator=generator) for _ in range(3)]
    return [
        block.repeat_interleave(64, dim=0) + torch.randn(tokens, heads, dim, generator=generator)
        for block in blocks
    ]


def masked_dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple[int, int, int], p: NablaParams
) -> torch.Tensor:
    """All in float64, row by row in plain Python: which blocks, then attention under the S×S mask."""
    tokens, heads, dim = q.shape
    blocks = tokens // BLOCK_TOKENS
    rows, columns = grid[1] // 8, grid[2] // 8
    places = [(b // (rows * columns), b // columns % rows, b % columns) for b in range(blocks)]
    out = torch.empty_like(v)
    for head in range(heads):
        qm, km = (t[:, head].double().view(blocks, BLOCK_TOKENS, dim).mean(1) for t in (q, k))
        probabilities = torch.softmax(qm @ km.T / dim**0.5, dim=-1)
        mask = torch.zeros(blocks, blocks, dtype=torch.bool)
        for i in range(blocks):
            left = 1.0
            for j in probabilities[i].argsort(descending=True).tolist():
                mask[i, j] = left > 1 - p.P  # those before it do not add up to P yet
                left -= float(probabilities[i, j])
            for j in range(blocks):
                apart = [abs(a - b) for a, b in zip(places[i], places[j], strict=True)]
                mask[i, j] |= (
                    apart[0] <= p.wT // 2 and apart[1] <= p.wH // 2 and apart[2] <= p.wW // 2
                )
        big = mask.repeat_interleave(64, 0).repeat_interleave(64, 1)
        out[:, head] = F.scaled_dot_product_attention(
            q[:, head][None], k[:, head][None], v[:, head][None], attn_mask=big
        )[0]
    return out


def test_each_tile_of_a_frame_lies_together_and_goes_back() -> None:
    x = torch.arange(2.0 * 16 * 24).view(2, 16, 24, 1)
    together = stacked(x)
    assert together.shape == (2, 48, 8, 1)
    assert torch.equal(together[0, :8], x[0, :8, :8])
    assert torch.equal(together[0, 32:40], x[0, 8:, 8:16])
    assert torch.equal(unstacked(together, (16, 24)), x)
    batch = torch.stack([x, -x])
    assert torch.equal(unstacked(stacked(batch, (4, 6)), (16, 24), (4, 6)), batch)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_blocks_chosen_are_those_of_diffusers(grid: tuple[int, int, int]) -> None:
    module = pytest.importorskip("diffusers.models.transformers.transformer_kandinsky")
    diffusers = pytest.importorskip("diffusers")
    query, key, _ = drawn(grid)
    windows = [(11, 3, 3), (3, 1, 1), (1, 1, 3), (2, 4, 1)]
    for share in SHARES:
        for window in windows:
            params = NablaParams(share, *window)
            near = diffusers.Kandinsky5T2VPipeline.fast_sta_nabla(
                grid[0], grid[1] // 8, grid[2] // 8, *window, device="cpu"
            )
            expected = module.nablaT_v2(query[None], key[None], near, share)
            assert torch.equal(near.bool(), window_of(grid, params, CPU))
            means = (block_means(t.transpose(0, 1)) for t in (query, key))
            counts, indices = chosen_blocks(*means, share, near.bool())
            assert torch.equal(counts, expected.full_kv_num_blocks[0])
            assert indices.dtype == counts.dtype == torch.int32
            theirs = expected.full_kv_indices[0]
            for head, row in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
                number = counts[head, row]
                ours = indices[head, row, :number]
                assert torch.equal(ours, theirs[head, row, :number].sort().values)
                assert sorted(indices[head, row].tolist()) == list(range(counts.shape[1]))


def test_the_map_does_not_depend_on_how_many_rows_are_sorted_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = (13, 16, 16)
    query, key, _ = (t.transpose(0, 1) for t in drawn(grid))
    given = (
        block_means(query),
        block_means(key),
        0.7,
        window_of(grid, NablaParams(1, 3, 1, 1), CPU),
    )
    whole = chosen_blocks(*given)
    assert (whole[0] < 52).any()
    monkeypatch.setattr(nabla, "MAP_PAIRS", 7 * 52)
    assert all(map(torch.equal, chosen_blocks(*given), whole))


@pytest.mark.parametrize("grid", [*GRIDS[1:3], (5, 16, 16)], ids=str)
@pytest.mark.parametrize("share", [0.4, 0.8])
def test_attention_equals_dense_attention_under_the_same_mask(
    grid: tuple[int, int, int], share: float
) -> None:
    params = NablaParams(share, 3, 1, 3)
    given = drawn(grid, heads=5)
    ours = NablaAttention(params, grid, CPU)(*given)
    assert relative_error(ours, masked_dense(*given, grid, params)) <= 1e-5
    assert relative_error(ours, sdpa(*given)) > 1e-3, "nothing was left out"


def test_all_of_the_probability_is_full_attention_also_for_a_batch() -> None:
    grid = (2, 8, 16)
    given = [torch.stack([t, t.flip(0)]) for t in drawn(grid)]
    ours = NablaAttention(NablaParams(1.0, 1, 1, 1), grid, CPU)(*given)
    assert relative_error(ours, sdpa(*given)) <= 1e-6


def test_every_block_attends_to_itself_however_little_is_kept() -> None:
    query, key, _ = (t.transpose(0, 1) for t in drawn((3, 8, 8)))
    window = window_of((3, 8, 8), NablaParams(0.01, 1, 1, 1), CPU)
    counts, indices = chosen_blocks(block_means(query), -block_means(key), 0.01, window)
    for head in range(3):
        for row in range(3):
            assert row in indices[head, row, : counts[head, row]]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        NablaAttention(NablaParams(share, 11, 3, 3), (1, 8, 8), CPU)


# The whole model

SHAPE = (3, 16, 32)
PARAMS = NablaParams(0.6, 1, 1, 1)


def test_the_model_with_nabla_equals_diffusers_under_the_same_masks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's flex attention looks at the blocks only when compiled; its masks are given to sdpa here."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_kandinsky")
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(module, "torch", _Float32Torch())
    monkeypatch.setattr(module, "dispatch_attention_fn", _dense_dispatch)
    reference, ours = randomised(diffusers_model(TINY)), DiffusionTransformer3D(TINY)
    ours.load_state_dict(reference.state_dict(), strict=True)
    x, text, pooled = inputs(TINY, SHAPE)
    near = diffusers.Kandinsky5T2VPipeline.fast_sta_nabla(3, 1, 2, 1, 1, 1, device="cpu")
    with torch.inference_mode():
        expected = reference(
            hidden_states=x[None],
            encoder_hidden_states=text[None],
            timestep=torch.tensor([0.4]) * 1000,
            pooled_projections=pooled[None],
            visual_rope_pos=[torch.arange(size) for size in (3, 8, 16)],
            text_rope_pos=torch.arange(len(text)),
            scale_factor=(1.0, 2.0, 2.0),
            sparse_params={"to_fractal": True, "P": 0.6, "sta_mask": near[None, None]},
            return_dict=False,
        )[0]
        velocity = ours(x, text, pooled, 0.4, rope_scale=(1.0, 2.0, 2.0), sparse=PARAMS)
        full = ours(x, text, pooled, 0.4, rope_scale=(1.0, 2.0, 2.0))
    assert relative_error(velocity, expected) <= 1e-5
    assert relative_error(velocity, full) > 1e-4


class _Float32Torch:
    """torch in whose eyes bfloat16 is float32: diffusers rounds rotated queries always."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _dense_dispatch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any, **_: Any
) -> torch.Tensor:
    mask = None
    if attn_mask is not None:
        counts, indices = attn_mask.full_kv_num_blocks, attn_mask.full_kv_indices
        blocks = indices.shape[-1]
        used = (torch.arange(blocks) < counts[..., None]).expand_as(indices)
        mask = torch.zeros_like(indices, dtype=torch.bool).scatter_(-1, indices.long(), used)
        mask = mask.repeat_interleave(64, -1).repeat_interleave(64, -2)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def test_with_all_kept_the_model_gives_what_full_attention_gives() -> None:
    """The demo's smallest grid among them: 128 px are 8×8 tokens."""
    model = tiny()
    with torch.inference_mode():
        for shape in ((7, 16, 16), SHAPE):
            given = inputs(TINY, shape)
            sparse = model(*given, 0.5, sparse=NablaParams(1.0, 11, 3, 3))
            assert relative_error(sparse, model(*given, 0.5)) <= 1e-6


def test_chunks_and_branches_change_nothing_with_nabla() -> None:
    model = tiny()
    x, *first = inputs(TINY, SHAPE)
    _, *second = inputs(TINY, SHAPE, text_length=12, seed=2)
    with torch.inference_mode():
        plain = [model(x, *prompt, 0.5, sparse=PARAMS) for prompt in (first, second)]
        branches = model._conditioned([(*prompt, 0.5) for prompt in (first, second)])
        model.chunks = ActivationChunks(tokens=100, heads=1)
        positions = model.positions(x, sparse=PARAMS)
        velocities = model.evaluate(positions.order.arranged(x), branches, positions)
        for ours, expected in zip(velocities, plain, strict=True):
            assert relative_error(positions.order.restored(ours), expected) <= 1e-6


@pytest.mark.parametrize("shape", [(3, 8, 16), (3, 16, 24)])
def test_a_size_that_tiles_do_not_cover_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 8.*128"):
        tiny()(*inputs(TINY, shape), 0.5, sparse=PARAMS)


# Memory


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    return BENCHES["nabla"].run({"heads": 2})


def test_the_map_takes_at_most_a_sixteenth_of_all_heads_at_once(benchmark: dict[str, Any]) -> None:
    assert benchmark["reached"] and benchmark["same_blocks"]
    assert benchmark["cases"][0]["blocks"] == 3904
    for counted in benchmark["cases"]:
        assert counted["peak_bytes"] * 16 <= counted["all_heads_peak_bytes"]


def test_the_plan_reckons_with_what_is_counted(benchmark: dict[str, Any]) -> None:
    assert activations.NABLA_HEADS_TOGETHER == nabla.HEADS_TOGETHER
    assert activations.NABLA_MAP_PAIRS == nabla.MAP_PAIRS
    assert activations.NABLA_BLOCK_TOKENS == nabla.BLOCK_TOKENS
    for counted in benchmark["cases"]:
        shape = TRANSFORMERS[counted["model"]]
        size = activations.EvaluationSize(
            tokens=math.prod(counted["grid"]),
            model_dim=shape.model_dim,
            ff_dim=shape.ff_dim,
            heads=shape.heads,
            head_dim=shape.head_dim,
            sparse=True,
        )
        planned = activations.nabla_map_bytes(size, shape.heads)
        assert counted["peak_bytes"] == pytest.approx(planned, rel=0.15)


def test_the_plan_reckons_with_a_whole_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tests/model/test_bench.py does for full attention; a fused kernel allocates its output alone."""
    monkeypatch.setattr(nabla, "plain_blocks", lambda query, *_: torch.empty_like(query))
    monkeypatch.setattr(bench, "DiffusionTransformer3D", _AlwaysSparse)
    case = bench.Case("pro", 1024, 1024, 121, 1, ActivationChunks(16384, 8))
    shape = TRANSFORMERS[case.model]
    inputs_bytes, peak_bytes = bench.peak_of_evaluation(shape, case)
    size = activations.EvaluationSize(
        tokens=case.tokens,
        model_dim=shape.model_dim,
        ff_dim=shape.ff_dim,
        heads=shape.heads,
        head_dim=shape.head_dim,
        branches=case.branches,
        sparse=True,
    )
    planned = activations.activation_bytes(
        size, chunk_tokens=case.chunks.tokens, chunk_heads=case.chunks.heads
    )
    assert peak_bytes - inputs_bytes == pytest.approx(planned, rel=0.10)


class _AlwaysSparse(DiffusionTransformer3D):
    def positions(self, *args: Any, **options: Any) -> VisualPositions:
        return super().positions(*args, **options, sparse=NablaParams(0.8, 11, 3, 3))


def test_a_benchmark_of_no_heads_is_refused() -> None:
    with pytest.raises(UserError, match="heads"):
        BENCHES["nabla"].run({"heads": 0})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 128])
def test_the_compiled_kernel_equals_the_plain_way(dim: int) -> None:
    device, grid = torch.device("cuda"), (9, 16, 24)
    given = [t.to(device, torch.bfloat16) for t in drawn(grid, heads=6, dim=dim)]
    params = NablaParams(0.7, 3, 1, 1)
    plain = NablaAttention(params, grid, device, nabla.plain_blocks)(*given)
    assert relative_error(NablaAttention(params, grid, device)(*given), plain) <= 1e-2

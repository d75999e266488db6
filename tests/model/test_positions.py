"""Tokens in the order of tiles: a stacked latent instead of tokens that are moved in every evaluation."""

from __future__ import annotations

import pytest
import torch

from kandinsky5.model.attention import NablaParams
from kandinsky5.model.chunks import ActivationChunks
from kandinsky5.model.dit import DiffusionTransformer3D, Residual, StepConditioning
from kandinsky5.model.layers import VisualEmbeddings
from kandinsky5.model.nabla import NablaAttention
from kandinsky5.model.positions import TokenOrder
from kandinsky5.model.rope import rope_angles_3d, rope_of
from kandinsky5.model.text import Conditioning
from tests.model.tiny_dit import TINY, changed, inputs, tiny

SHAPE = (2, 32, 32)
GRID = (2, 16, 16)
PARAMS = NablaParams(0.6, 1, 1, 1)
SCALE = (1.0, 2.0, 2.0)
CPU = torch.device("cpu")


def tiles_of(grid: tuple[int, int, int]) -> list[int]:
    """Places in raster order of the tokens as they come tile after tile, counted out."""
    frames, height, width = grid
    return [
        (t * height + tile_row * 8 + row) * width + tile_column * 8 + column
        for t in range(frames)
        for tile_row in range(height // 8)
        for tile_column in range(width // 8)
        for row in range(8)
        for column in range(8)
    ]


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("grid", [(1, 8, 8), (2, 8, 24), (2, 24, 8), (3, 16, 24)], ids=str)
def test_the_raster_order_of_an_arranged_latents_tokens_is_tile_after_tile(grid, patch) -> None:
    frames, height, width = (tokens * part for tokens, part in zip(grid, patch, strict=True))
    order = TokenOrder((frames, height, width), patch, by_tiles=True)
    assert order.grid == grid
    x = torch.randn(2, frames, height, width, 5)
    embed = VisualEmbeddings(5, 7, patch)
    with torch.no_grad():
        together, tokens = (embed(latent).flatten(1, 3) for latent in (order.arranged(x), x))
    assert torch.equal(together, tokens[:, tiles_of(grid)])
    assert torch.equal(order.arranged_tokens(tokens[1]), together[1])
    assert torch.equal(order.restored_tokens(together[1]), tokens[1])
    assert torch.equal(order.restored(order.arranged(x)), x)


def test_full_attention_moves_nothing() -> None:
    order = TokenOrder(SHAPE, (1, 2, 2))
    x = torch.randn(*SHAPE, 3)
    assert order.arranged(x) is order.restored(x) is x
    assert order.arranged_grid == order.grid == GRID
    assert order.arranged_tokens(x) is order.restored_tokens(x) is x


@torch.inference_mode()
def by_moving_tokens(
    model: DiffusionTransformer3D, x: torch.Tensor, branches: list[StepConditioning]
) -> list[torch.Tensor]:
    """Evaluations with NABLA that put the tokens into the order of tiles and back, each by itself."""
    places = tiles_of(GRID)
    rope = rope_of(rope_angles_3d(GRID, TINY.axes_dims, SCALE, CPU).flatten(0, 2)[places])
    engine, velocities = NablaAttention(PARAMS, GRID, CPU), []
    for branch in branches:
        stream = model.visual_embeddings(x).flatten(0, 2)[places]
        for block, modulation in zip(model.visual_transformer_blocks, branch.visual, strict=True):
            stream = block(stream, branch.text, modulation, rope, model.chunks, engine)
        raster = torch.empty_like(stream)
        raster[places] = stream
        velocities.append(model.out_layer(raster, branch.out, GRID, model.chunks))
    return velocities


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> DiffusionTransformer3D:
    return tiny(changed(TINY, num_visual_blocks=2)).to(getattr(torch, request.param))


@pytest.fixture(scope="module")
def branches(model: DiffusionTransformer3D) -> list[StepConditioning]:
    prompts = [inputs(TINY, SHAPE, length, seed)[1:] for length, seed in ((7, 1), (12, 2))]
    with torch.inference_mode():
        (both,) = model.prepare([Conditioning(*prompt) for prompt in prompts], [0.4])
    return both


@pytest.mark.parametrize("chunks", [ActivationChunks(), ActivationChunks(tokens=100, heads=1)])
def test_an_evaluation_equals_one_that_moves_its_tokens_to_the_bit(
    model, branches, chunks, monkeypatch
) -> None:
    monkeypatch.setattr(model, "chunks", chunks)
    x, text, pooled = inputs(TINY, SHAPE)
    expected = by_moving_tokens(model, x, branches)
    with torch.inference_mode():
        positions = model.positions(x, rope_scale=SCALE, sparse=PARAMS)
        velocities = model.evaluate(positions.order.arranged(x), branches, positions)
        alone = model(x, text, pooled, 0.4, rope_scale=SCALE, sparse=PARAMS)
    for velocity, wanted in zip(velocities, expected, strict=True):
        assert torch.equal(positions.order.restored(velocity), wanted)
    assert torch.equal(alone, expected[0]), "one evaluation by itself: raster in, raster out"
    assert not torch.equal(velocities[0].flatten(0, 2), expected[0].flatten(0, 2))


def test_between_embedding_and_output_no_token_moves(model, branches) -> None:
    """The blocks write in place: what reaches the output layer is the memory that was embedded."""
    x = inputs(TINY, SHAPE)[0]
    seen: list[int] = []
    handles = [
        model.visual_embeddings.register_forward_hook(
            lambda _, args, out: seen.append(out.data_ptr())
        ),
        model.out_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].data_ptr())),
    ]
    with torch.inference_mode():
        positions = model.positions(x, sparse=PARAMS)
        model.evaluate(positions.order.arranged(x), branches[:1], positions)
    for handle in handles:
        handle.remove()
    assert len(seen) == 2 and seen[0] == seen[1]


def test_what_the_blocks_added_stands_in_for_them_in_the_order_of_its_evaluation(
    model, branches
) -> None:
    """And, put back into raster order, in an evaluation with full attention too."""
    x, kept = inputs(TINY, SHAPE)[0], Residual()
    with torch.inference_mode():
        positions = model.positions(x, sparse=PARAMS)
        order, arranged = positions.order, positions.order.arranged(x)
        model.evaluate(arranged, branches[:1], positions, residuals=[kept])
        (again,) = model.evaluate(arranged, branches[:1], positions, residuals=[kept])
        assert kept.value is not None
        raster = Residual(order.restored_tokens(kept.value))
        (full,) = model.evaluate(x, branches[:1], model.positions(x), residuals=[raster])
    assert torch.equal(order.restored(again), full)


def test_a_latent_in_another_order_is_refused(model, branches) -> None:
    x = inputs(TINY, SHAPE)[0]
    positions = model.positions(x, sparse=PARAMS)
    with pytest.raises(ValueError, match=r"\(2, 32, 32\)"):
        model.evaluate(x, branches, positions)
    with pytest.raises(ValueError, match="positions"):
        model.evaluate(positions.order.arranged(x), branches, model.positions(x))


def test_a_batch_with_nabla_can_be_trained_on() -> None:
    model = tiny(changed(TINY, num_visual_blocks=1))
    x, text, pooled = (torch.stack([part, part.flip(0)]) for part in inputs(TINY, (1, 16, 32)))
    x.requires_grad_()
    velocity = model(x, text, pooled, torch.tensor([0.2, 0.9]), sparse=PARAMS)
    with torch.inference_mode():
        first = model(x[0], text[0], pooled[0], 0.2, sparse=PARAMS)
    torch.testing.assert_close(velocity[0].detach(), first, rtol=1e-4, atol=1e-5)
    velocity.square().mean().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert model.visual_embeddings.in_layer.weight.grad.isfinite().all()

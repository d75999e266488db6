"""Conditionings made beforehand, branches fused, chunks: the numbers of a plain forward with less at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from int8 import Int8Linear
from kandinsky5.model.chunks import ActivationChunks
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.layers import modulated_norm
from kandinsky5.model.text import Conditioning
from tests.model.tiny_dit import TINY, changed, inputs, relative_error, tiny

DEMO_LIKE = changed(TINY, model_dim=192, ff_dim=768, num_text_blocks=1, num_visual_blocks=2)
TIMES = [1.0, 0.7312, 0.25]
SHAPE = (3, 8, 12)
ROPE_SCALE = (1.0, 2.0, 2.0)


def prompts(config: DiTConfig) -> list[Conditioning]:
    """Two of different length."""
    lengths = {7: 1, 12: 2}
    given = (inputs(config, SHAPE, length, seed) for length, seed in lengths.items())
    return [Conditioning(text, pooled) for _, text, pooled in given]


def latent(config: DiTConfig) -> torch.Tensor:
    return inputs(config, SHAPE)[0]


@torch.inference_mode()
def forwards(model: DiffusionTransformer3D, time: float) -> list[torch.Tensor]:
    """One evaluation after the other, each by itself."""
    x = latent(model.config)
    return [
        model(x, prompt.text, prompt.pooled, time, rope_scale=ROPE_SCALE)
        for prompt in prompts(model.config)
    ]


@pytest.mark.parametrize("config", [TINY, DEMO_LIKE], ids=["tiny", "demo-like"])
def test_prepared_and_fused_branches_equal_separate_forwards_to_the_bit(config: DiTConfig) -> None:
    model, x = tiny(config), latent(config)
    before = x.clone()
    with torch.inference_mode():
        schedule = model.prepare(prompts(config), TIMES)
        positions = model.positions(x, rope_scale=ROPE_SCALE)
        assert [len(branches) for branches in schedule] == [2, 2, 2]
        for time, branches in zip(TIMES, schedule, strict=True):
            velocities = model.evaluate(x, branches, positions)
            for ours, plain in zip(velocities, forwards(model, time), strict=True):
                assert torch.equal(ours, plain)
    assert torch.equal(x, before)


def test_the_loop_needs_no_weight_that_was_needed_for_its_conditionings() -> None:
    model = tiny()
    expected = forwards(model, 0.5)
    with torch.inference_mode():
        (branches,) = model.prepare(prompts(TINY), [0.5])
    parts = [
        model.text_embeddings,
        model.pooled_text_embeddings,
        model.time_embeddings,
        model.text_transformer_blocks,
        model.visual_modulations,
        model.out_layer.modulation,
    ]
    for part in parts:
        part.to("meta")
    left = {name.split(".")[0] for name, w in model.state_dict().items() if not w.is_meta}
    assert left == {"visual_embeddings", "visual_transformer_blocks", "out_layer"}
    x = latent(TINY)
    with torch.inference_mode():
        velocities = model.evaluate(x, branches, model.positions(x, rope_scale=ROPE_SCALE))
    assert all(map(torch.equal, velocities, expected))


def visits(blocks: nn.ModuleList) -> list[int]:
    """Filled with the index of each block that is called."""
    seen: list[int] = []
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda module, args, index=index: seen.append(index))
    return seen


def test_preparing_and_evaluating_call_each_block_for_all_before_the_next() -> None:
    model, x = tiny(), latent(TINY)
    text, modulations, visual = (
        visits(blocks)
        for blocks in (
            model.text_transformer_blocks,
            model.visual_modulations,
            model.visual_transformer_blocks,
        )
    )
    with torch.inference_mode():
        schedule = model.prepare(prompts(TINY), TIMES)
        assert text == [0] * 6 + [1] * 6
        assert modulations == [0, 1, 2]
        for branches in schedule:
            model.evaluate(x, branches, model.positions(x))
    assert visual == [0, 0, 1, 1, 2, 2] * 3
    assert len(text) == 12 and len(modulations) == 3


def test_every_tensor_that_stays_goes_through_keep() -> None:
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.clone())
        return kept[-1]

    with torch.inference_mode():
        schedule = tiny().prepare(prompts(TINY), TIMES, keep=keep)
    stored = [
        tensor
        for branches in schedule
        for branch in branches
        for tensor in (branch.text, *branch.visual, branch.out)
    ]
    assert {id(tensor) for tensor in stored} == {id(tensor) for tensor in kept}
    assert len(kept) == 6 * (1 + TINY.num_visual_blocks + 1)


@pytest.mark.parametrize("config", [TINY, DEMO_LIKE], ids=["tiny", "demo-like"])
@pytest.mark.parametrize(
    "chunks",
    [
        ActivationChunks(tokens=1),
        ActivationChunks(tokens=17),
        ActivationChunks(tokens=71, heads=1),
        ActivationChunks(tokens=24, heads=2),
        ActivationChunks(heads=1),
        ActivationChunks(tokens=10_000, heads=10_000),
    ],
    ids=str,
)
def test_chunks_change_the_order_of_sums_at_most(
    config: DiTConfig, chunks: ActivationChunks
) -> None:
    model, x = tiny(config), latent(config)
    expected = forwards(model, 0.5)
    with torch.inference_mode():
        (branches,) = model.prepare(prompts(config), [0.5])
        model.chunks = chunks
        velocities = model.evaluate(x, branches, model.positions(x, rope_scale=ROPE_SCALE))
    for ours, plain in zip(velocities, expected, strict=True):
        assert relative_error(ours, plain) <= 1e-6


def test_chunks_work_on_a_batch_too() -> None:
    model = tiny()
    x, text, pooled = (torch.stack([part, part.flip(0)]) for part in inputs(TINY))
    times = torch.tensor([0.2, 0.9])
    with torch.inference_mode():
        plain = model(x, text, pooled, times)
        model.chunks = ActivationChunks(tokens=17, heads=1)
        assert relative_error(model(x, text, pooled, times), plain) <= 1e-6


def test_training_takes_no_notice_of_chunks_and_overwrites_nothing() -> None:
    gradients = []
    for chunks in (ActivationChunks(), ActivationChunks(tokens=5, heads=1)):
        model = tiny()
        model.chunks = chunks
        model(*inputs(TINY), 0.5).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(g is not None and g.any() for g in gradients[0])
    assert all(map(torch.equal, *gradients))


class Fused(nn.Linear):
    """Offers all that a layer may offer, computed plainly, and notes what was asked for."""

    asked: dict[str, int]

    def together(self, x: torch.Tensor, layers: Sequence[Fused]) -> tuple[torch.Tensor, ...]:
        self._note("together")
        return tuple(F.linear(x, layer.weight, layer.bias) for layer in layers)

    def after_norm(
        self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, layers: Sequence[Fused]
    ) -> tuple[torch.Tensor, ...]:
        self._note("after_norm")
        normed = modulated_norm(x, shift, scale)
        return tuple(F.linear(normed, layer.weight, layer.bias) for layer in layers)

    def after_gelu(self, x: torch.Tensor) -> torch.Tensor:
        self._note("after_gelu")
        return F.linear(F.gelu(x), self.weight, self.bias)

    def _note(self, what: str) -> None:
        self.asked[what] = self.asked.get(what, 0) + 1


def test_what_a_layer_offers_is_used_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Fused, "asked", {}, raising=False)
    model = DiffusionTransformer3D(TINY, linear=Fused).eval()
    model.load_state_dict(tiny().state_dict())
    assert all(map(torch.equal, forwards(model, 0.5), forwards(tiny(), 0.5)))
    text, visual = TINY.num_text_blocks, TINY.num_visual_blocks
    # two forwards; self-attention and feed-forward everywhere, cross-attention in visual blocks
    assert Fused.asked == {
        "after_norm": 2 * (2 * text + 3 * visual),
        "after_gelu": 2 * (text + visual),
        "together": 2 * visual,
    }


def test_layers_of_two_kinds_beside_each_other_are_called_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Fused, "asked", {}, raising=False)
    model = DiffusionTransformer3D(TINY, linear=Fused).eval()
    model.load_state_dict(tiny().state_dict())
    for block in (*model.text_transformer_blocks, *model.visual_transformer_blocks):
        plain = nn.Linear(TINY.model_dim, TINY.model_dim)
        plain.load_state_dict(block.self_attention.to_key.state_dict())
        block.self_attention.to_key = plain
    assert all(map(torch.equal, forwards(model, 0.5), forwards(tiny(), 0.5)))
    text, visual = TINY.num_text_blocks, TINY.num_visual_blocks
    assert Fused.asked["after_norm"] == 2 * (text + 2 * visual)


def test_int8_layers_are_cut_into_groups_of_heads_like_any_other() -> None:
    plain = tiny(changed(TINY, model_dim=256, ff_dim=256))
    quantised = DiffusionTransformer3D(plain.config, linear=Int8Linear).eval()
    state: dict[str, Any] = plain.state_dict()
    for name, module in plain.named_modules():
        if isinstance(quantised.get_submodule(name), Int8Linear):
            layer = Int8Linear.from_linear(module)
            state |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    quantised.load_state_dict(state)
    whole = forwards(quantised, 0.5)
    quantised.chunks = ActivationChunks(tokens=17, heads=1)
    for ours, expected, reference in zip(
        forwards(quantised, 0.5), whole, forwards(plain, 0.5), strict=True
    ):
        # a rounding step of the input may tip over where a sum came out a bit differently
        assert relative_error(ours, expected) <= 2e-3
        assert 1e-4 < relative_error(expected, reference) < 5e-2

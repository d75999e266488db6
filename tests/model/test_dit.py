"""The transformer against diffusers' independent one, and what stays exact in half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kandinsky5.model.attention import NablaParams, sdpa
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.layers import Modulation, TimeEmbeddings
from tests.model.tiny_dit import TINY, changed, inputs, randomised, relative_error, tiny

LITE = DiTConfig()
PRO = DiTConfig(
    time_dim=1024,
    model_dim=4096,
    ff_dim=16384,
    num_text_blocks=4,
    num_visual_blocks=60,
    axes_dims=(32, 48, 48),
)
IMAGE = DiTConfig(
    model_dim=2560, ff_dim=10240, num_visual_blocks=50, axes_dims=(32, 48, 48), visual_cond=False
)


def diffusers_model(config: DiTConfig) -> Any:
    diffusers = pytest.importorskip("diffusers")
    values = {name: value for name, value in vars(config).items() if name != "instruct_type"}
    return diffusers.Kandinsky5Transformer3DModel(**values)


@pytest.fixture
def float32_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers rounds rotated queries and keys to bfloat16 always; not while we compare."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_kandinsky")

    class Float32Torch:
        bfloat16 = torch.float32

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(module, "torch", Float32Torch())


# Parity


@torch.inference_mode()
def diffusers_velocity(
    model: Any,
    x: torch.Tensor,
    text: torch.Tensor,
    pooled: torch.Tensor,
    time: float,
    rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> torch.Tensor:
    grid = [size // patch for size, patch in zip(x.shape[:3], model.config.patch_size, strict=True)]
    return model(
        hidden_states=x[None],
        encoder_hidden_states=text[None],
        timestep=torch.tensor([time]) * 1000,
        pooled_projections=pooled[None],
        visual_rope_pos=[torch.arange(size) for size in grid],
        text_rope_pos=torch.arange(len(text)),
        scale_factor=rope_scale,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("visual_cond", [True, False], ids=["conditioned", "plain"])
@pytest.mark.parametrize(
    ("shape", "text_length", "time", "rope_scale"),
    [
        ((1, 2, 2), 1, 1.0, (1.0, 1.0, 1.0)),
        ((3, 8, 12), 7, 0.7312, (1.0, 2.0, 2.0)),
        ((5, 6, 10), 255, 0.0417, (1.0, 3.16, 3.16)),
        ((2, 30, 4), 1, 0.0, (1.0, 2.0, 2.0)),
        ((7, 2, 18), 33, 0.5, (1.0, 1.0, 1.0)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("float32_rotation")
def test_velocity_equals_diffusers(
    visual_cond: bool,
    shape: tuple[int, int, int],
    text_length: int,
    time: float,
    rope_scale: tuple[float, float, float],
) -> None:
    config = changed(TINY, visual_cond=visual_cond)
    reference, ours = randomised(diffusers_model(config)), DiffusionTransformer3D(config)
    ours.load_state_dict(reference.state_dict(), strict=True)
    x, text, pooled = inputs(config, shape, text_length)
    expected = diffusers_velocity(reference, x, text, pooled, time, rope_scale)
    with torch.inference_mode():
        for moment in (time, torch.tensor(time)):
            velocity = ours(x, text, pooled, moment, rope_scale=rope_scale)
            assert velocity.shape == (*shape, config.out_visual_dim)
            assert velocity.dtype == torch.float32
            assert relative_error(velocity, expected) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"axes_dims": (32, 48, 48), "model_dim": 256},
        {"patch_size": (1, 1, 1), "out_visual_dim": 5},
        {"in_visual_dim": 4, "num_text_blocks": 1, "num_visual_blocks": 1, "time_dim": 96},
    ],
    ids=["wide heads", "no patches", "few channels"],
)
@pytest.mark.usefixtures("float32_rotation")
def test_other_dimensions_equal_diffusers(changes: dict[str, Any]) -> None:
    config = changed(TINY, **changes)
    reference, ours = randomised(diffusers_model(config)), DiffusionTransformer3D(config)
    ours.load_state_dict(reference.state_dict(), strict=True)
    x, text, pooled = inputs(config, (2, 6, 8))
    expected = diffusers_velocity(reference, x, text, pooled, 0.3)
    with torch.inference_mode():
        velocity = ours(x, text, pooled, 0.3)
    assert relative_error(velocity, expected) <= 1e-5


def test_every_input_and_weight_takes_part() -> None:
    """Parity says little about a path whose weights do nothing."""
    model = tiny()
    x, text, pooled = inputs(TINY)

    def velocity(**changes: Any) -> torch.Tensor:
        given = {"x": x, "text_embed": text, "pooled_text_embed": pooled, "time": 0.6, **changes}
        with torch.inference_mode():
            return model(**given)

    before = velocity()
    for name, value in {
        "x": x.flip(1),
        "text_embed": text.flip(0),
        "pooled_text_embed": -pooled,
        "time": 0.3,
        "rope_scale": (1.0, 2.0, 2.0),
    }.items():
        assert relative_error(velocity(**{name: value}), before) > 1e-3, name
    for name, parameter in model.named_parameters():
        if name.endswith("to_key.bias"):
            continue  # all but cancelled by the softmax when norms are gentle
        kept = parameter.detach().clone()
        parameter.data.mul_(0.5)
        assert relative_error(velocity(), before) > 1e-6, name
        parameter.data.copy_(kept)


# Names, shapes and counts


@pytest.mark.parametrize(
    ("config", "parameters", "tensors", "columns"),
    [
        (LITE, 2_007_702_848, 814, 132),
        (IMAGE, 6_022_080_576, 1246, 64),
        (PRO, 19_311_325_248, 1514, 132),
    ],
    ids=["lite", "image", "pro"],
)
def test_the_familys_state_dicts_have_the_published_names_and_shapes(
    config: DiTConfig, parameters: int, tensors: int, columns: int
) -> None:
    with torch.device("meta"):
        ours, reference = DiffusionTransformer3D(config), diffusers_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert len(shapes) == tensors
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters
    assert shapes["visual_embeddings.in_layer.weight"][1] == columns


def test_image_editing_takes_condition_channels_too() -> None:
    config = changed(IMAGE, instruct_type="channel")
    with torch.device("meta"):
        model = DiffusionTransformer3D(config)
    assert config.input_channels == 33
    assert model.visual_embeddings.in_layer.weight.shape == (2560, 132)


def test_a_published_config_is_read_and_its_other_keys_passed_over() -> None:
    published = {
        **vars(PRO),
        "axes_dims": [32, 48, 48],
        "patch_size": [1, 2, 2],
        "attention_P": 0.9,
    }
    assert DiTConfig.from_dict(published) == PRO


# One interface for one video and for many


def test_a_batch_gives_what_each_of_its_members_gives() -> None:
    model = tiny()
    members = [inputs(TINY, seed=seed) for seed in range(3)]
    times = torch.tensor([0.1, 0.55, 1.0])
    with torch.inference_mode():
        x, text, pooled = (torch.stack(parts) for parts in zip(*members, strict=True))
        together = model(x, text, pooled, times)
        alone = [model(*member, time) for member, time in zip(members, times, strict=True)]
    assert relative_error(together, torch.stack(alone)) <= 1e-6


def test_the_same_input_gives_the_same_bits() -> None:
    model, given = tiny(), inputs(TINY)
    with torch.inference_mode():
        assert torch.equal(model(*given, 0.5), model(*given, 0.5))


def test_attention_and_linear_layers_come_from_their_factories() -> None:
    made: list[tuple[int, int]] = []
    calls: list[tuple[int, ...]] = []

    class Noted(nn.Linear):
        def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
            super().__init__(in_features, out_features, bias)
            made.append((in_features, out_features))

    def engine(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(query.shape))
        return sdpa(query, key, value)

    model = DiffusionTransformer3D(TINY, attention=engine, linear=Noted)
    blocks = (model.text_transformer_blocks, model.visual_transformer_blocks)
    inside = [
        m
        for block in blocks
        for name, m in block.named_modules()
        if isinstance(m, nn.Linear) and "modulation" not in name
    ]
    assert len(made) == len(inside) == 2 * 6 + 3 * 10
    assert all(isinstance(layer, Noted) for layer in inside)
    with torch.inference_mode():
        model(*inputs(TINY), 0.5)
    assert calls == [(7, 2, 64)] * 2 + [(3 * 4 * 6, 2, 64)] * 6


def test_a_grid_longer_than_the_rotary_tables_is_refused() -> None:
    model = DiffusionTransformer3D(changed(TINY, num_visual_blocks=0, num_text_blocks=0))
    _, text, pooled = inputs(TINY)
    with torch.inference_mode():
        assert model(torch.zeros(1, 2, 256, 33), text, pooled, 0.5).shape == (1, 2, 256, 16)
        for shape in ((129, 2, 2), (1, 258, 2), (1, 2, 258)):
            with pytest.raises(ValueError, match="128"):
                model(torch.zeros(*shape, 33), text, pooled, 0.5)


def test_sparse_attention_is_not_ignored_silently() -> None:
    with pytest.raises(ValueError, match="NABLA"):
        tiny()(*inputs(TINY), 0.5, sparse=NablaParams(0.9, 11, 3, 3))


# Half precision


def rounded_to_bfloat16(model: DiffusionTransformer3D) -> DiffusionTransformer3D:
    """A float32 model with the very values a bfloat16 one has."""
    copy = DiffusionTransformer3D(model.config).eval()
    copy.load_state_dict({name: w.bfloat16().float() for name, w in model.state_dict().items()})
    return copy


def watched(
    model: DiffusionTransformer3D, given: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, dict]:
    """The velocity, and what went in and out of the parts that must stay float32."""
    seen: dict[str, tuple[torch.Tensor, ...]] = {}

    def block_hook(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            vector, rope = (args[1], args[2]) if name == "text" else (args[2], args[3])
            seen[f"{name} vector"], seen[f"{name} rope"] = (vector,), rope

        return hook

    def output_hook(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            seen[name] = out if isinstance(out, tuple) else (out,)

        return hook

    handles = [
        model.text_transformer_blocks[0].register_forward_pre_hook(block_hook("text")),
        model.visual_transformer_blocks[0].register_forward_pre_hook(block_hook("visual")),
    ]
    for name, module in model.named_modules():
        if isinstance(module, (Modulation, TimeEmbeddings)):
            handles.append(module.register_forward_hook(output_hook(name)))
    with torch.inference_mode():
        velocity = model(*given, 0.731, rope_scale=(1.0, 2.0, 2.0))
    for handle in handles:
        handle.remove()
    return velocity, seen


def test_a_bfloat16_model_keeps_angles_time_and_modulation_in_float32() -> None:
    full = rounded_to_bfloat16(tiny())
    half = DiffusionTransformer3D(TINY).eval()
    half.load_state_dict(full.state_dict())
    half.to(torch.bfloat16)
    given = inputs(TINY, (9, 40, 40), text_length=255)
    expected, exact = watched(full, given)
    velocity, seen = watched(half, given)

    assert velocity.dtype == torch.bfloat16
    assert seen.keys() == exact.keys() and len(seen) == 4 + 2 + 3 + 2
    for name, tensors in seen.items():
        for ours, reference in zip(tensors, exact[name], strict=True):
            assert ours.dtype == torch.float32, name
            if "rope" in name or name == "time_embeddings":
                assert torch.equal(ours, reference), name
            else:  # the pooled text beside the time is rounded to bfloat16, as published
                assert relative_error(ours, reference) < 5e-3, name
    assert relative_error(velocity, expected) < 1e-2


def test_modulation_of_a_bfloat16_model_is_computed_from_its_float32_values() -> None:
    torch.manual_seed(0)
    full = Modulation(48, 128, 6)
    nn.init.normal_(full.out_layer.weight, std=0.05)
    half = Modulation(48, 128, 6)
    half.load_state_dict({name: w.bfloat16().float() for name, w in full.state_dict().items()})
    full.load_state_dict(half.state_dict())
    half.to(torch.bfloat16)
    vector = torch.randn(1, 48)
    with torch.inference_mode():
        assert torch.equal(half(vector)[0], full(vector)[0])


def test_rotary_tables_are_not_in_the_model_to_be_cast() -> None:
    assert not list(tiny().buffers())

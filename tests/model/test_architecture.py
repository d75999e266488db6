"""Dimensions from names and shapes, for the published models and for what is none of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from kandinsky5.errors import CheckpointError
from kandinsky5.model.architecture import deduce_config, empty_transformer, settled_config
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig

FILE = Path("file.safetensors")

LITE = DiTConfig()
IMAGE = DiTConfig(
    model_dim=2560,
    ff_dim=10240,
    num_visual_blocks=50,
    axes_dims=(32, 48, 48),
    visual_cond=False,
)
EDIT = dataclasses.replace(IMAGE, instruct_type="channel")
PRO = DiTConfig(
    model_dim=4096,
    ff_dim=16384,
    time_dim=1024,
    num_text_blocks=4,
    num_visual_blocks=60,
    axes_dims=(32, 48, 48),
)
TINY = DiTConfig(
    in_text_dim=24,
    in_text_dim2=12,
    time_dim=32,
    model_dim=64,
    ff_dim=96,
    num_text_blocks=1,
    num_visual_blocks=2,
    axes_dims=(8, 12, 12),
)


def shapes_of(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = DiffusionTransformer3D(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def reason(shapes: dict[str, tuple[int, ...]], stated: dict | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        empty_transformer(FILE, shapes, stated)
    assert "\n" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [(LITE, 2_007_702_848, 814), (IMAGE, 6_022_080_576, 1246), (PRO, 19_311_325_248, 1514)],
    ids=["lite", "image", "pro"],
)
def test_published_models_are_told_from_their_shapes(config, parameters, tensors):
    shapes = shapes_of(config)
    model = empty_transformer(FILE, shapes)
    assert model.config == config
    assert len(model.state_dict()) == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    "config",
    [
        EDIT,
        TINY,
        dataclasses.replace(TINY, visual_cond=False),
        dataclasses.replace(TINY, num_text_blocks=0),
    ],
    ids=["image editing", "tiny", "without conditions", "without text blocks"],
)
def test_other_dimensions_are_told_from_their_shapes(config):
    assert deduce_config(FILE, shapes_of(config)) == config


@pytest.mark.parametrize(
    ("head_dim", "axes"),
    [
        (64, (16, 24, 24)),
        (128, (32, 48, 48)),
        (32, (8, 12, 12)),
        (96, (24, 36, 36)),
        (6, (2, 2, 2)),
    ],
)
def test_a_head_is_split_as_in_the_published_models(head_dim, axes):
    config = dataclasses.replace(TINY, model_dim=4 * head_dim, axes_dims=axes)
    assert deduce_config(FILE, shapes_of(config)).axes_dims == axes


def test_a_config_decides_what_shapes_cannot_tell():
    shapes = shapes_of(TINY)
    stated = {"axes_dims": [16, 8, 8], "visual_cond": False, "instruct_type": "channel"}
    config = settled_config(FILE, shapes, {**stated, "_class_name": "X", "attention_type": "nabla"})
    assert config == dataclasses.replace(
        TINY, axes_dims=(16, 8, 8), visual_cond=False, instruct_type="channel"
    )


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ({"model_dim": 128}, "model_dim 128, its tensors need 64"),
        ({"num_visual_blocks": 3}, "num_visual_blocks 3"),
        ({"patch_size": [1, 4, 4]}, "patch_size"),
        ({"ff_dim": "96"}, "ff_dim"),
        ({"axes_dims": [16, 16, 16]}, "axes_dims"),
        ({"axes_dims": [16, 16]}, "axes_dims"),
        ({"axes_dims": [7, 13, 12]}, "axes_dims"),
        ({"axes_dims": ["8", 12, 12]}, "axes_dims"),
        ({"axes_dims": 32}, "axes_dims"),
        ({"visual_cond": False}, "visual_cond"),
        ({"visual_cond": "yes"}, "visual_cond"),
        ({"in_visual_dim": 8}, "in_visual_dim"),
        ({"in_visual_dim": None}, "in_visual_dim"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_tensors_is_refused(stated, named):
    assert named in reason(shapes_of(TINY), stated)


WAN = {
    "patch_embedding.weight": (1536, 16, 1, 2, 2),
    "blocks.0.self_attn.q.weight": (1536, 1536),
    "head.head.weight": (64, 1536),
}
FLUX = {"double_blocks.0.img_attn.qkv.weight": (9216, 3072), "img_in.weight": (3072, 64)}
SDXL = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
}


@pytest.mark.parametrize(
    ("shapes", "family"),
    [(WAN, "Wan"), (FLUX, "Flux"), (SDXL, "SDXL")],
    ids=["wan", "flux", "sdxl"],
)
def test_another_models_tensors_are_refused_with_the_first_names(shapes, family):
    why = reason(shapes)
    assert why.startswith("not Kandinsky 5")
    assert family in why
    assert "first missing tensor 'time_embeddings.in_layer.weight'" in why
    assert f"first unexpected {next(iter(shapes))!r}" in why


def test_no_tensors_at_all_are_not_kandinsky():
    assert reason({}).startswith("not Kandinsky 5")


def test_missing_unexpected_and_reshaped_tensors_are_counted_and_named():
    shapes = shapes_of(TINY)
    del shapes["visual_transformer_blocks.1.cross_attention.key_norm.weight"]
    shapes["visual_transformer_blocks.1.extra"] = (1,)
    shapes["out_layer.out_layer.bias"] = (3,)
    why = reason(shapes)
    assert "1 tensors missing (first 'visual_transformer_blocks.1.cross_attention.key_norm" in why
    assert "1 unexpected (first 'visual_transformer_blocks.1.extra')" in why
    assert "first 'out_layer.out_layer.bias': [3], expected [64]" in why


def test_a_missing_block_is_named():
    shapes = {
        name: shape
        for name, shape in shapes_of(dataclasses.replace(TINY, num_visual_blocks=4)).items()
        if not name.startswith("visual_transformer_blocks.2.")
    }
    assert "visual_transformer_blocks.2 is missing" in reason(shapes)


def test_a_forged_number_of_blocks_builds_nothing():
    shapes = {f"visual_transformer_blocks.{i}.x": (1,) for i in range(100_000)}
    assert "at most 512" in reason({**shapes_of(TINY), **shapes})
    shapes = {**shapes_of(TINY), "visual_transformer_blocks.4000000000.x": (1,)}
    assert "visual_transformer_blocks.2 is missing" in reason(shapes)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("visual_embeddings.in_layer.weight", (64,)),
        ("visual_embeddings.in_layer.weight", (64, 131)),
        ("visual_embeddings.in_layer.weight", (0, 132)),
        ("visual_transformer_blocks.0.self_attention.query_norm.weight", (31,)),
        ("visual_transformer_blocks.0.self_attention.query_norm.weight", (4,)),
        ("out_layer.out_layer.weight", ()),
    ],
    ids=str,
)
def test_shapes_no_such_model_can_have_are_refused(name, shape):
    assert reason({**shapes_of(TINY), name: shape}).startswith("not Kandinsky 5")

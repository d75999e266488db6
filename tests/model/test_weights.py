"""Which layers may be quantised, and how weights lie in files of every kind."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_transformer import CONFIG, LAYER, community_int8, save, stored, weights

from kandinsky5.errors import CheckpointError
from kandinsky5.model.checkpoint import Checkpoint
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.weights import is_quantised_layer, stored_tensors

OWN = {
    "k1_format": "k1-int8",
    "k1_version": "1",
    "k1_scheme": json.dumps({"version": 1, "group": 1024, "rotate": True}),
}


def reason(path) -> str:
    with pytest.raises(CheckpointError) as caught, Checkpoint(path) as checkpoint:
        stored_tensors(checkpoint)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_attention_and_feed_forward_of_all_blocks_are_quantised_and_nothing_else():
    with torch.device("meta"):
        model = DiffusionTransformer3D(CONFIG)
    made_by_the_factory = {
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and ("attention." in name or "feed_forward." in name)
    }
    assert {name for name in model.state_dict() if is_quantised_layer(name)} == made_by_the_factory
    assert len(made_by_the_factory) == 6 * 1 + 10 * 2


@pytest.mark.parametrize(
    "name",
    [
        "out_layer.out_layer.weight",
        "visual_transformer_blocks.0.visual_modulation.out_layer.weight",
        "visual_transformer_blocks.0.self_attention.query_norm.weight",
        "visual_transformer_blocks.0.self_attention.to_query.bias",
        "text_transformer_blocks.0.cross_attention.to_query.weight",
        "visual_transformer_blocks.x.self_attention.to_query.weight",
        "visual_embeddings.in_layer.weight",
    ],
)
def test_what_is_small_or_decides_quality_is_not_quantised(name):
    assert not is_quantised_layer(name)


def int8_tensors() -> dict[str, torch.Tensor]:
    return stored(community_int8, weights())


SCALES = f"{LAYER}.weight_scales"


@pytest.mark.parametrize(
    ("scales", "says"),
    [
        (torch.zeros(64, 2), "is F32 [64, 2], its weight needs F32 [64, 1]"),
        (torch.zeros(64), "is F32 [64], its weight"),
        (torch.zeros(64, 1).half(), "is F16 [64, 1], its weight"),
        (None, f"'{LAYER}.weight' is int8 and '{SCALES}' missing"),
    ],
    ids=["too many", "one axis", "another dtype", "none"],
)
def test_int8_scales_that_do_not_fit_are_refused(tmp_path, scales, says):
    tensors = int8_tensors()
    del tensors[SCALES]
    if scales is not None:
        tensors[SCALES] = scales
    assert says in reason(save(tmp_path / "dit.safetensors", tensors))


@pytest.mark.parametrize("shape", [(2,), (64, 2), (1, 64, 1)], ids=str)
def test_fp8_scales_that_do_not_fit_are_refused(tmp_path, shape):
    tensors = weights()
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{LAYER}.weight_scale"] = torch.ones(shape)
    assert "scales do not fit" in reason(save(tmp_path / "dit.safetensors", tensors))


def test_a_scale_without_a_weight_is_refused(tmp_path):
    tensors = int8_tensors() | {"elsewhere.weight_scale": torch.ones(())}
    path = save(tmp_path / "dit.safetensors", tensors)
    assert reason(path) == "'elsewhere.weight_scale' is the scale of no weight"


def test_a_weight_stored_twice_is_refused(tmp_path):
    tensors = int8_tensors() | {f"{LAYER}.weight": torch.zeros(64, 64)}
    path = save(tmp_path / "dit.safetensors", tensors)
    assert reason(path) == f"'{LAYER}.weight' is stored twice"


def test_int8_without_a_word_about_how_is_refused(tmp_path):
    tensors = {name.replace("_int8", ""): tensor for name, tensor in int8_tensors().items()}
    text = reason(save(tmp_path / "dit.safetensors", tensors))
    assert "dtype I8 and the header does not say how it was quantised" in text


def test_int8_without_inputs_is_refused(tmp_path):
    tensors = {"x.weight_int8": torch.zeros(4, 0, dtype=torch.int8)}
    assert "both at least 1" in reason(save(tmp_path / "dit.safetensors", tensors))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"k1_version": "2"}, "'k1-int8' version '2', this program reads 'k1-int8' version 1"),
        ({"k1_version": ""}, "version ''"),
        ({"k1_format": "k1-int8-packed"}, "'k1-int8-packed' version '1'"),
        ({"k1_scheme": "{"}, "k1_scheme"),
        ({"k1_scheme": "[]"}, "not a JSON object"),
        ({"k1_scheme": '{"version": 99}'}, "99"),
        ({"k1_scheme": '{"version": 1, "group": 100, "rotate": true}'}, "100"),
    ],
    ids=str,
)
def test_own_int8_of_another_version_or_damaged_is_refused_by_name(tmp_path, changes, says):
    assert says in reason(save(tmp_path / "dit.safetensors", weights(), OWN | changes))

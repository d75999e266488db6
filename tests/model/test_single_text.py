"""Text encoders as single files compute what transformers' do, in fp8 with its scales; others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_models import (
    clip,
    clip_as_published,
    dequantised,
    in_scaled_fp8,
    qwen,
    qwen_as_published,
    write,
)
from sparse_files import Described, write_sparse

from kandinsky5.errors import CheckpointError
from kandinsky5.model.facts import text_encoder_facts
from kandinsky5.model.part_kinds import PartKind, part_kind
from kandinsky5.model.text_generation import OutputLayer, can_write
from kandinsky5.model.text_loading import (
    EncoderReader,
    load_clip,
    load_picture_processor,
    load_qwen,
    load_vision_tower,
    without_parts,
)
from kandinsky5.model.text_names import OUTER_NAMES, TOWER_NAMES, stored_names
from kandinsky5.model.text_shapes import (
    clip_config,
    empty_clip,
    empty_qwen,
    qwen_dimensions,
    qwen_file_config,
)

CPU = torch.device("cpu")
FLOAT32 = {"device": CPU, "dtype": torch.float32}
IDS = torch.tensor([[5, 3, 60, 2, 7, 7, 41, 11]])
NAMINGS = {
    "hub": qwen_as_published,
    "transformers": lambda model: model.state_dict(),
    "ComfyUI": lambda model: {
        f"text_encoders.qwen25_7b.transformer.{name}": t
        for name, t in qwen_as_published(model).items()
    },
}


@pytest.fixture(scope="module")
def model() -> Any:
    return qwen(vocabulary=64)


def hidden_of(language: Any) -> torch.Tensor:
    with torch.inference_mode():
        return language(input_ids=IDS, use_cache=False).last_hidden_state


def assert_same(ours: torch.Tensor, reference: torch.Tensor) -> None:
    assert ours.shape == reference.shape
    assert (ours - reference).norm() / reference.norm() <= 1e-5


@pytest.mark.parametrize("naming", NAMINGS)
def test_qwen_computes_what_transformers_does(tmp_path, model, naming) -> None:
    path = write(tmp_path / "qwen.safetensors", NAMINGS[naming](model))
    assert_same(hidden_of(load_qwen(path, **FLOAT32)), hidden_of(model.model.language_model))


def test_the_vision_tower_of_a_file_sees_what_transformers_sees(tmp_path, model) -> None:
    path = write(tmp_path / "qwen.safetensors", qwen_as_published(model))
    tower = load_vision_tower(path, **FLOAT32)
    patches = torch.randn(8 * 12, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1))
    grid = torch.tensor([[1, 8, 12]])
    with torch.inference_mode():
        ours = tower(patches, grid_thw=grid)
        reference = model.model.visual(patches, grid_thw=grid)
    assert_same(ours.pooler_output, reference.pooler_output)
    assert without_parts(path).config.image_token_id == 151655
    assert load_picture_processor(path).size["shortest_edge"] == 56 * 56


def test_clip_pools_what_transformers_pools(tmp_path) -> None:
    reference = clip(vocabulary=64)
    for prefix in ("", "transformer.", "text_encoders.clip_l.transformer."):
        path = write(tmp_path / "clip_l.safetensors", clip_as_published(reference), prefix)
        ours = load_clip(path, **FLOAT32)
        with torch.inference_mode():
            found, wanted = (m(input_ids=IDS).pooler_output for m in (ours, reference))
        assert_same(found, wanted)


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
def test_scaled_fp8_is_multiplied_out_in_the_jobs_dtype(tmp_path, model, scale) -> None:
    stored = in_scaled_fp8(qwen_as_published(model), scale)
    path = write(tmp_path / "qwen_fp8_scaled.safetensors", stored)
    meant = dequantised(stored)
    loaded = load_qwen(path, **FLOAT32)
    for name in ("layers.0.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight"):
        assert stored[f"model.{name}"].dtype == torch.float8_e4m3fn
        assert torch.equal(loaded.state_dict()[name], meant[f"model.{name}"])
    half = load_qwen(path, device=CPU, dtype=torch.bfloat16).state_dict()
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    for name, tensor in half.items():
        assert torch.equal(tensor, meant[f"model.{name}"].to(torch.bfloat16))
    tower = load_vision_tower(path, **FLOAT32).state_dict()
    assert torch.equal(tower["blocks.0.attn.qkv.weight"], meant["visual.blocks.0.attn.qkv.weight"])
    assert can_write(path)
    layer = OutputLayer.load(path, **FLOAT32)
    assert layer is not None and torch.equal(layer.weight, meant["lm_head.weight"])


def test_scaled_fp8_is_read_layer_by_layer_too(tmp_path, model) -> None:
    stored = in_scaled_fp8(qwen_as_published(model), "scale_weight")
    path = write(tmp_path / "qwen.safetensors", stored)
    name = "layers.1.self_attn.o_proj.weight"
    target = torch.full((128, 128), torch.nan)
    with EncoderReader.of_qwen(path, dtype=torch.float32) as reader:
        reader.read_into({name: target})
    assert torch.equal(target, dequantised(stored)[f"model.{name}"])


def test_a_plain_cast_to_fp8_is_read_as_it_is(tmp_path, model) -> None:
    state = qwen_as_published(model)
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].to(torch.float8_e4m3fn)
    loaded = load_qwen(write(tmp_path / "qwen.safetensors", state), **FLOAT32)
    assert torch.equal(loaded.layers[0].mlp.up_proj.weight, state[name].float())


def test_a_file_without_an_output_layer_cannot_write(tmp_path, model) -> None:
    state = qwen_as_published(model)
    del state["lm_head.weight"]
    path = write(tmp_path / "qwen.safetensors", state)
    assert not can_write(path)
    with pytest.raises(CheckpointError, match="no output layer"):
        OutputLayer.load(path, **FLOAT32)


def test_a_plan_counts_what_the_file_has(tmp_path, model) -> None:
    plain = write(tmp_path / "plain.safetensors", qwen_as_published(model))
    scaled = in_scaled_fp8(qwen_as_published(model), "scale_weight")
    facts = text_encoder_facts(plain)
    assert facts is not None and not facts.tied
    assert (facts.hidden, facts.layers, facts.vocabulary) == (128, 2, 64)
    assert facts.vision_parameters == sum(p.numel() for p in model.model.visual.parameters())
    assert text_encoder_facts(write(tmp_path / "fp8.safetensors", scaled)) == facts


def true_size_qwen() -> Described:
    """Names and shapes of Qwen2.5-VL 7B by transformers' own model, in the names of the hub."""
    transformers = pytest.importorskip("transformers")
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    tower = {"hidden_size": 1280}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower)
    with torch.device("meta"):
        whole = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return {name: ("BF16", tuple(t.shape)) for name, t in qwen_as_published(whole).items()}


@pytest.fixture(scope="module")
def described() -> Described:
    return true_size_qwen()


def test_the_7b_model_has_its_published_configuration_and_tensors(described) -> None:
    shapes = {name: shape for name, (_, shape) in described.items()}
    assert len(shapes) == 729
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 8_292_166_656
    assert part_kind(shapes) == PartKind("text encoder", "qwen2.5-vl", 3584)
    config = qwen_file_config(shapes)
    text, tower = config.text_config, config.vision_config
    assert (text.num_attention_heads, text.num_key_value_heads, text.num_hidden_layers) == (
        28,
        4,
        28,
    )
    assert (text.vocab_size, text.rms_norm_eps, text.rope_parameters["rope_theta"]) == (
        152064,
        1e-6,
        1e6,
    )
    assert text.rope_parameters["mrope_section"] == [16, 24, 24]
    assert (tower.depth, tower.hidden_size, tower.num_heads, tower.out_hidden_size) == (
        32,
        1280,
        16,
        3584,
    )
    assert (tower.intermediate_size, tower.patch_size, tower.spatial_merge_size) == (3420, 14, 2)
    assert (tower.temporal_patch_size, tower.tokens_per_second, tower.window_size) == (2, 2, 112)
    dimensions = qwen_dimensions(shapes)
    assert dimensions is not None
    language = empty_qwen(dimensions)
    assert set(language.state_dict()) <= set(stored_names(OUTER_NAMES, shapes))
    assert len(stored_names(TOWER_NAMES, shapes)) + len(language.state_dict()) + 1 == len(shapes)


def test_clip_l_has_its_published_tensors(tmp_path) -> None:
    published = empty_clip(clip_config()).state_dict()
    state = {f"text_model.{name}": ("F16", tuple(t.shape)) for name, t in published.items()}
    assert len(state) == 196
    path = write_sparse(
        tmp_path / "clip_l.safetensors",
        {**state, "text_projection.weight": ("F16", (768, 768)), "logit_scale": ("F16", ())},
    )
    config = load_clip(path, **FLOAT32).config
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (
        768,
        12,
        12,
    )
    assert (config.hidden_act, config.eos_token_id, config.vocab_size) == ("quick_gelu", 2, 49408)


def refused(path: Path, load: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, **FLOAT32)
    assert caught.value.path == str(path)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_another_file_is_named_as_what_it_is(tmp_path, model) -> None:
    of_qwen = write(tmp_path / "qwen.safetensors", qwen_as_published(model))
    of_clip = write(tmp_path / "clip_l.safetensors", clip_as_published(clip(vocabulary=64)))
    assert "looks like the text encoder clip" in refused(of_clip, load_qwen)
    assert "looks like the text encoder qwen2.5-vl" in refused(of_qwen, load_clip)
    t5 = {"encoder.block.0.layer.0.SelfAttention.q.weight": ("BF16", (4096, 4096))}
    said = refused(write_sparse(tmp_path / "t5.safetensors", t5), load_clip)
    assert "looks like the text encoder t5" in said


def test_a_missing_weight_is_named_before_anything_is_read(tmp_path, described) -> None:
    lacking = dict(described)
    del lacking["model.layers.13.mlp.gate_proj.weight"]
    path = write_sparse(tmp_path / "qwen.safetensors", lacking)
    assert "1 of 338 weights missing, layers.13.mlp.gate_proj.weight first" in refused(
        path, load_qwen
    )


@pytest.mark.parametrize("dtype", ["I8", "U8"])
def test_other_quantisations_are_refused(tmp_path, described, dtype) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    changed = {**described, name: (dtype, described[name][1])}
    path = write_sparse(tmp_path / "qwen.safetensors", changed)
    assert f"'{name}' has dtype {dtype}; weights in bf16, fp16, fp32 or fp8" in refused(
        path, load_qwen
    )


def test_a_scale_that_does_not_fit_is_refused(tmp_path, described) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    changed = {
        **described,
        name: ("F8_E4M3", described[name][1]),
        name.replace(".weight", ".scale_weight"): ("F32", (7,)),
    }
    path = write_sparse(tmp_path / "qwen.safetensors", changed)
    assert "scales do not fit" in refused(path, load_qwen)

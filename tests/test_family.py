"""The tables of dimensions agree with the specification's figures and with the models themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from kandinsky5.family import (
    CLIP_L,
    DEMO_CLIP,
    DEMO_ENCODER,
    DEMO_VAE,
    HUNYUAN_VAE,
    MODEL_SETS,
    QWEN_7B,
    TRANSFORMERS,
    TransformerShape,
    linear_bytes,
)
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.vae import VideoVAE, VideoVAEConfig
from kandinsky5.presets import DEMO_FOLDER, PRESETS


def config_of(shape: TransformerShape) -> DiTConfig:
    is_edit = shape.name == "image-edit"
    return DiTConfig(
        in_text_dim=shape.text_dim,
        in_text_dim2=shape.pooled_dim,
        time_dim=shape.time_dim,
        model_dim=shape.model_dim,
        ff_dim=shape.ff_dim,
        num_text_blocks=shape.text_blocks,
        num_visual_blocks=shape.visual_blocks,
        axes_dims=shape.axes_dims,
        visual_cond=shape.input_channels == 33 and not is_edit,
        instruct_type="channel" if is_edit else None,
    )


def numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(shape: TransformerShape) -> DiffusionTransformer3D:
    with torch.device("meta"):
        return DiffusionTransformer3D(config_of(shape))


@pytest.mark.parametrize("shape", TRANSFORMERS.values(), ids=lambda shape: shape.name)
def test_a_row_counts_what_the_model_has(shape: TransformerShape) -> None:
    model = on_meta(shape)
    assert numbers(model) == shape.parameters
    assert len(model.state_dict()) == shape.tensors
    block = model.visual_transformer_blocks[0]
    assert isinstance(block, nn.Module)
    assert numbers(block) == shape.visual_block_parameters
    assert numbers(model.text_transformer_blocks[0]) == shape.text_block_parameters
    modulation = numbers(block.get_submodule("visual_modulation"))
    assert modulation == shape.modulation_parameters(9)
    assert shape.visual_block_bytes("bf16") == 2 * (numbers(block) - modulation)
    assert shape.total_bytes("bf16") == 2 * shape.parameters


@pytest.mark.parametrize(
    ("name", "parameters", "tensors", "block", "heads"),
    [
        ("lite", 2_007_702_848, 814, 59_668_480, 28),
        ("image", 6_022_080_576, 1246, 116_698_112, 20),
        ("pro", 19_311_325_248, 1514, 306_254_336, 32),
    ],
)
def test_the_rows_are_those_of_the_published_models(
    name: str, parameters: int, tensors: int, block: int, heads: int
) -> None:
    shape = TRANSFORMERS[name]
    found = (shape.parameters, shape.tensors, shape.visual_block_parameters, shape.heads)
    assert found == (parameters, tensors, block, heads)


@pytest.mark.parametrize(
    ("name", "weights", "with_modulation_mb", "streamed_mb"),
    [
        ("pro", "bf16", 612, 537),
        ("pro", "int8", 344, 269),
        ("lite", "bf16", 119, 103),
        ("lite", "int8", 68, 51.5),
        ("image", "bf16", 233, 210),
        ("image", "int8", 129, 105),
    ],
)
def test_block_bytes_are_those_of_the_tables(
    name: str, weights: str, with_modulation_mb: float, streamed_mb: float
) -> None:
    """A1. The tables' int8 figures leave the scales out, which add four thousandths."""
    shape = TRANSFORMERS[name]
    both = (shape.visual_block_bytes(weights, modulation=True), shape.visual_block_bytes(weights))
    assert [value / 1e6 for value in both] == pytest.approx(
        [with_modulation_mb, streamed_mb], rel=0.006
    )


def test_one_pass_over_pro_is_what_the_tables_say() -> None:
    pro = TRANSFORMERS["pro"]
    assert 60 * pro.visual_block_bytes("bf16") / 1e9 == pytest.approx(32.2, abs=0.05)
    assert 60 * pro.visual_block_bytes("int8") <= 16.2e9


def test_int8_counts_scales_and_bf16_biases() -> None:
    assert linear_bytes(8, 2048, "int8") == 8 * 2048 + 8 * 2 * 4 + 8 * 2
    assert linear_bytes(8, 1025, "int8", bias=False) == 8 * 1025 + 8 * 2 * 4


@pytest.mark.parametrize("shape", TRANSFORMERS.values(), ids=lambda shape: shape.name)
def test_a_row_is_found_again_from_a_files_dimensions(shape: TransformerShape) -> None:
    values = dataclasses.asdict(config_of(shape))
    # Lite's channels and the edit model's differ from other rows; equal dimensions are the same row.
    assert TransformerShape.of_config(values) == shape
    assert TransformerShape.of_config({**values, "ff_dim": 8}).name == "custom"


def test_the_video_vaes_have_the_parameters_of_their_rows() -> None:
    demo = VideoVAEConfig(
        block_out_channels=DEMO_VAE.widths, layers_per_block=DEMO_VAE.layers, norm_num_groups=8
    )
    with torch.device("meta"):
        assert numbers(VideoVAE(VideoVAEConfig())) == HUNYUAN_VAE.parameters
        assert numbers(VideoVAE(demo)) == DEMO_VAE.parameters


def test_qwen_has_the_parameters_of_its_row() -> None:
    """Built with few layers, which count alike: whole it would take half a minute."""
    qwen2_5_vl = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    text = qwen2_5_vl.Qwen2_5_VLTextConfig(
        hidden_size=QWEN_7B.hidden,
        intermediate_size=QWEN_7B.intermediate,
        num_attention_heads=28,
        num_hidden_layers=1,
        num_key_value_heads=4,
        vocab_size=QWEN_7B.vocabulary,
    )
    sizes = {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": QWEN_7B.hidden}
    with torch.device("meta"):
        language = qwen2_5_vl.Qwen2_5_VLTextModel(text)
        towers = [
            numbers(qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel(config))
            for config in (qwen2_5_vl.Qwen2_5_VLVisionConfig(depth=d, **sizes) for d in (1, 2))
        ]
    assert numbers(language.layers[0]) == QWEN_7B.layer_parameters
    one_layer = QWEN_7B.language_parameters - 27 * QWEN_7B.layer_parameters
    assert numbers(language) == one_layer
    assert towers[0] + 31 * (towers[1] - towers[0]) == QWEN_7B.vision_parameters
    assert QWEN_7B.total_bytes("bf16", generating=True, pictures=False) == pytest.approx(
        15.2e9, rel=0.005
    )


def test_the_demos_encoders_have_the_parameters_of_their_rows() -> None:
    transformers = pytest.importorskip("transformers")

    def empty(folder: str, model: type[nn.Module]) -> nn.Module:
        path = str(DEMO_FOLDER / folder)
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            return model(getattr(config, "text_config", config))

    qwen = empty("text_encoder", transformers.Qwen2_5_VLTextModel)
    assert numbers(qwen) == DEMO_ENCODER.language_parameters
    assert numbers(empty("text_encoder_2", transformers.CLIPTextModel)) == DEMO_CLIP.parameters
    clip_l = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_attention_heads=12
    )
    with torch.device("meta"):
        assert numbers(transformers.CLIPTextModel(clip_l)) == CLIP_L.parameters


def test_every_preset_has_its_models() -> None:
    assert {preset.model for preset in PRESETS.values()} <= set(MODEL_SETS)

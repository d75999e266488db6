"""What a file is, from its header alone."""

from __future__ import annotations

import json

import pytest
import torch
from sparse_files import Described, shapes_of, write_sparse

from kandinsky5.model.checkpoint import lacking_weights
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.image_vae import ImageVAE, ImageVAEConfig
from kandinsky5.model.inspect import FileReport, inspect_file
from kandinsky5.model.vae import VideoVAE, VideoVAEConfig

LITE = DiTConfig()
IMAGE = DiTConfig(
    model_dim=2560, ff_dim=10240, num_visual_blocks=50, axes_dims=(32, 48, 48), visual_cond=False
)
EDIT = DiTConfig(
    model_dim=2560,
    ff_dim=10240,
    num_visual_blocks=50,
    axes_dims=(32, 48, 48),
    visual_cond=False,
    instruct_type="channel",
)
PRO = DiTConfig(
    model_dim=4096,
    ff_dim=16384,
    time_dim=1024,
    num_text_blocks=4,
    num_visual_blocks=60,
    axes_dims=(32, 48, 48),
)
DEMO = DiTConfig(
    in_text_dim=64,
    in_text_dim2=32,
    time_dim=128,
    model_dim=192,
    ff_dim=768,
    num_text_blocks=1,
    num_visual_blocks=2,
)
CUSTOM = DiTConfig(
    in_text_dim=24,
    in_text_dim2=12,
    time_dim=32,
    model_dim=64,
    ff_dim=96,
    num_text_blocks=1,
    num_visual_blocks=2,
    axes_dims=(8, 12, 12),
)


def dit(config: DiTConfig, dtype: str = "BF16") -> Described:
    return {n: (dtype, s) for n, s in shapes_of(DiffusionTransformer3D, config).items()}


def quantised(weight: str, dtype: str, scale: str | None, groups: int | None = None) -> Described:
    """The custom model with its feed-forward weights under other names and dtypes."""
    tensors = {}
    for name, (own, shape) in dit(CUSTOM).items():
        if ".feed_forward." not in name:
            tensors[name] = (own, shape)
            continue
        layer = name.removesuffix(".weight")
        tensors[layer + weight] = (dtype, shape)
        if scale:
            tensors[layer + scale] = ("F32", () if groups is None else (shape[0], groups))
    return tensors


OWN = {
    "k1_format": "k1-int8",
    "k1_version": "1",
    "k1_scheme": json.dumps({"version": 1, "group": 1024, "rotate": True}),
}


@pytest.mark.parametrize(
    ("config", "recognised", "parameters", "tensors"),
    [
        (LITE, ("lite", "t2v or i2v"), 2_007_702_848, 814),
        (IMAGE, ("image", "t2i"), 6_022_080_576, 1246),
        (EDIT, ("image", "i2i"), 6_022_080_576 + 68 * 2560, 1246),
        (PRO, ("pro", "t2v or i2v"), 19_311_325_248, 1514),
    ],
    ids=["lite", "image", "image editing", "pro"],
)
def test_published_transformers_are_recognised(tmp_path, config, recognised, parameters, tensors):
    report = inspect_file(write_sparse(tmp_path / "file.safetensors", dit(config)))
    assert report.kind == "dit"
    assert (report.model, report.task_hint) == recognised
    assert (report.parameters, report.tensors) == (parameters, tensors)
    assert report.quantization == "bf16"
    assert report.dtype_bytes == {"bf16": 2 * parameters}
    assert report.problems == ()


@pytest.mark.parametrize(
    ("config", "metadata", "model"),
    [(DEMO, {}, "demo"), (CUSTOM, {"model": "demo"}, "demo"), (CUSTOM, {}, "custom")],
    ids=["demo by size", "demo by its header", "custom"],
)
def test_small_transformers_are_the_demo_or_someones_own(tmp_path, config, metadata, model):
    report = inspect_file(write_sparse(tmp_path / "file.safetensors", dit(config, "F32"), metadata))
    assert (report.kind, report.model, report.quantization) == ("dit", model, "fp32")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("kandinsky5lite_t2v_sft_5s.safetensors", "t2v"),
        ("Kandinsky5Lite_I2V_5s.safetensors", "i2v"),
        ("Kandinsky-5.0-I2V-Lite-5s-Diffusers/transformer/x.safetensors", "i2v"),
        ("mine.safetensors", "t2v or i2v"),
        ("i2v/mine.safetensors", "t2v or i2v"),
    ],
)
def test_the_task_is_guessed_from_the_name(tmp_path, name, hint):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    assert inspect_file(write_sparse(path, dit(CUSTOM))).task_hint == hint


@pytest.mark.parametrize("task", ["T2V", "I2V", "T2I", "I2I"])
def test_the_task_is_read_in_a_diffusers_folder_of_any_name(tmp_path, task):
    (tmp_path / "transformer").mkdir()
    write_sparse(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", dit(CUSTOM))
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": f"Kandinsky5{task}Pipeline"}))
    assert inspect_file(tmp_path).task_hint == task.lower()
    for unclear in ("{", "[]", '{"_class_name": 5}', '{"_class_name": "WanPipeline"}'):
        index.write_text(unclear)
        assert inspect_file(tmp_path / "transformer").task_hint == "t2v or i2v"


@pytest.mark.parametrize(
    ("tensors", "metadata", "quantization"),
    [
        (dit(CUSTOM, "F16"), {}, "fp16"),
        (dit(CUSTOM, "F16") | dict(list(dit(CUSTOM, "F32").items())[:3]), {}, "mixed"),
        (quantised(".weight", "I8", ".weight_scales", 1), OWN, "int8"),
        (quantised(".weight_int8", "I8", ".weight_scales", 1), {}, "int8-community"),
        (quantised(".weight_fp8", "F8_E4M3", ".weight_scale"), {}, "fp8-community"),
        (quantised(".weight", "F8_E4M3", ".weight_scale"), {}, "fp8-scaled"),
        (quantised(".weight", "F8_E4M3", ".scale_weight"), {}, "fp8-scaled"),
        (
            quantised(".weight", "F8_E4M3", None) | {"scaled_fp8": ("F8_E4M3", (0,))},
            {},
            "fp8-scaled",
        ),
        (quantised(".weight", "F8_E4M3", None), {}, "fp8-unscaled"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_how_weights_are_stored_is_recognised(tmp_path, tensors, metadata, quantization):
    report = inspect_file(write_sparse(tmp_path / "file.safetensors", tensors, metadata))
    assert (report.kind, report.quantization) == ("dit", quantization)
    assert report.problems == ()
    counted = sum(torch.Size(shape).numel() for _, shape in dit(CUSTOM).values())
    assert report.parameters == counted


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        (
            "base_model.model.visual_transformer_blocks.0.to_query.lora_A.default.weight",
            "peft",
        ),
        ("visual_transformer_blocks.0.self_attention.to_query.lora_A.weight", "peft"),
        ("transformer.visual_transformer_blocks.0.to_query.lora_A.default.weight", "peft"),
        ("transformer.visual_transformer_blocks.0.to_query.lora_B.weight", "diffusers"),
        ("lora_unet_visual_transformer_blocks_0_to_query.lora_down.weight", "kohya"),
        ("transformer.visual_transformer_blocks.0.to_query.lora.down.weight", "diffusers"),
        ("base_model.model.visual_transformer_blocks.0.to_query.lora_B.style.weight", "peft"),
        ("visual_transformer_blocks.0.to_query.lora_up.weight", "unknown"),
    ],
)
def test_a_lora_is_recognised_with_the_family_of_its_names(tmp_path, name, variant):
    report = inspect_file(write_sparse(tmp_path / "lora.safetensors", {name: ("BF16", (8, 64))}))
    assert (report.kind, report.variant) == ("lora", variant)


def test_vaes_are_recognised(tmp_path):
    shapes = shapes_of(VideoVAE, VideoVAEConfig())
    report = inspect_file(
        write_sparse(tmp_path / "vae.safetensors", {n: ("F32", s) for n, s in shapes.items()})
    )
    assert (report.kind, report.model) == ("vae", "hunyuan")
    assert (report.parameters, report.tensors) == (246_478_803, 248)
    shapes = shapes_of(ImageVAE, ImageVAEConfig())
    report = inspect_file(
        write_sparse(tmp_path / "ae.safetensors", {n: ("F32", s) for n, s in shapes.items()})
    )
    assert (report.kind, report.model) == ("vae", "flux")


def test_another_model_is_described_and_not_raised(tmp_path):
    report = inspect_file(
        write_sparse(
            tmp_path / "wan.safetensors", {"patch_embedding.weight": ("F16", (1536, 16, 1, 2, 2))}
        )
    )
    assert report.kind == "other"
    assert "not Kandinsky 5 (looks like Wan)" in report.problems[0]
    assert report.tensors == 1


def test_an_incomplete_transformer_is_one_with_a_problem(tmp_path):
    tensors = dit(CUSTOM)
    del tensors["out_layer.out_layer.bias"]
    report = inspect_file(write_sparse(tmp_path / "file.safetensors", tensors))
    assert report.kind == "dit"
    assert "'out_layer.out_layer.bias'" in report.problems[0]


def test_weights_whose_scales_do_not_fit_are_a_problem(tmp_path):
    tensors = quantised(".weight_int8", "I8", ".weight_scales", 2)
    report = inspect_file(write_sparse(tmp_path / "file.safetensors", tensors))
    assert (report.kind, report.quantization) == ("dit", "int8-community")
    assert "scales do not fit" in report.problems[0]


def test_an_int8_file_of_a_newer_program_is_recognised_and_a_problem(tmp_path):
    tensors = quantised(".weight", "I8", ".weight_scales", 1)
    report = inspect_file(
        write_sparse(tmp_path / "file.safetensors", tensors, OWN | {"k1_version": "2"})
    )
    assert (report.kind, report.quantization) == ("dit", "int8")
    assert "version '2'" in report.problems[0] and "update K1" in report.problems[0]


@pytest.mark.parametrize(
    "content", [b"GGUF" + bytes(20), b"", b"version https://git-lfs.github.com/"]
)
def test_an_unusable_file_says_why_and_is_not_raised(tmp_path, content):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    report = inspect_file(path)
    assert report.kind == "unusable"
    assert str(path) in report.problems[0]
    assert inspect_file(tmp_path / "absent.safetensors").kind == "unusable"


def test_a_report_has_the_promised_keys_and_is_json(tmp_path):
    report = inspect_file(write_sparse(tmp_path / "file.safetensors", dit(CUSTOM)))
    values = json.loads(json.dumps(report.to_dict()))
    promised = {"kind", "model", "task_hint", "quantization", "parameters", "tensors"}
    assert promised | {"dtype_bytes", "problems"} <= set(values)
    assert values["problems"] == []
    assert json.loads(json.dumps(FileReport("unusable").to_dict()))["kind"] == "unusable"


def test_an_adapter_of_a_kind_that_is_not_run_is_a_lora_with_a_problem(tmp_path):
    pair = "visual_transformer_blocks.0.to_query.lora_A.weight"
    magnitude = "visual_transformer_blocks.0.to_query.lora_magnitude_vector"
    for names, variant, named in (
        (("lora_unet_blocks_0.lokr_w1", "lora_unet_blocks_0.alpha"), "lokr", "nothing but LoKr"),
        ((pair, magnitude), "peft", "a DoRA"),
    ):
        tensors = {name: ("F32", (4, 4)) for name in names}
        report = inspect_file(write_sparse(tmp_path / "lora.safetensors", tensors))
        assert (report.kind, report.variant) == ("lora", variant)
        assert named in report.problems[0]


@pytest.mark.parametrize("place", ["{}", "folder/{}", "{}/model.safetensors"])
def test_a_name_that_is_too_long_is_an_unusable_file_in_a_short_line(tmp_path, place):
    report = inspect_file(tmp_path / place.format("a" * 5000))
    assert report.kind == "unusable"
    assert len(report.problems[0]) < 400 and "…" in report.problems[0]


def test_an_index_that_names_a_shard_too_long_is_an_unusable_file(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "b" * 5000}}))
    report = inspect_file(index)
    assert report.kind == "unusable" and "names the shard" in report.problems[0]
    assert lacking_weights(tmp_path) is None

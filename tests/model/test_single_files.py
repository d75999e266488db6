"""VAEs and text encoders as single files are found by what is in them, and only headers are read."""

from __future__ import annotations

from pathlib import Path

import pytest
from sparse_files import Described, shapes_of, write_sparse

from kandinsky5.download import wanted
from kandinsky5.errors import CheckpointError
from kandinsky5.model import files as files_module
from kandinsky5.model import single_files
from kandinsky5.model.files import ModelFiles, locate_model, locate_part, parts_at_hand
from kandinsky5.model.image_vae import ImageVAE, ImageVAEConfig
from kandinsky5.model.inspect import inspect_file
from kandinsky5.model.safetensors_file import SafetensorsFile
from kandinsky5.model.vae import VideoVAE, VideoVAEConfig
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest

LITE, IMAGE = PRESETS["lite-t2v-5s-sft"], PRESETS["image-t2i"]


def vae(model: type, config: object, dtype: str = "BF16") -> Described:
    return {name: (dtype, shape) for name, shape in shapes_of(model, config).items()}


VIDEO_VAE = vae(VideoVAE, VideoVAEConfig())
FLUX_VAE = vae(ImageVAE, ImageVAEConfig())


def qwen(width: int = 3584, dtype: str = "BF16", tower: bool = True) -> Described:
    """As much of a Qwen2.5-VL as tells it."""
    described = {
        "model.embed_tokens.weight": ("BF16", (100, width)),
        "model.layers.0.self_attn.k_proj.bias": ("BF16", (512,)),
        "model.layers.0.self_attn.k_proj.weight": (dtype, (512, width)),
    }
    if tower:
        described["visual.patch_embed.proj.weight"] = ("BF16", (8, 3, 2, 14, 14))
        described["visual.blocks.0.mlp.gate_proj.weight"] = (dtype, (8, 8))
    return described


def clip(width: int = 768, positions: int = 77) -> Described:
    """As much of CLIP's text part as tells it."""
    return {
        "text_model.embeddings.token_embedding.weight": ("F16", (100, width)),
        "text_model.embeddings.position_embedding.weight": ("F16", (positions, width)),
        "text_model.encoder.layers.0.mlp.fc1.weight": ("F16", (8, width)),
    }


T5 = {"encoder.block.0.layer.0.SelfAttention.q.weight": ("F16", (4096, 4096))}
WAN = {"decoder.middle.0.residual.0.gamma": ("F16", (384, 1, 1, 1))}
FLUX2 = {**vae(ImageVAE, ImageVAEConfig(latent_channels=32)), "bn.running_mean": ("F32", (128,))}
SDXL = vae(
    ImageVAE, ImageVAEConfig(latent_channels=4, use_quant_conv=True, use_post_quant_conv=True)
)


def put(path: Path, described: Described) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_sparse(path, described)


def put_tokenizers(root: Path) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        (root / name).mkdir(parents=True)
        (root / name / "tokenizer.json").write_text("{}")


@pytest.fixture(autouse=True)
def no_models_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(files_module, "LITE_CHECKPOINTS", tmp_path / "lite_checkpoints")


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """ComfyUI's ``models`` folder, with what else people have in it."""
    models = tmp_path / "ComfyUI" / "models"
    (models / "diffusion_models").mkdir(parents=True)
    (models / "diffusion_models" / LITE.weights_file).write_bytes(b"")
    put(models / "vae" / "hunyuan_video_vae_bf16.safetensors", VIDEO_VAE)
    put(models / "vae" / "ae.safetensors", FLUX_VAE)
    put(models / "vae" / "flux2-vae.safetensors", FLUX2)
    put(models / "vae" / "sdxl_vae.safetensors", SDXL)
    put(models / "vae" / "wan_2.1_vae.safetensors", WAN)
    (models / "vae" / "put_vae_here").write_bytes(b"")
    (models / "vae" / "a.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    put(models / "text_encoders" / "qwen_2.5_vl_7b.safetensors", qwen())
    put(models / "text_encoders" / "qwen_2.5_vl_7b_fp8_scaled.safetensors", qwen(dtype="F8_E4M3"))
    put(models / "text_encoders" / "qwen_2.5_vl_fp16.safetensors", qwen(width=2048))
    put(models / "text_encoders" / "qwen_2.5_7b_without_eyes.safetensors", qwen(tower=False))
    put(models / "text_encoders" / "clip_l.safetensors", clip())
    put(models / "text_encoders" / "clip_g.safetensors", clip(width=1280))
    put(models / "text_encoders" / "Long-ViT-L-14.safetensors", clip(positions=248))
    put(models / "text_encoders" / "t5xxl_fp16.safetensors", T5)
    return models


def request(preset: str = LITE.name, **changes: object) -> GenerationRequest:
    return GenerationRequest(prompt="x", preset=preset, **changes)


def in_comfyui(models: Path, tokenizers: Path) -> ModelFiles:
    return ModelFiles(
        transformer=models / "diffusion_models" / LITE.weights_file,
        vae=models / "vae" / "hunyuan_video_vae_bf16.safetensors",
        text_encoder=models / "text_encoders" / "qwen_2.5_vl_7b.safetensors",
        tokenizer=tokenizers / "tokenizer",
        text_encoder_2=models / "text_encoders" / "clip_l.safetensors",
        tokenizer_2=tokenizers / "tokenizer_2",
    )


@pytest.mark.parametrize("named", ["models", "ComfyUI"])
def test_the_parts_come_from_comfyuis_folder_and_the_tokenizers_from_elsewhere(
    tmp_path, comfyui, named
) -> None:
    put_tokenizers(tmp_path / "lite_checkpoints")
    root = comfyui if named == "models" else comfyui.parent
    expected = in_comfyui(comfyui, tmp_path / "lite_checkpoints")
    assert locate_model(request(), [root]) == expected
    assert locate_model(request(model_dir=str(root))) == expected
    assert locate_part("tokenizer", request(model_dir=str(root))) == expected.tokenizer
    assert locate_part("vae", request(IMAGE.name), [root]) == comfyui / "vae" / "ae.safetensors"


def test_content_decides_and_not_the_name(comfyui) -> None:
    vaes, texts = comfyui / "vae", comfyui / "text_encoders"
    (vaes / "hunyuan_video_vae_bf16.safetensors").rename(vaes / "x.safetensors")
    (vaes / "wan_2.1_vae.safetensors").rename(vaes / "hunyuan_video_vae_bf16.safetensors")
    (texts / "clip_l.safetensors").rename(texts / "y.sft")
    (texts / "clip_g.safetensors").rename(texts / "clip_l.safetensors")
    found = parts_at_hand(LITE, [comfyui])
    assert found["vae"] == vaes / "x.safetensors"
    assert found["text_encoder_2"] == texts / "y.sft"


def test_folders_inside_and_the_older_name_are_looked_into(tmp_path) -> None:
    qwen_file = put(tmp_path / "mine" / "clip" / "qwen" / "a.safetensors", qwen())
    vae_file = put(tmp_path / "mine" / "vae" / "hunyuan" / "b.safetensors", VIDEO_VAE)
    put(tmp_path / "mine" / "vae" / "one" / "two" / "c.safetensors", FLUX_VAE)
    found = parts_at_hand(LITE, [tmp_path / "mine"])
    assert (found["text_encoder"], found["vae"]) == (qwen_file, vae_file)
    assert "vae" not in parts_at_hand(IMAGE, [tmp_path / "mine"])


def test_files_that_just_lie_in_lite_checkpoints_are_found(tmp_path) -> None:
    lite = tmp_path / "lite_checkpoints"
    expected = {
        "vae": put(lite / "one.safetensors", VIDEO_VAE),
        "text_encoder": put(lite / "two.safetensors", qwen(dtype="F8_E4M3")),
        "text_encoder_2": put(lite / "three.safetensors", clip()),
    }
    assert parts_at_hand(LITE) == expected


def test_a_whole_folder_comes_before_a_file_beside_it(tmp_path, comfyui) -> None:
    folder = comfyui / "text_encoder"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    assert parts_at_hand(LITE, [comfyui])["text_encoder"] == folder


def test_a_folder_of_another_scaling_factor_is_passed_over_and_so_are_its_weights(comfyui) -> None:
    """Stable Diffusion 3's VAE has FLUX.1's shapes."""
    folder = comfyui / "vae"
    put(folder / "diffusion_pytorch_model.safetensors", FLUX_VAE)
    (folder / "config.json").write_text(
        '{"_class_name": "AutoencoderKL", "scaling_factor": 1.5305}'
    )
    assert parts_at_hand(IMAGE, [comfyui])["vae"] == folder / "ae.safetensors"


def test_a_vae_with_the_name_of_stable_diffusion_3_is_not_taken_for_flux(comfyui) -> None:
    (comfyui / "vae" / "ae.safetensors").rename(comfyui / "vae" / "sd3_vae.safetensors")
    assert "vae" not in parts_at_hand(IMAGE, [comfyui])


def test_the_encoder_is_the_one_whose_vectors_the_transformer_takes(tmp_path, comfyui) -> None:
    own = put(
        tmp_path / "own.safetensors",
        {
            "text_embeddings.in_layer.weight": ("BF16", (8, 2048)),
            "pooled_text_embeddings.in_layer.weight": ("BF16", (8, 768)),
        },
    )
    put_tokenizers(tmp_path / "lite_checkpoints")
    found = locate_model(request(dit=str(own)), [comfyui])
    assert found.text_encoder == comfyui / "text_encoders" / "qwen_2.5_vl_fp16.safetensors"


def test_the_most_exact_of_several_is_taken(comfyui) -> None:
    exact = put(
        comfyui / "vae" / "hunyuan_video_vae_fp32.safetensors",
        vae(VideoVAE, VideoVAEConfig(), "F32"),
    )
    assert parts_at_hand(LITE, [comfyui])["vae"] == exact
    (comfyui / "text_encoders" / "qwen_2.5_vl_7b.safetensors").unlink()
    scaled = comfyui / "text_encoders" / "qwen_2.5_vl_7b_fp8_scaled.safetensors"
    assert parts_at_hand(LITE, [comfyui])["text_encoder"] == scaled


def test_missing_tokenizers_are_named_with_the_command_that_fetches_them_alone(comfyui) -> None:
    for choice, places in (({"model_dir": str(comfyui)}, []), ({}, [comfyui])):
        with pytest.raises(CheckpointError, match="the tokenizer is missing") as caught:
            locate_model(request(**choice), places)
        message = str(caught.value)
        assert "the CLIP tokenizer" in message and "\n" not in message
        assert "text encoder" not in message and "VAE" not in message
        assert message.endswith(f"python k1.py download {LITE.name} --models-dir {comfyui}")
    patterns = [pattern for _, names in wanted(LITE, [comfyui]) for pattern in names]
    assert "tokenizer.json" in patterns and "vocab.json" in patterns
    assert not [pattern for pattern in patterns if pattern.endswith(("safetensors", "index.json"))]


def test_a_vae_that_is_missing_among_others_is_said_to_be_fetched(tmp_path, comfyui) -> None:
    (comfyui / "vae" / "hunyuan_video_vae_bf16.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the VAE is missing") as caught:
        locate_part("vae", request(), [comfyui])
    assert caught.value.path.startswith(str(tmp_path / "hub"))


@pytest.mark.parametrize("is_named", [True, False], ids=["model_dir", "models_dirs"])
def test_a_file_cut_short_is_named_with_what_is_wrong(comfyui, is_named) -> None:
    path = comfyui / "vae" / "hunyuan_video_vae_bf16.safetensors"
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 5)
    choice = request(model_dir=str(comfyui)) if is_named else request()
    with pytest.raises(CheckpointError, match="the VAE cannot be used") as caught:
        locate_part("vae", choice, [comfyui])
    assert caught.value.path == str(path)
    assert "header says" in caught.value.reason and "\n" not in caught.value.reason


def test_a_folder_that_is_named_and_has_no_vae_says_where_it_would_be(comfyui) -> None:
    (comfyui / "vae" / "hunyuan_video_vae_bf16.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the VAE is missing") as caught:
        locate_part("vae", request(model_dir=str(comfyui)))
    assert caught.value.path == str(comfyui / "vae")


def test_nothing_but_headers_is_read_and_each_once(comfyui, monkeypatch) -> None:
    opened: list[Path] = []

    class Counting(SafetensorsFile):
        def __init__(self, path: Path) -> None:
            opened.append(path)
            super().__init__(path)

        def read_into(self, *_: object) -> None:
            raise AssertionError("a tensor is read")

    monkeypatch.setattr("kandinsky5.model.checkpoint.SafetensorsFile", Counting)
    single_files._single_file.cache_clear()
    first = parts_at_hand(LITE, [comfyui])
    assert len(opened) == len(set(opened)) > 10
    count = len(opened)
    assert parts_at_hand(LITE, [comfyui]) == first
    assert len(opened) == count
    put(first["vae"], FLUX_VAE)
    assert "vae" not in parts_at_hand(LITE, [comfyui])
    assert set(opened[count:]) == {first["vae"]}


def test_of_a_folder_with_very_many_files_some_are_looked_at(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(single_files, "MAX_FILES", 3)
    for number in range(5):
        put(tmp_path / "mine" / "vae" / f"{number}.safetensors", WAN)
    put(tmp_path / "mine" / "vae" / "9.safetensors", VIDEO_VAE)
    assert "vae" not in parts_at_hand(LITE, [tmp_path / "mine"])
    (tmp_path / "mine" / "vae" / "9.safetensors").rename(
        tmp_path / "mine" / "vae" / "1a.safetensors"
    )
    assert "vae" in parts_at_hand(LITE, [tmp_path / "mine"])


def test_what_may_be_less_than_meant_is_a_notice(tmp_path) -> None:
    flux = put(tmp_path / "vae.safetensors", FLUX_VAE)
    scaled = put(tmp_path / "qwen.safetensors", qwen(dtype="F8_E4M3"))
    said = single_files.notices_of(flux, scaled)
    assert len(said) == 2 and "Stable Diffusion 3" in said[0] and "fp8" in said[1]
    usual = flux.rename(tmp_path / "flux_ae.safetensors")
    assert single_files.notices_of(usual, put(tmp_path / "b.safetensors", qwen())) == ()
    assert single_files.notices_of(tmp_path, tmp_path) == ()


@pytest.mark.parametrize(
    ("described", "kind", "model"),
    [
        (VIDEO_VAE, "vae", "hunyuan"),
        (FLUX_VAE, "vae", "flux"),
        (SDXL, "vae", "stable diffusion"),
        (WAN, "vae", "wan"),
        (FLUX2, "vae", "unknown"),
        (qwen(), "text encoder", "qwen2.5-vl"),
        (clip(), "text encoder", "clip"),
        (clip(width=1280), "text encoder", "clip-g"),
        (clip(positions=248), "text encoder", "long clip"),
        (T5, "text encoder", "t5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inspect_names_each_kind(tmp_path, described, kind, model) -> None:
    report = inspect_file(put(tmp_path / "file.safetensors", described))
    assert (report.kind, report.model, report.problems) == (kind, model, ())


def test_inspect_tells_naming_dimensions_and_storage(tmp_path) -> None:
    report = inspect_file(put(tmp_path / "vae.safetensors", VIDEO_VAE))
    assert (report.variant, report.quantization) == ("diffusers", "bf16")
    assert report.config is not None and report.config["latent_channels"] == 16
    scaled = {**qwen(dtype="F8_E4M3"), "scaled_fp8": ("F8_E4M3", (0,))}
    report = inspect_file(put(tmp_path / "qwen.safetensors", scaled))
    assert (report.quantization, report.config) == ("fp8-scaled", {"width": 3584})
    lacking = dict(list(VIDEO_VAE.items())[:-1])
    report = inspect_file(put(tmp_path / "cut.safetensors", lacking))
    assert report.kind == "vae" and "1 tensors missing" in report.problems[0]

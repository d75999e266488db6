"""VAEs as single files: in either naming they compute what the published library's do; others are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfyui_models import image_vae, original_names, vae_in_original_names, video_vae, write
from sparse_files import Described, shapes_of, write_sparse

from kandinsky5.errors import CheckpointError
from kandinsky5.model.checkpoint import Checkpoint
from kandinsky5.model.image_vae import ImageVAE, ImageVAEConfig
from kandinsky5.model.vae import VideoVAE, VideoVAEConfig
from kandinsky5.model.vae_loading import check_vae, load_vae, load_video_vae

CPU = torch.device("cpu")
NAMINGS = {"diffusers": lambda vae: vae.state_dict(), "original": vae_in_original_names}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def assert_same(ours: torch.Tensor, reference: torch.Tensor) -> None:
    assert ours.shape == reference.shape
    error = (ours - reference).norm() / reference.norm()
    assert error <= 1e-5


@pytest.mark.parametrize(("naming", "layers"), [("diffusers", 1), ("original", 2)])
@torch.inference_mode()
def test_a_video_vae_computes_what_diffusers_does(tmp_path, naming, layers) -> None:
    reference = video_vae(layers_per_block=layers)
    path = write(tmp_path / "any name.safetensors", NAMINGS[naming](reference))
    ours = load_vae(path, "hunyuan", device=CPU)
    assert ours.config.scaling_factor == reference.config.scaling_factor == 0.476986
    z = noise(1, 16, 2, 3, 2)
    assert_same(ours.decode(z), reference.decode(z).sample)
    video = noise(1, 3, 5, 16, 24).clamp(-1, 1)
    mean, logvar = ours.encode(video)
    posterior = reference.encode(video).latent_dist
    assert_same(mean, posterior.mean)
    assert_same(logvar, posterior.logvar)


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
@pytest.mark.parametrize("naming", NAMINGS)
@torch.inference_mode()
def test_an_image_vae_computes_what_diffusers_does(tmp_path, naming, prefix) -> None:
    reference = image_vae()
    path = write(tmp_path / "ae.sft", NAMINGS[naming](reference), prefix)
    ours = load_vae(path, "flux", device=CPU)
    assert ours.config.scaling_factor == reference.config.scaling_factor
    z = noise(1, 16, 4, 6)
    assert_same(ours.decode(z), reference.decode(z).sample)
    picture = noise(1, 3, 32, 24).clamp(-1, 1)
    assert_same(ours.encode(picture)[0], reference.encode(picture).latent_dist.mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_dtype_is_the_files_or_the_one_asked_for(tmp_path, dtype) -> None:
    state = {name: t.to(dtype) for name, t in vae_in_original_names(video_vae()).items()}
    path = write(tmp_path / "vae.safetensors", state)
    loaded = load_video_vae(path, device=CPU)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert torch.equal(
        loaded.decoder.mid_block.attentions[0].to_q.weight,
        state["decoder.mid.attn_1.q.weight"][:, :, 0, 0, 0],
    )
    widened = load_video_vae(path, device=CPU, dtype=torch.float32)
    assert {parameter.dtype for parameter in widened.parameters()} == {torch.float32}


def test_a_folder_may_have_the_original_names_too(tmp_path) -> None:
    reference = video_vae(norm_num_groups=8, scaling_factor=0.7)
    reference.save_pretrained(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    write(weights, vae_in_original_names(reference))
    ours = load_video_vae(tmp_path / "vae", device=CPU)
    assert (ours.config.norm_num_groups, ours.config.scaling_factor) == (8, 0.7)
    z = noise(1, 16, 1, 2, 2)
    with torch.inference_mode():
        assert_same(ours.decode(z), reference.decode(z).sample)


def true_size(
    model: type, config: object, naming: str = "original", dtype: str = "BF16"
) -> Described:
    """Names and shapes of a published VAE, its attention of convolutions in the original naming."""
    shapes = shapes_of(model, config)
    if naming == "diffusers":
        return {name: (dtype, shape) for name, shape in shapes.items()}
    ones = (1, 1, 1) if model is VideoVAE else (1, 1)
    names = original_names(shapes)
    return {
        names[name]: (
            dtype,
            (*shape, *ones) if ".attentions.0.to_" in name and len(shape) == 2 else shape,
        )
        for name, shape in shapes.items()
    }


PUBLISHED = {
    "hunyuan": (VideoVAE, VideoVAEConfig(), 248, 246_478_803),
    "flux": (ImageVAE, ImageVAEConfig(), 244, 83_819_683),
}
"""Kind → classes, tensors and parameters of the published file."""


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("kind", PUBLISHED)
def test_files_of_the_published_size_give_the_published_dimensions(tmp_path, kind, naming) -> None:
    model, config, tensors, parameters = PUBLISHED[kind]
    described = true_size(model, config, naming)
    assert len(described) == tensors
    assert sum(torch.Size(shape).numel() for _, shape in described.values()) == parameters
    path = write_sparse(tmp_path / "vae.safetensors", described)
    assert check_vae(path, kind) == config


def refusal(path: Path, kind: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_vae(path, kind)
    assert caught.value.path == str(path)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_a_vae_that_lacks_a_tensor_is_refused_by_its_name_before_it_is_read(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read_into", None)  # whoever reads a tensor fails
    described = true_size(VideoVAE, VideoVAEConfig())
    del described["decoder.up.1.block.2.conv2.conv.bias"]
    described["loss.logvar"] = ("F32", (1,))
    path = write_sparse(tmp_path / "vae.safetensors", described)
    reason = refusal(path, "hunyuan")
    with pytest.raises(CheckpointError, match="1 tensors missing"):
        load_vae(path, "hunyuan", device=CPU)
    assert "1 tensors missing (first 'decoder.up_blocks.2.resnets.2.conv2.conv.bias')" in reason
    assert "1 unexpected (first 'loss.logvar')" in reason


@pytest.mark.parametrize(
    ("tensors", "kind", "said"),
    [
        (true_size(ImageVAE, ImageVAEConfig()), "hunyuan", "looks like flux"),
        (true_size(VideoVAE, VideoVAEConfig()), "flux", "looks like hunyuan"),
        (
            true_size(ImageVAE, ImageVAEConfig(latent_channels=4, use_quant_conv=True)),
            "flux",
            "looks like stable diffusion",
        ),
        (
            {"decoder.middle.0.residual.0.gamma": ("BF16", (384, 1, 1, 1))},
            "hunyuan",
            "looks like wan",
        ),
        (
            {
                "visual.patch_embed.proj.weight": ("BF16", (64, 3, 2, 14, 14)),
                "visual.blocks.0.mlp.gate_proj.weight": ("BF16", (64, 64)),
                "model.layers.0.self_attn.k_proj.bias": ("BF16", (128,)),
                "model.embed_tokens.weight": ("BF16", (10, 128)),
            },
            "hunyuan",
            "looks like the text encoder qwen2.5-vl",
        ),
        ({"weight": ("BF16", (3,))}, "flux", "first missing tensor 'encoder.conv_in.weight'"),
    ],
    ids=[
        "flux for video",
        "video for pictures",
        "stable diffusion",
        "wan",
        "qwen",
        "nothing known",
    ],
)
def test_another_file_is_named_as_what_it_is(tmp_path, tensors, kind, said) -> None:
    reason = refusal(write_sparse(tmp_path / "vae.safetensors", tensors), kind)
    assert reason.startswith("not HunyuanVideo's VAE" if kind == "hunyuan" else "not FLUX.1's VAE")
    assert said in reason


def test_a_tensor_stored_by_both_names_is_refused(tmp_path) -> None:
    described = true_size(VideoVAE, VideoVAEConfig())
    described["encoder.conv_norm_out.bias"] = ("BF16", (512,))
    reason = refusal(write_sparse(tmp_path / "vae.safetensors", described), "hunyuan")
    assert "stored twice" in reason


def test_weights_in_fp8_are_refused(tmp_path) -> None:
    described = true_size(ImageVAE, ImageVAEConfig(), dtype="F8_E4M3")
    assert "has dtype F8_E4M3" in refusal(
        write_sparse(tmp_path / "ae.safetensors", described), "flux"
    )

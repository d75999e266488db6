"""The image VAE computes what diffusers' AutoencoderKL computes, from the same tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kandinsky5.model.image_vae import ImageVAE, ImageVAEConfig

FLUX_PARAMETERS = 83_819_683
TINY = ImageVAEConfig(block_out_channels=(8, 16, 16, 24), norm_num_groups=4, latent_channels=6)


def diffusers_vae(config: ImageVAEConfig):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderKL(
        **dataclasses.asdict(config),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()


def pair(config: ImageVAEConfig) -> tuple[ImageVAE, torch.nn.Module]:
    """Ours and diffusers' with the same random weights, norms and biases included."""
    torch.manual_seed(3)
    ours, oracle = ImageVAE(config).eval().requires_grad_(False), diffusers_vae(config)
    for name, parameter in ours.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
    oracle.load_state_dict(ours.state_dict())
    return ours, oracle


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    assert ours.shape == reference.shape
    return ((ours - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("convs", [False, True], ids=["flux", "with-quant-convs"])
def test_both_ways_equal_diffusers(convs: bool) -> None:
    config = dataclasses.replace(TINY, use_quant_conv=convs, use_post_quant_conv=convs)
    ours, oracle = pair(config)
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(2, 3, 48, 80, generator=generator)
    z = torch.randn(2, 6, 5, 7, generator=generator)
    with torch.no_grad():
        posterior = oracle.encode(picture).latent_dist
        expected = oracle.decode(z).sample
    mean, logvar = ours.encode(picture)
    assert relative_error(mean, posterior.mean) <= 1e-5
    assert relative_error(logvar, posterior.logvar) <= 1e-5
    assert relative_error(ours.decode(z), expected) <= 1e-5


def test_names_shapes_and_number_of_parameters_are_those_of_flux() -> None:
    with torch.device("meta"):
        ours, oracle = ImageVAE(ImageVAEConfig()), diffusers_vae(ImageVAEConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in oracle.state_dict().items()}
    assert len(shapes) == 244
    assert sum(parameter.numel() for parameter in ours.parameters()) == FLUX_PARAMETERS


def test_quant_convs_follow_the_config_and_are_there_where_it_is_silent() -> None:
    flux = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159}
    assert ImageVAEConfig.from_dict(flux) == ImageVAEConfig()
    silent = ImageVAEConfig.from_dict({"block_out_channels": [8, 8, 8, 8], "latent_channels": 4})
    assert silent.use_quant_conv and silent.use_post_quant_conv
    assert silent.block_out_channels == (8, 8, 8, 8)

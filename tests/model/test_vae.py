"""The video VAE against diffusers' one, and what its causality promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kandinsky5.model.vae import CausalConv3d, PrefixAttention, VideoVAE, VideoVAEConfig

TINY = VideoVAEConfig(block_out_channels=(16, 32, 32, 48), layers_per_block=1, norm_num_groups=8)


def changed(config: VideoVAEConfig, **values: Any) -> VideoVAEConfig:
    return VideoVAEConfig(**{**vars(config), **values})


def diffusers_vae(config: VideoVAEConfig) -> Any:
    diffusers = pytest.importorskip("diffusers")
    levels = len(config.block_out_channels)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        **{name: value for name, value in vars(config).items()},
        down_block_types=("HunyuanVideoDownBlock3D",) * levels,
        up_block_types=("HunyuanVideoUpBlock3D",) * levels,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return vae.eval()


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """Weights as torch draws them, but with norms that act."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def tiny(config: VideoVAEConfig = TINY) -> VideoVAE:
    torch.manual_seed(0)
    model = randomised(VideoVAE(config))
    assert isinstance(model, VideoVAE)
    return model


def pair(config: VideoVAEConfig) -> tuple[VideoVAE, Any]:
    """Ours and diffusers' with the same weights."""
    torch.manual_seed(0)
    reference, ours = randomised(diffusers_vae(config)), VideoVAE(config).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours, reference


def clip(frames: int, height: int, width: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames * 1000 + height)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    assert ours.shape == reference.shape
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


# Parity


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    ("frames", "height", "width"), [(1, 32, 32), (5, 16, 40), (17, 24, 32), (9, 8, 8)], ids=str
)
def test_encoding_equals_diffusers(layers: int, frames: int, height: int, width: int) -> None:
    ours, reference = pair(changed(TINY, layers_per_block=layers))
    video = clip(frames, height, width)
    with torch.inference_mode():
        mean, logvar = ours.encode(video)
        posterior = reference.encode(video).latent_dist
    assert mean.shape == (1, 16, (frames + 3) // 4, height // 8, width // 8)
    assert relative_error(mean, posterior.mean) <= 1e-5
    assert relative_error(logvar, posterior.logvar) <= 1e-5


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    ("frames", "height", "width"), [(1, 4, 4), (2, 2, 5), (5, 3, 4), (3, 2, 2)], ids=str
)
def test_decoding_equals_diffusers(layers: int, frames: int, height: int, width: int) -> None:
    ours, reference = pair(changed(TINY, layers_per_block=layers))
    latent = torch.randn(
        1, 16, frames, height, width, generator=torch.Generator().manual_seed(frames)
    )
    with torch.inference_mode():
        video = ours.decode(latent)
        expected = reference.decode(latent).sample
    assert video.shape == (1, 3, 4 * frames - 3, 8 * height, 8 * width)
    assert relative_error(video, expected) <= 1e-5


def test_published_widths_equal_diffusers() -> None:
    """In float64: in float32 both are 2e-5 off it on some CPUs, by the order of their sums."""
    ours, reference = (
        model.double() for model in pair(VideoVAEConfig(block_out_channels=(32, 64, 128, 128)))
    )
    video = clip(5, 16, 16).double()
    with torch.inference_mode():
        posterior = reference.encode(video).latent_dist
        mean, _ = ours.encode(video)
        assert relative_error(mean, posterior.mean) <= 1e-12
        assert relative_error(ours.decode(mean), reference.decode(posterior.mean).sample) <= 1e-12


def test_a_frame_of_one_latent_pixel_equals_diffusers() -> None:
    """In float64: GroupNorm blows rounding up where a group has hardly any spread."""
    ours, reference = (model.double() for model in pair(TINY))
    video, latent = clip(9, 8, 8).double(), clip(4, 1, 1).double().repeat(1, 6, 1, 1, 1)[:, :16]
    with torch.inference_mode():
        assert (
            relative_error(ours.encode(video)[0], reference.encode(video).latent_dist.mean) <= 1e-12
        )
        assert relative_error(ours.decode(latent), reference.decode(latent).sample) <= 1e-12


def test_logvar_is_kept_within_its_range() -> None:
    model = tiny()
    with torch.no_grad():
        model.quant_conv.bias[16:24] = 1e4
        model.quant_conv.bias[24:] = -1e4
    with torch.inference_mode():
        _, logvar = model.encode(clip(1, 8, 8))
    assert logvar[:, :8].unique().tolist() == [20.0]
    assert logvar[:, 8:].unique().tolist() == [-30.0]


def test_a_batch_gives_what_each_of_its_members_gives() -> None:
    model, videos = tiny().double(), clip(5, 16, 24, batch=3).double()
    with torch.inference_mode():
        together = model.encode(videos)[0]
        alone = torch.cat([model.encode(video[None])[0] for video in videos])
        assert relative_error(together, alone) <= 1e-12
        decoded = torch.cat([model.decode(latent[None]) for latent in alone])
        assert relative_error(model.decode(together), decoded) <= 1e-12


# Names, shapes and counts


def test_the_published_state_dict_has_its_names_shapes_and_count() -> None:
    config = VideoVAEConfig()
    with torch.device("meta"):
        ours, reference = VideoVAE(config), diffusers_vae(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert len(shapes) == 248
    assert sum(parameter.numel() for parameter in ours.parameters()) == 246_478_803


def test_a_published_config_is_read_and_its_other_keys_passed_over() -> None:
    published = {
        "_class_name": "AutoencoderKLHunyuanVideo",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "scaling_factor": 0.476986,
    }
    assert VideoVAEConfig.from_dict(published) == VideoVAEConfig()
    assert VideoVAEConfig().strides == ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))


# Causality: convolutions and attention see no later frame. GroupNorm's statistics run over all frames of
# what it is given, so in the whole model a later frame does change earlier ones, a little.


def without_norms(model: VideoVAE) -> VideoVAE:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return model


def test_a_convolution_sees_no_later_frame() -> None:
    torch.manual_seed(0)
    convolution, x = CausalConv3d(4, 6), torch.randn(1, 4, 7, 5, 5)
    later = x.clone()
    later[:, :, 4] += 1.0
    with torch.inference_mode():
        same = (convolution(x) == convolution(later)).all(dim=(0, 1)).all(dim=(1, 2))
    assert same.tolist() == [True] * 4 + [False] * 3


def test_attention_is_softmax_over_the_frames_so_far() -> None:
    torch.manual_seed(0)
    layer = randomised(PrefixAttention(16, 4))
    x = torch.randn(2, 16, 5, 2, 3)
    with torch.inference_mode():
        ours = layer(x)
        tokens = layer.group_norm(x).flatten(2).mT
        scores = layer.to_q(tokens) @ layer.to_k(tokens).mT / 16**0.5
        frame = torch.arange(30) // 6
        scores = scores.masked_fill(frame[None, :] > frame[:, None], float("-inf"))
        attended = layer.to_out[0](scores.softmax(dim=-1) @ layer.to_v(tokens))
        expected = x + attended.mT.unflatten(2, (5, 2, 3))
    assert relative_error(ours, expected) <= 1e-6


@pytest.mark.parametrize("pixel_frame", [1, 4, 5, 8])
def test_a_latent_frame_depends_on_no_pixel_frame_behind_its_own(pixel_frame: int) -> None:
    model, video = without_norms(tiny()), clip(9, 16, 16)
    later = video.clone()
    later[:, :, pixel_frame] *= -1
    with torch.inference_mode():
        before, after = model.encode(video)[0], model.encode(later)[0]
    first = (pixel_frame + 3) // 4
    assert torch.equal(before[:, :, :first], after[:, :, :first])
    assert not torch.equal(before[:, :, first], after[:, :, first])


@pytest.mark.parametrize("latent_frame", [1, 2])
def test_a_decoded_frame_depends_on_no_later_latent_frame(latent_frame: int) -> None:
    model = without_norms(tiny())
    latent = torch.randn(1, 16, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    later = latent.clone()
    later[:, :, latent_frame] *= -1
    with torch.inference_mode():
        before, after = model.decode(latent), model.decode(later)
    first = 4 * latent_frame - 3
    assert torch.equal(before[:, :, :first], after[:, :, :first])
    assert not torch.equal(before[:, :, first], after[:, :, first])


def test_group_norm_lets_later_frames_touch_earlier_ones() -> None:
    """Why a tile of another length gives slightly other pixels."""
    model, video = tiny(), clip(9, 16, 16)
    later = video.clone()
    later[:, :, 5:] *= -1
    with torch.inference_mode():
        before, after = model.encode(video)[0], model.encode(later)[0]
    assert not torch.equal(before[:, :, 0], after[:, :, 0])

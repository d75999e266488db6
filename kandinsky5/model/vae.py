"""The causal 3-D video VAE of HunyuanVideo (arXiv 2412.03603).

Tensor names are those of diffusers' ``AutoencoderKLHunyuanVideo``. Time is causal: a frame sees itself and
what came before, through convolutions padded at the front and one attention layer over the prefix of
frames. One tile goes in, one tile comes out; tiling lives in ``vae_tiling``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kandinsky5.model.dimensions import dimensions_of
from kandinsky5.model.vae_attention import NORM_EPS, WideAttention, attended

Triple = tuple[int, int, int]

LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class VideoVAEConfig:
    """Dimensions of the VAE; fields as in the published ``config.json``.

    Four levels of ``block_out_channels``; the first three halve height and width (8×), the second and third
    halve time too (4×). ``scaling_factor`` takes a latent to unit variance.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VideoVAEConfig:
        """Read a ``config.json``; keys that are not dimensions of the model are ignored."""
        return cls(**dimensions_of(cls, values))

    @property
    def strides(self) -> tuple[Triple, ...]:
        """Compression (time, height, width) behind each level of the encoder."""
        last = len(self.block_out_channels) - 1
        return tuple(
            (2 if last - 2 <= level < last else 1, *((2, 2) if level < 3 else (1, 1)))
            for level in range(last + 1)
        )


class CausalConv3d(nn.Module):
    """Convolution that sees no later frame; edges are replicated in space and, at the front, in time."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, stride: int | Triple = 1
    ) -> None:
        super().__init__()
        side = kernel // 2
        self.padding = (side, side, side, side, kernel - 1, 0)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, self.padding, mode="replicate"))


class ResnetBlock(nn.Module):
    """GroupNorm → SiLU → conv, twice, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = (
            CausalConv3d(in_channels, out_channels, kernel=1)
            if in_channels != out_channels
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class PrefixAttention(WideAttention):
    """One head of attention in which every frame sees itself and all earlier frames.

    Going frame by frame over the prefix needs no S×S mask.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, T, H, W] → the same shape."""
        _, _, frames, height, width = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        query, key, value = (f(tokens).unsqueeze(1) for f in (self.to_q, self.to_k, self.to_v))
        area = height * width
        frames_out = [
            attended(query[:, :, (end - area) : end], key[:, :, :end], value[:, :, :end])
            for end in range(area, frames * area + 1, area)
        ]
        out = self.to_out[0](torch.cat(frames_out, dim=2).squeeze(1))
        return x + out.transpose(1, 2).unflatten(2, (frames, height, width))


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the narrowest place."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PrefixAttention(channels, groups)])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Strided causal convolution."""

    def __init__(self, channels: int, stride: Triple) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour growth, then a causal convolution; the first frame never doubles in time."""

    def __init__(self, channels: int, factor: Triple) -> None:
        super().__init__()
        self.factor = factor
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time, *area = self.factor
        grown = x.repeat_interleave(area[0], dim=3).repeat_interleave(area[1], dim=4)
        if time > 1:
            later = grown[:, :, 1:].repeat_interleave(time, dim=2)
            grown = torch.cat([grown[:, :, :1], later], dim=2)
        return self.conv(grown)


class Level(nn.Module):
    """The resnets of one resolution and the step to the next."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups)
            for i in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for resample in (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = resample(x)
        return x


class Encoder(nn.Module):
    """Video [B, 3, T, H, W] → moments before ``quant_conv`` [B, 2·latent, (T+3)/4, H/8, W/8]."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        previous = widths[0]
        for width, stride in zip(widths, config.strides, strict=True):
            level = Level(previous, width, config.layers_per_block, groups)
            if max(stride) > 1:
                level.downsamplers = nn.ModuleList([Downsample(width, stride)])
            self.down_blocks.append(level)
            previous = width
        self.mid_block = MidBlock(previous, groups)
        self.conv_norm_out = nn.GroupNorm(groups, previous, eps=NORM_EPS)
        self.conv_out = CausalConv3d(previous, 2 * config.latent_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latent [B, latent, t, h, w] → video [B, 3, 4t−3, 8h, 8w]."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        widths = tuple(reversed(config.block_out_channels))
        groups = config.norm_num_groups
        self.conv_in = CausalConv3d(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        previous = widths[0]
        for width, factor in zip(widths, _upsample_factors(len(widths)), strict=True):
            level = Level(previous, width, config.layers_per_block + 1, groups)
            if max(factor) > 1:
                level.upsamplers = nn.ModuleList([Upsample(width, factor)])
            self.up_blocks.append(level)
            previous = width
        self.conv_norm_out = nn.GroupNorm(groups, previous, eps=NORM_EPS)
        self.conv_out = CausalConv3d(previous, config.out_channels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def _upsample_factors(levels: int) -> tuple[Triple, ...]:
    """Growth behind each level of the decoder: space in the first three, time in the second and third."""
    return tuple(
        (2 if levels - 3 <= i < levels - 1 else 1, *((2, 2) if i < 3 else (1, 1)))
        for i in range(levels)
    )


class VideoVAE(nn.Module):
    """Encoder and decoder between pixels in [−1, 1] and latents."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, 1)

    def encode(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior of a video, untiled.

        Args:
            video: [B, 3, T, H, W] in [−1, 1]; T = 4t−3, H and W multiples of 8.

        Returns:
            (mean, logvar), each [B, latent_channels, t, H/8, W/8], unscaled; logvar within [−30, 20].
        """
        mean, logvar = self.quant_conv(self.encoder(video)).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Unscaled latent [B, latent_channels, t, h, w] → video [B, 3, 4t−3, 8h, 8w], untiled."""
        return self.decoder(self.post_quant_conv(z))

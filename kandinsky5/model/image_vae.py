"""The 2-D image VAE of FLUX.1, for pictures of the Image model.

Tensor names are those of diffusers' ``AutoencoderKL``. Whether there are ``quant_conv`` and
``post_quant_conv`` is told by ``config.json``; FLUX has neither. Its ``shift_factor`` is read by nobody: the
published image pipelines apply the scaling factor alone. One tile goes in, one tile comes out; tiling lives
in ``vae_tiling``.
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

LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class ImageVAEConfig:
    """Dimensions of the VAE; fields as in the published ``config.json``.

    Between the four levels of ``block_out_channels`` height and width are halved (8×). ``scaling_factor``
    takes a latent to about unit variance.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageVAEConfig:
        """Read a ``config.json``; keys that are not dimensions of the model are ignored.

        Where it says nothing of the two quant convolutions they are there, as in diffusers.
        """
        unsaid = {"use_quant_conv": True, "use_post_quant_conv": True}
        return cls(**{**unsaid, **dimensions_of(cls, values)})


class ResnetBlock(nn.Module):
    """GroupNorm → SiLU → conv, twice, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class PixelAttention(WideAttention):
    """One head of attention in which every cell sees all others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → the same shape."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]
        out = attended(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](out)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the narrowest place."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Strided convolution; zeros stand beyond the right and the lower edge alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour growth, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


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
    """Picture [B, 3, H, W] → moments [B, 2·latent, H/8, W/8]."""

    def __init__(self, config: ImageVAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        previous = widths[0]
        for index, width in enumerate(widths):
            level = Level(previous, width, config.layers_per_block, groups)
            if index < len(widths) - 1:
                level.downsamplers = nn.ModuleList([Downsample(width)])
            self.down_blocks.append(level)
            previous = width
        self.mid_block = MidBlock(previous, groups)
        self.conv_norm_out = nn.GroupNorm(groups, previous, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(previous, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latent [B, latent, h, w] → picture [B, 3, 8h, 8w]."""

    def __init__(self, config: ImageVAEConfig) -> None:
        super().__init__()
        widths, groups = tuple(reversed(config.block_out_channels)), config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        previous = widths[0]
        for index, width in enumerate(widths):
            level = Level(previous, width, config.layers_per_block + 1, groups)
            if index < len(widths) - 1:
                level.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(level)
            previous = width
        self.conv_norm_out = nn.GroupNorm(groups, previous, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(previous, config.out_channels, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class ImageVAE(nn.Module):
    """Encoder and decoder between pixels in [−1, 1] and latents."""

    def __init__(self, config: ImageVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        moments, latent = 2 * config.latent_channels, config.latent_channels
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    def encode(self, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior of a picture, untiled.

        Args:
            picture: [B, 3, H, W] in [−1, 1]; H and W multiples of 8.

        Returns:
            (mean, logvar), each [B, latent_channels, H/8, W/8], unscaled; logvar within [−30, 20].
        """
        moments = self.encoder(picture)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Unscaled latent [B, latent_channels, h, w] → picture [B, 3, 8h, 8w], untiled."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

"""Decoding a video frame by frame, in memory that does not grow with its length.

Untiled, ``Decoder.forward`` holds every layer of every frame. Here the decoder runs in three stages:

1. ``narrow``: the layers at the latent's own size, over all frames at once. They are small, and hold the
   attention. Nothing is approximated.
2. ``calibrate``: the statistics of the norms behind it, which would need all of the video at once, are
   estimated on a few latent frames (docs/decisions/0004-vae-tiling.md) and held fast from then on.
3. ``start`` and ``push``: the rest, frame by frame; no frame is decoded twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from kandinsky5.model.vae import Level, PrefixAttention, ResnetBlock, Upsample, VideoVAE
from kandinsky5.model.vae_frames import (
    FrameConvolution,
    FrameGrowth,
    FrameNorm,
    FrameResnet,
    Past,
    add_attention,
    padded,
)
from kandinsky5.model.vae_statistics import Calibration, Places, Samples


class RollingVAEDecoder:
    """Decodes the latents of one video; see ``vae_tiling.decode.RollingDecoder``, which it satisfies.

    Statistics belong to one video: make a new one for the next.
    """

    def __init__(self, vae: VideoVAE) -> None:
        self._vae = vae
        first, *others = cast("list[Level]", list(vae.decoder.up_blocks))
        self._narrow_resnets = _resnets(first.resnets)
        self._levels = [
            (_growth_behind(before), [FrameResnet(block) for block in _resnets(level.resnets)])
            for before, level in zip([first, *others], others, strict=False)
        ]
        self._norm_out = FrameNorm(vae.decoder.conv_norm_out)
        self._conv_out = FrameConvolution(vae.decoder.conv_out.conv)

    @torch.inference_mode()
    def narrow(self, z: torch.Tensor) -> torch.Tensor:
        """Unscaled latent [1, C, t, h, w] → features [1, D, t, h, w], as untiled.

        Alive at the peak: three tensors of the features' size.
        """
        frames = self._vae.post_quant_conv(z)[0].transpose(0, 1)
        decoder, past = self._vae.decoder, Past()
        conv_in = FrameConvolution(decoder.conv_in.conv)
        stack = torch.cat([conv_in(padded(frame[None]), past) for frame in frames])
        before, after = _resnets(decoder.mid_block.resnets)
        stack = FrameResnet(before).over_all(stack)
        add_attention(cast(PrefixAttention, decoder.mid_block.attentions[0]), stack)
        for block in (after, *self._narrow_resnets):
            stack = FrameResnet(block).over_all(stack)
        return stack.transpose(0, 1)[None]

    @torch.inference_mode()
    def calibrate(self, samples: Samples, places: Places) -> None:
        """Fix the statistics of every norm behind ``narrow``, from samples of its features."""
        calibration = Calibration(samples, places)
        for growth, resnets in self._levels:
            calibration.enter(growth)
            for resnet in resnets:
                calibration.fix(resnet.norm1)
                calibration.fix(resnet.norm2, resnet.first_half)
                calibration.advance(resnet)
        calibration.fix(self._norm_out)

    def start(self) -> RollingVAETile:
        """A tile, before its first frame."""
        return RollingVAETile(self)

    def frames_of(self, features: torch.Tensor, past: Past) -> Iterator[torch.Tensor]:
        """One latent frame of features [1, D, h, w] → its pixel frames [1, 3, 8h, 8w], one by one."""
        return self._through_level(0, features, past)

    def _through_level(self, index: int, x: torch.Tensor, past: Past) -> Iterator[torch.Tensor]:
        if index == len(self._levels):
            yield self._conv_out(self._norm_out.activated(x), past)
            return
        growth, resnets = self._levels[index]
        for frame in (x,) if growth is None else growth(x, past):
            for resnet in resnets:
                frame = resnet(frame, past)
            yield from self._through_level(index + 1, frame, past)


class RollingVAETile:
    """One tile's way through time. ``past`` is all that it remembers."""

    def __init__(self, decoder: RollingVAEDecoder) -> None:
        self._decoder = decoder
        self.past: Past = {}

    @torch.inference_mode()
    def push(self, features: torch.Tensor) -> torch.Tensor:
        """The next latent frames [1, D, n, h, w] → their pixel frames [1, 3, 4n, 8h, 8w].

        The very first latent frame gives one frame instead of four.
        """
        frames = [
            frame
            for latent in features.unbind(2)
            for frame in self._decoder.frames_of(latent, self.past)
        ]
        return torch.stack(frames, dim=2)


def _resnets(blocks: nn.ModuleList) -> list[ResnetBlock]:
    return cast("list[ResnetBlock]", list(blocks))


def _growth_behind(level: nn.Module) -> FrameGrowth | None:
    upsamplers = getattr(level, "upsamplers", None)
    if upsamplers is None:
        return None
    (upsample,) = upsamplers
    assert isinstance(upsample, Upsample)
    return FrameGrowth(upsample)

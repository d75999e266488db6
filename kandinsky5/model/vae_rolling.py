"""Decoding a video frame by frame, in memory that does not grow with its length.

Untiled, ``Decoder.forward`` holds every layer of every frame. Here the decoder runs in three stages:

1. ``narrow``: the layers at the latent's own size, over all frames at once. They are small, and hold the
   attention. Nothing is approximated.
2. ``calibrate``: the statistics of the norms behind it, which would need all of the video at once, are
   estimated on a few latent frames (docs/decisions/0004-vae-tiling.md) and held fast from then on.
3. ``start`` and ``push``: the rest, frame by frame; no frame is decoded twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import cast

import torch
from torch import nn

from kandinsky5.model.vae import Level, PrefixAttention, ResnetBlock, Upsample, VideoVAE
from kandinsky5.model.vae_frames import (
    STILL,
    FrameConvolution,
    FrameGrowth,
    FrameNorm,
    FrameResnet,
    Moments,
    Past,
    add_attention,
    padded,
    pooled,
)

Step = Callable[[torch.Tensor, "Past | None"], torch.Tensor]

MOTION_RANGE = 4.0
"""Motion may change a variance by this factor at most; beyond, the sampled piece is near flat and tells
nothing."""
FLAT = 1e-6


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
    def calibrate(self, stills: torch.Tensor, moving: Sequence[torch.Tensor]) -> None:
        """Fix the statistics of every norm behind ``narrow``, layer by layer, over all samples together.

        Args:
            stills: [n, D, h, w], whole frames of the features, n ≥ 1.
            moving: pieces [D, 2, h', w'] of two consecutive frames, of about the same size: they tell what
                motion adds. None where the video has but one latent frame.
        """
        takes = [_Take([still[None]]) for still in stills]
        for pair in moving:
            before, after = pair.transpose(0, 1).split(1)
            takes.append(_Take([after], _Role.RESTING))
            takes.append(_Take([before, after], _Role.MOVING))
        for growth, resnets in self._levels:
            for take in takes:
                take.growth = growth
            for resnet in resnets:
                _fix(resnet.norm1, takes)
                _fix(resnet.norm2, takes, resnet.first_half)
                for take in takes:
                    take.advance(resnet)
        _fix(self._norm_out, takes)

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


class _Role(Enum):
    """What the moments of a sample are for."""

    WHOLE = "a whole frame, as a still"
    RESTING = "a piece as a still, to compare with"
    MOVING = "the same piece after the frame before it"


class _Take:
    """A sample on its way through the layers.

    What growth makes of it is the largest thing there is, so it is made anew each time it is looked at
    until the layer behind has taken it in.
    """

    def __init__(self, frames: list[torch.Tensor], role: _Role = _Role.WHOLE) -> None:
        self._frames = deque(frames)
        self.role = role
        self.growth: FrameGrowth | None = None

    def through(self, *steps: Step, using_up: bool = False) -> Iterator[torch.Tensor]:
        """The frames behind these steps. ``using_up`` lets go of each frame once it is through."""
        past: Past | None = {} if self.role is _Role.MOVING else STILL
        for _ in range(len(self._frames)):
            frame = self._frames[0]
            if using_up:
                self._frames.popleft()
            else:
                self._frames.rotate(-1)
            for x in (frame,) if self.growth is None else self.growth(frame, past):
                for step in steps:
                    x = step(x, past)
                yield x

    def advance(self, step: Step) -> None:
        """Be from now on what a step makes of it."""
        self._frames = deque(list(self.through(step, using_up=True)))
        self.growth = None


def _fix(norm: FrameNorm, takes: Sequence[_Take], *steps: Step) -> None:
    """Statistics of the stills, changed as motion changes those of the pieces that are seen both ways."""
    moments: dict[_Role, list[Moments]] = {role: [] for role in _Role}
    for take in takes:
        of_take = [norm.moments_of(frame) for frame in take.through(*steps)]
        # before the first frame of a pair nothing is known, so that one does not count
        moments[take.role] += of_take[1:] if take.role is _Role.MOVING else of_take
    mean, variance = pooled(moments[_Role.WHOLE])
    if moments[_Role.MOVING]:
        resting_mean, resting_variance = pooled(moments[_Role.RESTING])
        moving_mean, moving_variance = pooled(moments[_Role.MOVING])
        ratio = (moving_variance + FLAT) / (resting_variance + FLAT)
        mean = mean + moving_mean - resting_mean
        variance = variance * ratio.clamp(1 / MOTION_RANGE, MOTION_RANGE)
    norm.fix((mean, variance))


def _resnets(blocks: nn.ModuleList) -> list[ResnetBlock]:
    return cast("list[ResnetBlock]", list(blocks))


def _growth_behind(level: nn.Module) -> FrameGrowth | None:
    upsamplers = getattr(level, "upsamplers", None)
    if upsamplers is None:
        return None
    (upsample,) = upsamplers
    assert isinstance(upsample, Upsample)
    return FrameGrowth(upsample)

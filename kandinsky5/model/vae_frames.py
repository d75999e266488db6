"""The video VAE's decoder layers, fed one frame at a time.

A causal 3×3×3 convolution is the sum of three 2-D ones over the last three frames, so two frames are all
that it has to remember. GroupNorm's mean and variance, which run over all of time and space, are measured
beforehand. Growing by repetition before a convolution reads the same pixels again and again: its taps are
added up beforehand, which leaves 8 products of 27.

Frames are [n, C, h, w]; what a layer remembers stands in a :data:`Past` given with each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from kandinsky5.model.vae import PrefixAttention, ResnetBlock, Upsample
from kandinsky5.model.vae_attention import attended

Past = dict[int, list[torch.Tensor]]
"""The last padded frames that each layer has seen, by the layer's id."""
STILL = None
"""Instead of a past: the frame has always been the same."""

AT_ONCE = 2**24
"""Numbers of a frame that are normed or measured together: bounds what is alive only meanwhile."""

Moments = tuple[torch.Tensor, torch.Tensor]
"""Mean and variance of each group, float32 [groups]."""


class FrameNorm:
    """GroupNorm with statistics that are given, not taken from the frame."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self._norm = norm
        self._moments: Moments | None = None

    def moments_of(self, frame: torch.Tensor) -> Moments:
        """Of one frame [1, C, h, w] or [C, h, w]."""
        groups = frame.reshape(self._norm.num_groups, -1)
        at_once = max(1, AT_ONCE // groups.shape[1])
        parts = [torch.var_mean(part.float(), 1, correction=0) for part in groups.split(at_once)]
        return torch.cat([mean for _, mean in parts]), torch.cat([var for var, _ in parts])

    def fix(self, moments: Moments) -> None:
        """Norm with these from now on."""
        each = self._norm.num_channels // self._norm.num_groups
        mean, variance = (part.repeat_interleave(each) for part in moments)
        self._moments = mean, variance

    def activated(self, x: torch.Tensor) -> torch.Tensor:
        """Normed, through SiLU, and padded by a pixel for the convolution behind."""
        batch, channels, height, width = x.shape
        out = x.new_empty(batch, channels, height + 2, width + 2)
        at_once = max(1, AT_ONCE // x[:, 0].numel())
        for start in range(0, channels, at_once):
            part = slice(start, start + at_once)
            out[:, part] = padded(F.silu(self._normed(x[:, part], part), inplace=True))
        return out

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._normed(x, slice(None))

    def _normed(self, x: torch.Tensor, channels: slice) -> torch.Tensor:
        assert self._moments is not None, "statistics have not been fixed"
        mean, variance, weight, bias = (
            values[channels].float()
            for values in (*self._moments, self._norm.weight, self._norm.bias)
        )
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, self._norm.eps)


class FrameConvolution:
    """A causal 3×3×3 convolution of frames that are padded already."""

    def __init__(self, conv: nn.Conv3d) -> None:
        self._conv = conv

    def __call__(self, x: torch.Tensor, past: Past | None) -> torch.Tensor:
        taps, bias = self._conv.weight.unbind(2), self._conv.bias
        if past is STILL:
            return F.conv2d(x, summed(taps), bias)
        seen = past.pop(id(self), [x, x])
        seen.append(x)
        out = F.conv2d(seen.pop(0), taps[0], bias)  # the oldest goes before more room is needed
        out += F.conv2d(seen[0], taps[1])
        out += F.conv2d(x, taps[2])
        past[id(self)] = seen
        return out


class FrameResnet:
    """A :class:`ResnetBlock`."""

    def __init__(self, block: ResnetBlock) -> None:
        self.norm1, self.norm2 = FrameNorm(block.norm1), FrameNorm(block.norm2)
        self._conv1, self._conv2 = (FrameConvolution(c.conv) for c in (block.conv1, block.conv2))
        self._shortcut = None if block.conv_shortcut is None else block.conv_shortcut.conv

    def __call__(self, x: torch.Tensor, past: Past | None) -> torch.Tensor:
        return self._second_half(self.first_half(x, past), x, past)

    def first_half(self, x: torch.Tensor, past: Past | None) -> torch.Tensor:
        """What the second norm is given."""
        return self._conv1(self.norm1.activated(x), past)

    def over_all(self, stack: torch.Tensor) -> torch.Tensor:
        """All frames [t, C, h, w] of a video, with the statistics taken on them; exact."""
        past: Past = {}
        self.norm1.fix(pooled([self.norm1.moments_of(x) for x in stack]))
        hidden = torch.cat([self.first_half(x[None], past) for x in stack])
        self.norm2.fix(pooled([self.norm2.moments_of(x) for x in hidden]))
        for first, x in zip(hidden.split(1), stack.split(1), strict=True):
            first.copy_(self._second_half(first, x, past))
        return hidden

    def _second_half(
        self, hidden: torch.Tensor, x: torch.Tensor, past: Past | None
    ) -> torch.Tensor:
        out = self._conv2(self.norm2.activated(hidden), past)
        if self._shortcut is not None:
            x = F.conv2d(x, self._shortcut.weight.squeeze(2), self._shortcut.bias)
        return out.add_(x)


class FrameGrowth:
    """An :class:`Upsample`: twice the side, and twice the frames (but never the first) where it says so.

    A grown pixel sees only two pixels of each axis of what is not yet grown, and a frame of a doubled pair
    only two frames: the taps that meet the same one are added up.

    Attributes:
        doubles: whether it doubles the frames.
    """

    def __init__(self, upsample: Upsample) -> None:
        conv = upsample.conv.conv
        first, middle, last = (tap.float() for tap in conv.weight.unbind(2))
        self.doubles = upsample.factor[0] > 1
        self._bias, self._dtype = conv.bias, conv.weight.dtype
        if self.doubles:  # kernels over (the frame before, this frame)
            self._of_first = self._phases(first + middle, last)
            self._of_second = self._phases(first, middle + last)
        else:
            self._of_second = self._phases(first, middle, last)

    def __call__(self, x: torch.Tensor, past: Past | None) -> Iterator[torch.Tensor]:
        """The frames that one frame grows to, one by one; a still gives one."""
        x = padded(x)
        if past is STILL:
            yield self._grow([x], [[summed(taps) for taps in zip(*self._of_second, strict=True)]])
            return
        started = id(self) in past
        seen = [*past.get(id(self), [x] if self.doubles else [x, x]), x]
        past[id(self)] = seen[1:]
        if self.doubles and started:
            yield self._grow(seen, self._of_first)
        yield self._grow(seen, self._of_second)

    def _phases(self, *taps: torch.Tensor) -> list[list[torch.Tensor]]:
        """Per frame seen, the 2×2 kernels of the four pixels that grow from one (top left … bottom right)."""

        def halved(kernel: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
            a, b, c = kernel.unbind(dim)
            return torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)

        return [
            [phase.to(self._dtype) for row in halved(tap, 2) for phase in halved(row, 3)]
            for tap in taps
        ]

    def _grow(self, seen: list[torch.Tensor], kernels: list[list[torch.Tensor]]) -> torch.Tensor:
        batch, _, height, width = seen[0].shape
        height, width = height - 2, width - 2
        out = seen[0].new_empty(batch, len(kernels[0][0]), 2 * height, 2 * width)
        for phase in range(4):
            y, x = divmod(phase, 2)
            terms = [
                F.conv2d(
                    frame[:, :, y : y + height + 1, x : x + width + 1],
                    kernel[phase],
                    self._bias if index == 0 else None,
                )
                for index, (frame, kernel) in enumerate(zip(seen, kernels, strict=True))
            ]
            out[:, :, y::2, x::2] = summed(terms)
        return out


def add_attention(layer: PrefixAttention, stack: torch.Tensor) -> None:
    """Add the attention's output to a video's frames [t, C, h, w] in place, frame by frame; exact."""
    norm = FrameNorm(layer.group_norm)
    norm.fix(pooled([norm.moments_of(x) for x in stack]))
    frames, channels, height, width = stack.shape
    area = height * width
    keys, values = (stack.new_empty(1, 1, frames * area, channels) for _ in range(2))
    for index, frame in enumerate(stack):
        tokens = norm(frame[None]).flatten(2).mT[:, None]
        end = (index + 1) * area
        keys[:, :, end - area : end] = layer.to_k(tokens)
        values[:, :, end - area : end] = layer.to_v(tokens)
        out = attended(layer.to_q(tokens), keys[:, :, :end], values[:, :, :end])
        frame += layer.to_out[0](out)[0, 0].mT.unflatten(1, (height, width))


def pooled(moments: Sequence[Moments]) -> Moments:
    """Of frames of one size taken together: the law of total variance."""
    means = torch.stack([mean for mean, _ in moments])
    variances = torch.stack([variance for _, variance in moments])
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


def summed(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def padded(x: torch.Tensor) -> torch.Tensor:
    """A pixel more on each side, like its neighbour."""
    return F.pad(x, (1, 1, 1, 1), mode="replicate")

"""Samples of a video's features, on which its statistics are estimated; see ``vae_tiling.samples``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch

from vae_tiling.samples import (
    FRAMES_BEFORE,
    FRAMES_KEPT,
    chosen_moving,
    chosen_stills,
    sample_sizes,
)
from vae_tiling.tiles import TilePlan

AT_ONCE = 2**24
"""Numbers of the features that are compared together."""


@dataclass(frozen=True)
class Places:
    """Who moves tensors, since this package does not.

    Attributes:
        park: takes a tensor off the device, where it may wait in main memory; the caller drops the original.
        fetch: the way back.
    """

    park: Callable[[torch.Tensor], torch.Tensor]
    fetch: Callable[[torch.Tensor], torch.Tensor]


STAY = Places(park=lambda tensor: tensor, fetch=lambda tensor: tensor)


@dataclass(frozen=True)
class Sampled:
    """A sample and what it counts.

    Attributes:
        features: [D, n, h, w] of n consecutive frames.
        stands_for: the last of them stands for so many later latent frames of the video (a piece of a frame
            for its share of them).
        first: its share of the video's first frame.
    """

    features: torch.Tensor
    stands_for: float
    first: float = 0.0


@dataclass(frozen=True)
class Samples:
    """What is looked at: either all of a video, or frames of it.

    Attributes:
        run: [D, t, h, w], all frames from the first on; None of a longer video.
        stills: whole single frames, n = 1.
        moving: pieces of frames behind those before, n ≥ 2.
        window: cells (height, width) that are worked on together, the rest waiting in main memory; None
            where all stays on the device.
        frames_kept: of a moving sample at later levels, itself included.
    """

    run: torch.Tensor | None = None
    stills: Sequence[Sampled] = ()
    moving: Sequence[Sampled] = ()
    window: tuple[int, int] | None = None
    frames_kept: int = FRAMES_KEPT


def taken(features: torch.Tensor, plan: TilePlan) -> Samples:
    """Copies of what a plan's statistics are taken on, from features [1, D, t, h, w]."""
    sizes, video = sample_sizes(plan), features[0]
    if sizes.run:
        return Samples(run=video, window=sizes.window)
    unlike = unlikeness(video)
    stills = [
        Sampled(video[:, still.frame, None].clone(), still.stands_for, still.first)
        for still in chosen_stills(sizes.stills, unlike)
    ]
    moving = [
        Sampled(
            video[
                :,
                max(0, sample.frame - FRAMES_BEFORE) : sample.frame + 1,
                piece.top : piece.top + piece.height,
                piece.left : piece.left + piece.width,
            ].clone(),
            sample.stands_for * piece.area / sum(piece.area for piece in half),
        )
        for sample, half in zip(
            chosen_moving(sizes.moving, unlike) if sizes.moving else (), cycle(sizes.halves)
        )
        for piece in half
    ]
    return Samples(stills=stills, moving=moving, window=sizes.window)


def unlikeness(video: torch.Tensor) -> list[list[float]]:
    """Mean square difference of any two frames of features [D, t, h, w]."""
    frames = video.shape[1]
    if video.is_meta:  # shapes alone: as if it changed steadily
        return [[float(abs(one - other)) for other in range(frames)] for one in range(frames)]
    total = torch.zeros(frames, frames, dtype=torch.float32, device=video.device)
    at_once = max(1, AT_ONCE // max(1, video[0].numel()))
    for channels in video.split(at_once):
        rows = channels.transpose(0, 1).flatten(1).float()
        for later in range(1, frames):
            total[later, :later] += (rows[:later] - rows[later]).square().sum(1)
    total = (total + total.mT) / video[:, 0].numel()
    return total.tolist()

"""Mean and variance of a video's norms, estimated on samples of it that go through the layers together.

All samples go through a layer before any goes through the next, so that each layer sees what it will see
later: the norms before it have their final statistics by then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from kandinsky5.model.vae_frames import STILL, FrameGrowth, FrameNorm, Moments, Past

Step = Callable[[torch.Tensor, "Past | None"], torch.Tensor]

LEAST_SHARE = 1 / 4
"""Of the stills' variance is kept, whatever moving ones say: a piece may be near flat and tell nothing."""


class Sampled(Protocol):
    """A sample: ``vae_tiling.statistics.Sampled``."""

    @property
    def features(self) -> torch.Tensor: ...
    @property
    def stands_for(self) -> float: ...
    @property
    def first(self) -> bool: ...


class Samples(Protocol):
    """What is looked at: ``vae_tiling.statistics.Samples``."""

    @property
    def run(self) -> torch.Tensor | None: ...
    @property
    def stills(self) -> Sequence[Sampled]: ...
    @property
    def moving(self) -> Sequence[Sampled]: ...


class Calibration:
    """The samples on their way through the layers.

    The moments of the whole video are those of the stills, each counted as often as it stands for a frame,
    plus what the moving ones differ from themselves as stills (a difference estimator). Of a run they are
    those of its frames, and exact.
    """

    def __init__(self, samples: Samples) -> None:
        self._run = _moving(samples.run) if samples.run is not None else None
        self._stills = [(still, _Take(_frames(still.features))) for still in samples.stills]
        self._moving = [
            (sample, _Take(_frames(sample.features)[-1:]), _moving(sample.features))
            for sample in samples.moving
        ]
        self._times = 1
        """Frames to which a latent frame has grown, but the first."""

    def enter(self, growth: FrameGrowth | None, *, widest: bool) -> None:
        """All frames are grown before the next step.

        At the widest level frames are largest, and nearest in time: there one is enough from before.
        """
        if widest:
            for _, _, moving in self._moving:
                moving.keep(self._times + 1)
        if growth is not None and growth.doubles:
            self._times *= 2
        for take in self._takes():
            take.growth = growth

    def advance(self, step: Step) -> None:
        """All frames become what a step makes of them.

        They grow by that, so those that take most to be worked on come first, while the others are small.
        """
        for take in sorted(self._takes(), key=_Take.work, reverse=True):
            take.advance(step)

    def fix(self, norm: FrameNorm, *steps: Step) -> None:
        """Give a norm the statistics of its input, which is what ``steps`` make of the frames now."""
        if self._run is not None:
            moments = _Sums()
            for frame in self._run.through(*steps):
                moments.add(norm.moments_of(frame), 1.0)
            norm.fix(moments.mean_and_variance())
            return
        shown, added = _Sums(), _Sums()
        for still, take in self._stills:
            (frame,) = take.through(*steps)
            weight = still.stands_for * self._times + float(still.first)
            shown.add(norm.moments_of(frame), weight)
        for sample, resting, moving in self._moving:
            (frame,) = resting.through(*steps)
            added.add(norm.moments_of(frame), -sample.stands_for * self._times)
            frames = [norm.moments_of(frame) for frame in moving.through(*steps)]
            for of_frame in frames[-self._times :]:
                added.add(of_frame, sample.stands_for)
        mean, variance = shown.plus(added).mean_and_variance()
        least = LEAST_SHARE * shown.mean_and_variance()[1]
        norm.fix((mean, torch.maximum(variance, least)))

    def _takes(self) -> Iterator[_Take]:
        if self._run is not None:
            yield self._run
        for _, resting, moving in self._moving:
            yield moving
            yield resting
        for _, take in self._stills:
            yield take


class _Take:
    """Frames of a sample.

    What growth makes of them is the largest thing there is, so it is made anew each time it is looked at
    until the layer behind has taken it in.
    """

    def __init__(self, frames: Sequence[torch.Tensor], *, moving: bool = False) -> None:
        self._frames = deque(frames)
        self._moving = moving
        self.growth: FrameGrowth | None = None

    def work(self) -> int:
        """What working on one frame takes, to compare: a moving one brings two of the past with it."""
        return self._frames[0][0, 0].numel() * (2 if self._moving else 1)

    def keep(self, frames: int) -> None:
        """Let go of all but the last frames."""
        while len(self._frames) > frames:
            self._frames.popleft()

    def through(self, *steps: Step, using_up: bool = False) -> Iterator[torch.Tensor]:
        """The frames behind these steps. ``using_up`` lets go of each frame once it is through."""
        past: Past | None = {} if self._moving else STILL
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


class _Sums:
    """Moments added up, each with a weight, in float64: variances are differences of these sums."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._first: torch.Tensor | float = 0.0
        self._second: torch.Tensor | float = 0.0

    def add(self, moments: Moments, weight: float) -> None:
        mean, variance = (part.double() for part in moments)
        self._weight += weight
        self._first = self._first + weight * mean
        self._second = self._second + weight * (variance + mean.square())

    def plus(self, other: _Sums) -> _Sums:
        total = _Sums()
        total._weight = self._weight + other._weight
        total._first = self._first + other._first
        total._second = self._second + other._second
        return total

    def mean_and_variance(self) -> Moments:
        mean, second = torch.as_tensor(self._first), torch.as_tensor(self._second)
        mean, second = mean / self._weight, second / self._weight
        return mean.float(), (second - mean.square()).clamp(min=0.0).float()


def _frames(features: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[D, n, h, w] → n of [1, D, h, w]."""
    return features.transpose(0, 1).split(1)


def _moving(features: torch.Tensor) -> _Take:
    return _Take(_frames(features), moving=True)

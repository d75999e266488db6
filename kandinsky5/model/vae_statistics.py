"""Mean and variance of a video's norms, estimated on samples of it that go through the layers together.

All samples go through a layer before any goes through the next, so that each layer sees what it will see
later: the norms before it have their final statistics by then.

Where there are windows, a sample waits in main memory between two layers, cut into parts, and goes through a
layer part by part. A part takes with it what the layer sees beyond its edges, so cutting changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from kandinsky5.model.vae_frames import STILL, FrameGrowth, FrameNorm, Moments, Past

Step = Callable[[torch.Tensor, "Past | None"], torch.Tensor]
Grid = Sequence[Sequence[torch.Tensor]]
"""A frame [1, C, h, w] in rows of parts."""
Move = Callable[[torch.Tensor], torch.Tensor]

SEEN_BEYOND = 2
"""Pixels of its input that a step sees beyond a part: of two convolutions, or of growth and two behind it."""

LEAST_SHARE = 1 / 4
"""Of the stills' variance is kept, whatever moving ones say: a piece may be near flat and tell nothing."""


class Sampled(Protocol):
    """A sample: ``vae_tiling.statistics.Sampled``."""

    @property
    def features(self) -> torch.Tensor: ...
    @property
    def stands_for(self) -> float: ...
    @property
    def first(self) -> float: ...


class Samples(Protocol):
    """What is looked at: ``vae_tiling.statistics.Samples``."""

    @property
    def run(self) -> torch.Tensor | None: ...
    @property
    def stills(self) -> Sequence[Sampled]: ...
    @property
    def moving(self) -> Sequence[Sampled]: ...
    @property
    def window(self) -> tuple[int, int] | None: ...
    @property
    def frames_kept(self) -> int: ...


class Places(Protocol):
    """Where samples wait: ``vae_tiling.statistics.Places``."""

    @property
    def park(self) -> Move: ...
    @property
    def fetch(self) -> Move: ...


class Calibration:
    """The samples on their way through the layers.

    The moments of the whole video are those of the stills, each counted as often as it stands for a frame,
    plus what the moving ones differ from themselves as stills (a difference estimator). Of a run they are
    those of its frames, and exact.
    """

    def __init__(self, samples: Samples, places: Places) -> None:
        def take(features: torch.Tensor, *, moving: bool = False) -> _Take:
            return _Take(features, samples.window, places, moving=moving)

        self._run = take(samples.run, moving=True) if samples.run is not None else None
        self._stills = [(still, take(still.features)) for still in samples.stills]
        self._moving = [
            (sample, take(sample.features[:, -1:]), take(sample.features, moving=True))
            for sample in samples.moving
        ]
        self._frames_kept = samples.frames_kept
        self._entered = False
        self._times = 1
        """Frames to which a latent frame has grown, but the first."""

    def enter(self, growth: FrameGrowth | None) -> None:
        """All frames are grown before the next step.

        Behind the first level frames are larger, and nearer in time: there fewer are enough from before.
        """
        if self._entered:
            for _, _, moving in self._moving:
                moving.keep(max(self._frames_kept, self._times + 1))
        self._entered = True
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
            for share, of_frames in self._run.moments(norm, *steps):
                for of_frame in of_frames:
                    moments.add(of_frame, share)
            norm.fix(moments.mean_and_variance())
            return
        shown, added = _Sums(), _Sums()
        for still, take in self._stills:
            weight = still.stands_for * self._times + still.first
            for share, (of_frame,) in take.moments(norm, *steps):
                shown.add(of_frame, weight * share)
        for sample, resting, moving in self._moving:
            for share, (of_frame,) in resting.moments(norm, *steps):
                added.add(of_frame, -sample.stands_for * self._times * share)
            for share, of_frames in moving.moments(norm, *steps):
                for of_frame in of_frames[-self._times :]:
                    added.add(of_frame, sample.stands_for * share)
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

    def __init__(
        self,
        features: torch.Tensor,
        window: tuple[int, int] | None,
        places: Places,
        *,
        moving: bool = False,
    ) -> None:
        """Of features [D, n, h, w]; they stay where they are if there is no window."""
        frames = features.transpose(0, 1).split(1)
        self._moving = moving
        self._places = places if window is not None else None
        height, width = features.shape[2:]
        across, down = window or (height, width)
        self._frames: deque[Grid] = deque(
            [[self._parked(part) for part in row] for row in _cut(frame, across, down)]
            for frame in frames
        )
        self.growth: FrameGrowth | None = None

    def work(self) -> int:
        """What working on one frame takes, to compare: a moving one brings two of the past with it."""
        pixels = sum(part[0, 0].numel() for row in self._frames[0] for part in row)
        return pixels * (2 if self._moving else 1)

    def keep(self, frames: int) -> None:
        """Let go of all but the last frames."""
        while len(self._frames) > frames:
            self._frames.popleft()

    def moments(self, norm: FrameNorm, *steps: Step) -> Iterator[tuple[float, list[Moments]]]:
        """Of the frames behind these steps, part by part, with each part's share of a frame."""
        area = sum(part[0, 0].numel() for row in self._frames[0] for part in row)
        for row, column in self._places_of_parts():
            share = self._frames[0][row][column][0, 0].numel() / area
            yield share, list(map(norm.moments_of, self._through((row, column), steps)))

    def advance(self, step: Step) -> None:
        """Be from now on what a step makes of it."""
        places, columns = self._places_of_parts(), len(self._frames[0][0])
        using_up = len(places) == 1  # no other part needs a frame that is through
        made = [
            list(map(self._parked, self._through(place, (step,), using_up))) for place in places
        ]
        self._frames = deque(
            [parts[at : at + columns] for at in range(0, len(parts), columns)]
            for parts in zip(*made, strict=True)
        )
        self.growth = None

    def _places_of_parts(self) -> list[tuple[int, int]]:
        return [(r, c) for r, row in enumerate(self._frames[0]) for c, _ in enumerate(row)]

    def _through(
        self, place: tuple[int, int], steps: Sequence[Step], using_up: bool = False
    ) -> Iterator[torch.Tensor]:
        past: Past | None = {} if self._moving else STILL
        for _ in range(len(self._frames)):
            grid = self._frames[0]
            if using_up:
                self._frames.popleft()
            else:
                self._frames.rotate(-1)
            frame = self._seen(grid, place)
            seen_rows, shape = frame.shape[2], (len(grid), len(grid[0]))
            del grid
            for x in (frame,) if self.growth is None else self.growth(frame, past):
                for step in steps:
                    x = step(x, past)
                yield _inner(x, place, shape, SEEN_BEYOND * x.shape[2] // seen_rows)
                del x  # or it would be there while the next is made

    def _seen(self, grid: Grid, place: tuple[int, int]) -> torch.Tensor:
        """A part on the device, with what its neighbours have within reach."""
        if len(grid) == len(grid[0]) == 1:
            return self._fetched(grid[0][0])
        near = {-1: slice(-SEEN_BEYOND, None), 0: slice(None), 1: slice(SEEN_BEYOND)}
        rows = []
        for row in range(max(0, place[0] - 1), min(len(grid), place[0] + 2)):
            across = [
                self._fetched(grid[row][column][..., near[row - place[0]], near[column - place[1]]])
                for column in range(max(0, place[1] - 1), min(len(grid[0]), place[1] + 2))
            ]
            rows.append(torch.cat(across, dim=3))
        return torch.cat(rows, dim=2)

    def _parked(self, frame: torch.Tensor) -> torch.Tensor:
        return frame if self._places is None else self._places.park(frame)

    def _fetched(self, frame: torch.Tensor) -> torch.Tensor:
        return frame if self._places is None else self._places.fetch(frame)


def _inner(
    x: torch.Tensor, place: tuple[int, int], shape: tuple[int, int], margin: int
) -> torch.Tensor:
    """A part without the margin it had on each side where it has a neighbour."""
    for dim, at, count in zip((2, 3), place, shape, strict=True):
        start = margin if at > 0 else 0
        stop = x.shape[dim] - (margin if at < count - 1 else 0)
        x = x.narrow(dim, start, stop - start)
    return x


def _cut(frame: torch.Tensor, height: int, width: int) -> list[list[torch.Tensor]]:
    """Rows of parts, about equal and at most as large as said."""
    rows = frame.tensor_split(-(-frame.shape[2] // height), dim=2)
    return [list(row.tensor_split(-(-frame.shape[3] // width), dim=3)) for row in rows]


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

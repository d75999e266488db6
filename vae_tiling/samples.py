"""What the statistics of a whole video are estimated on: which frames, and what each counts. Arithmetic only.

Norms take mean and variance over all of time and space. A few latent frames tell them: *stills*, each as if
it had always stood still, for what is to be seen, and *moving* ones, behind the frames before, for what
change adds to that. Both are chosen by how unlike the frames are, so that a scene that is short, or a cut
that is one frame, counts as much as there is of it and no more. A short video is looked at as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vae_tiling.tiles import TilePlan

MOST_STILLS, MOST_MOVING = 7, 3
FRAMES_BEFORE = 3
"""A moving frame is looked at behind so many: a cut is felt as long by the layers that see furthest."""
LONGEST_RUN = 21
"""So many pixel frames are looked at as they are: exact."""
FRAMES_OF_MOVING = 6
"""Held at the widest layer: one frame from before, the frame itself (four), and it as a still."""

Unlike = Sequence[Sequence[float]]
"""Mean square difference of any two latent frames, by their numbers."""


@dataclass(frozen=True)
class Piece:
    """A part of a frame, in cells."""

    top: int
    left: int
    height: int
    width: int

    @property
    def area(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class SampleSizes:
    """How much of a video is looked at.

    Attributes:
        run: all frames, one after another; there is nothing else then.
        stills, moving: so many frames each way.
        pieces: into which moving frames are cut: they cover a frame once.
    """

    run: bool
    stills: int
    moving: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Counted:
    """A latent frame and what it stands for.

    Attributes:
        frame: its number.
        stands_for: so many later latent frames; each grows to as many frames as a layer has for one.
        first: whether it stands for the first too, which is one frame everywhere.
    """

    frame: int
    stands_for: int
    first: bool = False


def sample_sizes(plan: TilePlan) -> SampleSizes:
    """What a plan leaves room for: samples are held together, and must not need more than the tiles."""
    frames, height, width = plan.latent_shape
    share = math.prod(plan.largest_tile) / (height * width)
    room = int(34 * share) - 3  # in frames of the video's size, beside what works on one
    pieces = _pieces(plan)
    if frames == 1:
        return SampleSizes(False, 1, 0, pieces)
    if plan.tiles == 1 and 4 * frames - 3 <= LONGEST_RUN:
        return SampleSizes(True, 0, 0, pieces)
    moving = max(1, min(MOST_MOVING, frames - 1, (room - MOST_STILLS // 2) // FRAMES_OF_MOVING))
    stills = max(2, min(MOST_STILLS, frames, room - FRAMES_OF_MOVING * moving))
    return SampleSizes(False, stills, moving, pieces)


def chosen_stills(count: int, unlike: Unlike) -> tuple[Counted, ...]:
    """Frames that are typical of as many groups of frames, each frame being in the group it is most like.

    k-medoids: begun with the frame most like all others, then always the one least like those chosen.
    """
    frames = range(len(unlike))
    chosen = [_typical(frames, unlike)]
    while len(chosen) < min(count, len(unlike)):
        chosen.append(max(frames, key=lambda t: min(unlike[t][c] for c in chosen)))
    for _ in frames:
        groups = _grouped(chosen, unlike)
        typical = [_typical(group, unlike) for group in groups]
        if typical == chosen:
            break
        chosen = typical
    return tuple(
        Counted(frame, sum(t > 0 for t in group), first=0 in group)
        for frame, group in sorted(zip(chosen, _grouped(chosen, unlike), strict=True))
    )


def _typical(group: Sequence[int], unlike: Unlike) -> int:
    return min(group, key=lambda t: sum(unlike[t][other] for other in group))


def _grouped(chosen: Sequence[int], unlike: Unlike) -> list[list[int]]:
    """For each of those chosen the frames most like it; it itself always, if another is the same."""
    groups: dict[int, list[int]] = {frame: [] for frame in chosen}
    for t in range(len(unlike)):
        groups[t if t in groups else min(chosen, key=lambda c: unlike[t][c])].append(t)
    return list(groups.values())


def chosen_moving(count: int, unlike: Unlike) -> tuple[Counted, ...]:
    """Frames that tell how much change there is: the later ones of a video by their change, in groups.

    Groups are those within which changes differ least (least squares). Of each the middle one is taken.
    """
    changes = [math.sqrt(unlike[t][t - 1]) for t in range(1, len(unlike))]
    order = sorted(range(len(changes)), key=lambda i: changes[i])
    ends = _parted([changes[i] for i in order], min(count, len(changes)))
    return tuple(
        Counted(1 + order[(start + stop) // 2], stop - start)
        for start, stop in pairwise((0, *ends))
    )


def _parted(values: Sequence[float], count: int) -> tuple[int, ...]:
    """Where each of ``count`` runs of ascending values ends, their squared deviations being least."""
    sums, squares = [0.0], [0.0]
    for value in values:
        sums.append(sums[-1] + value)
        squares.append(squares[-1] + value**2)

    def spread(start: int, stop: int) -> float:
        return squares[stop] - squares[start] - (sums[stop] - sums[start]) ** 2 / (stop - start)

    best: list[tuple[float, tuple[int, ...]]] = [
        (spread(0, stop), (stop,)) for stop in range(1, len(values) + 1)
    ]  # by where the last run ends
    for parts in range(2, count + 1):
        best = [
            min(
                (cost + spread(ends[-1], stop), (*ends, stop))
                for cost, ends in best
                if ends[-1] < stop
            )
            for stop in range(parts, len(values) + 1)
        ]
    return best[-1][1]


def _pieces(plan: TilePlan) -> tuple[Piece, ...]:
    """One for one tile; else pieces of half a tile, since they are worked on beside whole frames."""
    _, height, width = plan.latent_shape
    if plan.tiles == 1:
        return (Piece(0, 0, height, width),)
    size = list(plan.largest_tile)
    longer = size.index(max(size))
    size[longer] = math.ceil(size[longer] / 2)
    return tuple(
        Piece(top, left, bottom - top, right - left)
        for top, bottom in _parts(height, size[0])
        for left, right in _parts(width, size[1])
    )


def _parts(length: int, size: int) -> list[tuple[int, int]]:
    """The fewest parts (start, stop), about equal and at most ``size``, that cover ``length`` once."""
    count = math.ceil(length / size)
    ends = [i * length // count for i in range(count + 1)]
    return list(pairwise(ends))

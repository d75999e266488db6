"""What the statistics of a whole video are estimated on: which frames, and what each counts. Arithmetic only.

Norms take mean and variance over all of time and space. A few latent frames tell them: *stills*, each as if
it had always stood still, for what is to be seen, and *moving* ones, behind the frames before, for what
change adds to that. Both are chosen by how unlike the frames are, so that a scene that is short, or a cut
that is one frame, counts as much as there is of it and no more; what lies between two of them (a fade) counts
for both. A short video is looked at as a whole. How many tiles there are plays no part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vae_tiling.tiles import TilePlan

MOST_STILLS, MOST_MOVING = 7, 6
FRAMES_BEFORE = 3
"""A moving frame is looked at behind so many: a cut is felt as long by the layers that see furthest."""
FRAMES_KEPT = 3
"""So many of them, itself included, at later levels, where they are larger and nearer in time (±0.1 dB)."""
LONGEST_RUN = 21
"""So many pixel frames are looked at as they are: exact."""
SMOOTHNESS = 1.75
"""What a layer makes of two frames differs by about this power of their distance (0 to 2): it sets how frames
between those looked at are shared out. Measured: docs/decisions/0004-vae-tiling.md."""
NUGGET = 1e-6
"""Of the largest difference: frames that are as good as the same share what they stand for."""
LEAST_WINDOW = 4
"""Cells: windows are parts of at least half of it, which is what a layer sees beyond their edges."""

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
        halves: pieces of a frame's one half and of its other; moving frames are looked at in one, by turns.
        window: cells (height, width) that are worked on together, where the samples wait in main memory
            between layers; None with one tile, where all of them stay on the device.
    """

    run: bool
    stills: int
    moving: int
    halves: tuple[tuple[Piece, ...], ...]
    window: tuple[int, int] | None


@dataclass(frozen=True)
class Counted:
    """A latent frame and what it stands for.

    Attributes:
        frame: its number.
        stands_for: so many later latent frames; each grows to as many frames as a layer has for one.
        first: its share of the first, which is one frame everywhere.
    """

    frame: int
    stands_for: float
    first: float = 0.0


def sample_sizes(plan: TilePlan) -> SampleSizes:
    """How much of a plan's video is looked at, and in what windows."""
    frames, height, width = plan.latent_shape
    tile_height, tile_width = plan.largest_tile
    several = plan.tiles > 1
    return SampleSizes(
        run=frames > 1 and 4 * frames - 3 <= LONGEST_RUN,
        stills=min(MOST_STILLS, frames),
        moving=min(MOST_MOVING, frames - 1),
        halves=_halves(height, width),
        window=(max(LEAST_WINDOW, tile_height), max(LEAST_WINDOW, tile_width)) if several else None,
    )


def chosen_stills(count: int, unlike: Unlike) -> tuple[Counted, ...]:
    """Frames that are typical of as many groups of frames; all others are shared out among them."""
    chosen = _medoids(count, unlike)
    later = _shares(chosen, range(1, len(unlike)), unlike)
    first = _shares(chosen, range(1), unlike)
    return tuple(map(Counted, chosen, later, first))


def chosen_moving(count: int, unlike: Unlike) -> tuple[Counted, ...]:
    """The same for changes: later frames, told apart by themselves and by the frames before them.

    So going into white and coming out of it are two things, however large both are.
    """
    later = range(1, len(unlike))
    changes = [
        [unlike[one][other] + unlike[one - 1][other - 1] for other in later] for one in later
    ]
    chosen = _medoids(count, changes)
    counts = _shares(chosen, range(len(changes)), changes)
    return tuple(Counted(1 + change, stands) for change, stands in zip(chosen, counts, strict=True))


def _medoids(count: int, unlike: Unlike) -> list[int]:
    """Those to which all are least unlike in sum: k-medoids, built up, then improved by swaps."""
    every = range(len(unlike))
    chosen: list[int] = []
    nearest = [math.inf] * len(unlike)
    while len(chosen) < min(count, len(unlike)):
        _, best = min((_sum_of_least(nearest, unlike[c]), c) for c in every if c not in chosen)
        chosen.append(best)
        nearest = [min(pair) for pair in zip(nearest, unlike[best], strict=True)]
    least = sum(nearest)
    while True:
        swaps = []
        for place in range(len(chosen)):
            others = [unlike[c] for i, c in enumerate(chosen) if i != place]
            without = [min(row, default=math.inf) for row in zip(*others, strict=True)]
            without = without or [math.inf] * len(unlike)
            swaps += [
                (_sum_of_least(without, unlike[c]), place, c) for c in every if c not in chosen
            ]
        total, place, better = min(swaps, default=(least, 0, chosen[0]))
        if total >= least * (1 - 1e-9):
            return sorted(chosen)
        chosen[place], least = better, total


def _sum_of_least(nearest: Sequence[float], other: Sequence[float]) -> float:
    return sum(map(min, nearest, other))


def _shares(chosen: Sequence[int], frames: Sequence[int], unlike: Unlike) -> list[float]:
    """How often each of those chosen counts, that they may stand for all of ``frames``.

    Each frame is interpolated between those chosen (ordinary kriging with a power variogram; Cressie,
    Statistics for Spatial Data, 3.2), and its weights are added up: one system of equations for all.
    """
    power = SMOOTHNESS / 2
    rough = [[unlike[one][other] ** power for other in chosen] for one in chosen]
    nugget = NUGGET * max(map(max, rough)) or 1.0
    rows = [
        [*(value - nugget * (i == j) for j, value in enumerate(row)), 1.0]
        for i, row in enumerate(rough)
    ]
    wanted = [sum(unlike[one][frame] ** power for frame in frames) for one in chosen]
    solved = _solved([*rows, [1.0] * len(chosen) + [0.0]], [*wanted, float(len(frames))])
    kept = [max(0.0, weight) for weight in solved[:-1]]
    return [weight * len(frames) / (sum(kept) or 1.0) for weight in kept]


def _solved(rows: list[list[float]], wanted: list[float]) -> list[float]:
    """x of rows · x = wanted: Gaussian elimination with the largest pivots."""
    system = [[*row, value] for row, value in zip(rows, wanted, strict=True)]
    for at in range(len(system)):
        pivot = max(range(at, len(system)), key=lambda row: abs(system[row][at]))
        system[at], system[pivot] = system[pivot], system[at]
        system[at] = [value / system[at][at] for value in system[at]]
        for row, values in enumerate(system):
            if row != at:
                factor = values[at]
                system[row] = [a - factor * b for a, b in zip(values, system[at], strict=True)]
    return [row[-1] for row in system]


def _halves(height: int, width: int) -> tuple[tuple[Piece, ...], ...]:
    """Two quarters each, across from each other, so that both see all rows and all columns."""
    rows, columns = ((0, side // 2, side) for side in (height, width))
    quarters = {
        (y, x): Piece(rows[y], columns[x], rows[y + 1] - rows[y], columns[x + 1] - columns[x])
        for y in range(2)
        for x in range(2)
    }
    halves = [(quarters[0, 0], quarters[1, 1]), (quarters[0, 1], quarters[1, 0])]
    filled = [tuple(piece for piece in half if piece.area) for half in halves]
    return tuple(half for half in filled if half)

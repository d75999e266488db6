"""Clips of every scene, and what the tests of the judge do with them."""

from __future__ import annotations

import itertools
import random

import numpy as np

from kandinsky5.demo.adherence import Observation
from kandinsky5.demo.scenes import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Scene, random_scene

GRID = list(itertools.product(COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS))


def scene_of(cell: tuple[str, str, str, str], key: object = 0) -> Scene:
    colour, shape, direction, background = cell
    rng = random.Random(f"{cell}/{key}")
    return random_scene(rng, colour=colour, shape=shape, direction=direction, background=background)


def words(seen: Observation | Scene) -> tuple[str | None, ...]:
    return seen.colour, seen.shape, seen.direction, seen.background


def spread(count: int) -> list[tuple[str, str, str, str]]:
    """``count`` cells in which every word comes up."""
    cells = random.Random(count).sample(GRID, count)
    for column, table in enumerate((COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS)):
        assert {cell[column] for cell in cells} == set(table)
    return cells


def noisy(clip: np.ndarray) -> np.ndarray:
    return as_pixels(clip + np.random.default_rng(3).normal(0.0, 8.0, clip.shape))


def as_pixels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


MOVING = [cell for cell in spread(60) if cell[2] != "still"][:16]
STILL = [cell for cell in GRID if cell[2] == "still"][::5]

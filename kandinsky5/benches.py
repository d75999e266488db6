"""The benchmarks of ``k1.py bench``: one row each. Only the standard library is needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kandinsky5.errors import UserError


@dataclass(frozen=True)
class BenchOption:
    """One option of a benchmark.

    Attributes:
        flag: as typed; without its dashes it is the function's keyword.
        help: one line.
        kind: ``int``, ``float``, ``str`` or ``bool`` (a switch).
    """

    flag: str
    help: str
    kind: type = int

    @property
    def keyword(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")


@dataclass(frozen=True)
class Bench:
    """A benchmark.

    Attributes:
        title: what it shows.
        target: its function, ``module:name``; it takes the options as keywords and gives a dictionary.
        options: those it understands.
    """

    title: str
    target: str
    options: tuple[BenchOption, ...] = ()

    def run(self, given: dict[str, Any]) -> dict[str, Any]:
        """Its numbers, JSON-ready.

        Raises:
            UserError: an option that cannot be used, or a machine that lacks what is measured.
        """
        module, _, name = self.target.partition(":")
        function: Callable[..., dict[str, Any]] = getattr(importlib.import_module(module), name)
        try:
            return function(**given)
        except NotImplementedError as error:  # how packages that know no UserError say "not here"
            raise UserError("bench", name, str(error)) from error


BENCHES: dict[str, Bench] = {
    "demo-adherence": Bench(
        "how often the built-in model paints the colour, direction and shape asked for",
        "kandinsky5.demo.bench:demo_adherence",
        (
            BenchOption("--pairs", "how many clips (60)"),
            BenchOption("--seed", "of the questions (20000)"),
            BenchOption("--steps", "of a clip (the preset's)"),
            BenchOption("--mode", "t2v or i2v (t2v)", str),
            BenchOption("--keep", "keep the clips in this folder", str),
            BenchOption("--weights", "format of the transformer's weights (auto)", str),
        ),
    ),
}

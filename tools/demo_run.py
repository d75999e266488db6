"""What every stage of the demo's training shares: a schedule, a saved state, scenes drawn from a seed."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from kandinsky5.demo.scenes import Scene, random_scene

log = logging.getLogger("train_demo")

Net = TypeVar("Net", bound=torch.nn.Module)

SIZE_PX = 64
FRAMES = 25


@dataclass(frozen=True)
class Stage:
    """How long a stage trains and how fast it learns."""

    name: str
    steps: int
    batch: int
    learning_rate: float
    warmup: int = 100


class Run(Generic[Net]):
    """A model in training: its optimiser, its place in the schedule and its saved state."""

    def __init__(self, stage: Stage, model: Net, folder: Path, device: str) -> None:
        self.stage, self.model, self.device = stage, model, device
        self.path = folder / f"{stage.name}.pt"
        self.optimiser = torch.optim.AdamW(
            model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
        )
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.step = 0
        if self.path.exists():
            state = torch.load(self.path, map_location=device, weights_only=True)
            model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.average, self.step = state["average"], state["step"]

    def train(self, loss_of: Callable[[int], torch.Tensor], *, save_every: int = 200) -> None:
        """Run the steps that are left; ``loss_of(step)`` gives the loss of that step's own batch."""
        shown, started = 0.0, time.monotonic()
        while self.step < self.stage.steps:
            for group in self.optimiser.param_groups:
                group["lr"] = self.stage.learning_rate * self._rate()
            loss = loss_of(self.step)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            decay = min(0.999, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    self.average[name].lerp_(p, 1 - decay)
            self.step += 1
            shown += loss.item()
            if self.step % 50 == 0:
                rate = (time.monotonic() - started) / 50
                log.info(
                    "%s %d loss %.5f, %.2f s a step", self.stage.name, self.step, shown / 50, rate
                )
                shown, started = 0.0, time.monotonic()
            if self.step % save_every == 0 or self.step == self.stage.steps:
                self.save()

    def save(self) -> None:
        """Write the whole state under a temporary name, then rename."""
        temporary = self.path.with_suffix(".tmp")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "average": self.average,
                "step": self.step,
            },
            temporary,
        )
        temporary.replace(self.path)

    def averaged(self) -> Net:
        """The model with its exponentially averaged weights."""
        self.model.load_state_dict(self.average)
        return self.model

    def _rate(self) -> float:
        warm = min(1.0, (self.step + 1) / self.stage.warmup)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / self.stage.steps)))


def scenes_of_step(
    seed: int, stage: str, step: int, count: int
) -> Iterator[tuple[Scene, random.Random]]:
    """The scenes of one training step, the same whenever it is run."""
    rng = random.Random(f"{seed}/{stage}/{step}")
    for _ in range(count):
        yield random_scene(rng), rng

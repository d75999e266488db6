"""The way from noise to a latent: schedule, guidance, Euler steps.

Latents here are [T, H, W, C] float32 on the device; t runs from 1 (noise) to 0. Inside the loop they are in
the order in which the transformer takes the tokens, for everyone outside in raster order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from kandinsky5.errors import NotFinite, Stopped
from kandinsky5.model.dit import DiTConfig, Residual, StepConditioning
from kandinsky5.model.positions import VisualPositions
from kandinsky5.model.text import Conditioning
from kandinsky5.pipeline.cache import StepCache
from kandinsky5.pipeline.model_inputs import ModelInputs, inputs_for


class Transformer(Protocol):
    """What the loop needs of a model."""

    config: DiTConfig

    def prepare(
        self, conditionings: Sequence[Conditioning], times: Sequence[float]
    ) -> Sequence[Sequence[StepConditioning]]: ...

    def positions(
        self, latent: torch.Tensor, *, rope_scale: tuple[float, float, float]
    ) -> VisualPositions: ...

    def evaluate(
        self,
        x: torch.Tensor,
        branches: Sequence[StepConditioning],
        positions: VisualPositions,
        *,
        residuals: Sequence[Residual | None] | None,
    ) -> list[torch.Tensor]: ...


class ConditioningSchedule(Protocol):
    """What every step is steered by, made before the loop begins."""

    def branches(self, step: int, skips: Sequence[bool]) -> Sequence[StepConditioning]:
        """Prompt, then the negative one if it takes part, for the evaluation at ``times[step]``.

        They are on the latent's device when given out.

        Args:
            step: counts from 0 and only grows.
            skips: for each branch that is wanted, whether its blocks are skipped: then only ``out`` is used.
        """
        ...


@dataclass(frozen=True)
class PreparedSchedule:
    """A schedule that lies ready on the device.

    Attributes:
        prepared: from the transformer's ``prepare``, for the steps from ``start_step`` on.
        start_step: the step of the first row.
    """

    prepared: Sequence[Sequence[StepConditioning]]
    start_step: int = 0

    def branches(self, step: int, skips: Sequence[bool]) -> Sequence[StepConditioning]:
        return self.prepared[step - self.start_step][: len(skips)]


@dataclass(frozen=True)
class Guidance:
    """What steers the video: the prompt and, when scale is not 1, what to keep away from.

    Attributes:
        interval: the part of the schedule that is guided, as shares of its steps; the others have the
            prompt alone (arXiv 2404.07724).
    """

    positive: Conditioning
    negative: Conditioning | None = None
    scale: float = 1.0
    interval: tuple[float, float] = field(default=(0.0, 1.0), kw_only=True)

    @property
    def conditionings(self) -> tuple[Conditioning, ...]:
        """One for each branch of a step."""
        return (self.positive,) if self.negative is None else (self.positive, self.negative)

    def branches(self, steps: int) -> list[int]:
        """For each step how many evaluations it has: 2 where it is guided, else 1."""
        if self.negative is None:
            return [1] * steps
        first, end = (round(share * steps) for share in self.interval)
        return [2 if first <= step < end else 1 for step in range(steps)]


@dataclass(frozen=True)
class StepState:
    """The run after a step: steps done, the latent, the velocity that led to it, and both times.

    Attributes:
        latent, velocity: [T, H, W, C] float32 in raster order.
        evaluations_run, evaluations_skipped: in this step.
    """

    step: int
    total: int
    latent: torch.Tensor
    velocity: torch.Tensor
    time: float
    next_time: float
    evaluations_run: int = 1
    evaluations_skipped: int = 0


def schedule(steps: int, shift: float) -> torch.Tensor:
    """Times from 1 to 0: equal parts, then t ← s·t/(1+(s−1)·t). float32 [steps+1]."""
    times = torch.linspace(1, 0, steps + 1)
    return shift * times / (1 + (shift - 1) * times)


def draw_noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Standard normal noise, float32, drawn on the CPU so that one seed means one result everywhere."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


@torch.inference_mode()
def denoise(
    transformer: Transformer,
    noise: torch.Tensor,
    guidance: Guidance,
    times: torch.Tensor,
    *,
    conditioning: ConditioningSchedule | None = None,
    cache: StepCache | None = None,
    start_step: int = 0,
    rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    inputs: ModelInputs | None = None,
    expect_passes: Callable[[int], None] = lambda passes: None,
    on_step: Callable[[StepState], None] = lambda state: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Integrate dx/dt = v from t = 1 to 0 by Euler steps.

    Args:
        transformer: gives the velocity.
        noise: [T, H, W, C] float32, the latent at ``times[start_step]``: noise to begin with, or
            ``StepState.latent`` after that many steps; not changed.
        guidance: prompt, negative prompt and scale g: v = v_neg + g·(v_pos − v_neg).
        times: [steps+1] from :func:`schedule`.
        conditioning: what the steps are steered by; None has it prepared by the transformer and kept where
            the prompts are.
        cache: decides which evaluations are skipped; its plan is for the branches of ``guidance``.
        start_step: steps that are done already.
        rope_scale: of the preset.
        inputs: how the latent goes into the transformer, with a given picture; None is without one.
        expect_passes: told first in how many steps the transformer's blocks will run.
        on_step: told after each step.
        should_stop: asked before each step.

    Returns:
        The latent at t = 0, [T, H, W, C] float32.

    Raises:
        Stopped: ``should_stop`` said so.
        NotFinite: a step gave NaN or infinity; ``on_step`` is not told of it.
        ValueError: ``start_step`` beyond the schedule.
    """
    moments = times.tolist()
    total = len(moments) - 1
    if not 0 <= start_step <= total:
        raise ValueError(f"start_step {start_step} of a schedule of {total} steps")
    if conditioning is None:
        prepared = transformer.prepare(guidance.conditionings, moments[start_step:total])
        conditioning = PreparedSchedule(prepared, start_step)
    counts, inputs = guidance.branches(total), inputs or inputs_for(transformer.config, None)
    plan = [(False,) * count if cache is None else cache.skips(i) for i, count in enumerate(counts)]
    expect_passes(sum(not all(skips) for skips in plan[start_step:]))
    positions = transformer.positions(noise, rope_scale=rope_scale)
    order = positions.order
    latent, around = order.arranged(noise.clone()), inputs.arranged(order)
    for step in range(start_step, total):
        if should_stop():
            raise Stopped(f"stopped before step {step + 1} of {total}")
        time, next_time, skips = moments[step], moments[step + 1], plan[step]
        latent = around.begun(latent)
        velocity = guided(
            transformer.evaluate(
                around.of(latent),
                conditioning.branches(step, skips),
                positions,
                residuals=None if cache is None else cache.residuals(step),
            ),
            guidance.scale,
        )
        latent = latent + (next_time - time) * velocity
        if not latent.isfinite().all():
            raise NotFinite(step + 1, total)
        on_step(
            StepState(
                step=step + 1,
                total=total,
                latent=order.restored(latent),
                velocity=order.restored(velocity),
                time=time,
                next_time=next_time,
                evaluations_run=skips.count(False),
                evaluations_skipped=skips.count(True),
            )
        )
        del velocity  # the next evaluation needs the room
    return inputs.finished(order.restored(latent))


def guided(velocities: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
    """v, or v_neg + scale·(v_pos − v_neg) of a pair (positive, negative); float32."""
    positive, *negatives = (velocity.float() for velocity in velocities)
    if not negatives:
        return positive
    (negative,) = negatives
    return negative + scale * (positive - negative)

"""The way from noise to a latent: schedule, guidance, Euler steps.

Latents here are [T, H, W, C] float32 on the device; t runs from 1 (noise) to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from kandinsky5.errors import NotFinite, Stopped
from kandinsky5.model.dit import DiTConfig, StepConditioning
from kandinsky5.model.text import Conditioning

NORMALISED_FRAMES = 4
REFERENCE_FRAMES = 5
MEAN_SLACK = (-0.05, 0.10)
STD_SLACK = (-0.10, 0.25)
"""How far a first frame's mean and standard deviation may be moved (published constants)."""


class Transformer(Protocol):
    """What the loop needs of a model."""

    config: DiTConfig

    def prepare(
        self, conditionings: Sequence[Conditioning], times: Sequence[float]
    ) -> Sequence[Sequence[StepConditioning]]: ...

    def evaluate(
        self,
        x: torch.Tensor,
        branches: Sequence[StepConditioning],
        *,
        rope_scale: tuple[float, float, float],
    ) -> list[torch.Tensor]: ...


class ConditioningSchedule(Protocol):
    """What every step is steered by, made before the loop begins."""

    def branches(self, step: int) -> Sequence[StepConditioning]:
        """Prompt, then the negative one if there is any, for the evaluation at ``times[step]``.

        They are on the latent's device when given out. ``step`` counts from 0 and only grows.
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

    def branches(self, step: int) -> Sequence[StepConditioning]:
        return self.prepared[step - self.start_step]


@dataclass(frozen=True)
class Guidance:
    """What steers the video: the prompt and, when scale is not 1, what to keep away from."""

    positive: Conditioning
    negative: Conditioning | None = None
    scale: float = 1.0

    @property
    def conditionings(self) -> tuple[Conditioning, ...]:
        """One for each branch of a step."""
        return (self.positive,) if self.negative is None else (self.positive, self.negative)

    @property
    def evaluations_per_step(self) -> int:
        return len(self.conditionings)


@dataclass(frozen=True)
class StepState:
    """The run after a step: steps done, the latent, the velocity that led to it, and both times."""

    step: int
    total: int
    latent: torch.Tensor
    velocity: torch.Tensor
    time: float
    next_time: float


def schedule(steps: int, shift: float) -> torch.Tensor:
    """Times from 1 to 0: equal parts, then t ← s·t/(1+(s−1)·t). float32 [steps+1]."""
    times = torch.linspace(1, 0, steps + 1)
    return shift * times / (1 + (shift - 1) * times)


def draw_noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Standard normal noise, float32, drawn on the CPU so that one seed means one result everywhere."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def model_input(
    config: DiTConfig, latent: torch.Tensor, first_frame: torch.Tensor | None
) -> torch.Tensor:
    """The latent as the transformer takes it: [x, zeros, mask] for video models, x alone otherwise."""
    if not config.visual_cond:
        return latent
    condition = torch.zeros_like(latent)
    mask = torch.zeros_like(latent[..., :1])
    if first_frame is not None:
        mask[:1] = 1.0
    return torch.cat([latent, condition, mask], dim=-1)


@torch.inference_mode()
def denoise(
    transformer: Transformer,
    noise: torch.Tensor,
    guidance: Guidance,
    times: torch.Tensor,
    *,
    conditioning: ConditioningSchedule | None = None,
    start_step: int = 0,
    rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    first_frame: torch.Tensor | None = None,
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
        start_step: steps that are done already.
        rope_scale: of the preset.
        first_frame: [1, H, W, C], the given picture's latent for image-to-video: it replaces the first
            frame before every step and after the last, and then the first frames are renormalised.
        on_step: told after each step.
        should_stop: asked before each step.

    Returns:
        The latent at t = 0, [T, H, W, C] float32.

    Raises:
        Stopped: ``should_stop`` said so.
        NotFinite: a step gave NaN or infinity; ``on_step`` is not told of it.
        ValueError: ``start_step`` beyond the schedule.
    """
    latent = noise.clone()
    moments = times.tolist()
    total = len(moments) - 1
    if not 0 <= start_step <= total:
        raise ValueError(f"start_step {start_step} of a schedule of {total} steps")
    if conditioning is None:
        prepared = transformer.prepare(guidance.conditionings, moments[start_step:total])
        conditioning = PreparedSchedule(prepared, start_step)
    for step, (time, next_time) in enumerate(pairwise(moments)):
        if step < start_step:
            continue
        if should_stop():
            raise Stopped(f"stopped before step {step + 1} of {total}")
        if first_frame is not None:
            latent[:1] = first_frame
        inputs = model_input(transformer.config, latent, first_frame)
        branches = conditioning.branches(step)
        velocities = transformer.evaluate(inputs, branches, rope_scale=rope_scale)
        velocity = guided(velocities, guidance.scale)
        latent = latent + (next_time - time) * velocity
        if not latent.isfinite().all():
            raise NotFinite(step + 1, total)
        on_step(StepState(step + 1, total, latent, velocity, time, next_time))
    if first_frame is not None:
        latent[:1] = first_frame
        latent = normalise_first_frames(latent)
    return latent


def guided(velocities: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
    """v, or v_neg + scale·(v_pos − v_neg) of a pair (positive, negative); float32."""
    positive, *negatives = (velocity.float() for velocity in velocities)
    if not negatives:
        return positive
    (negative,) = negatives
    return negative + scale * (positive - negative)


def normalise_first_frames(latent: torch.Tensor) -> torch.Tensor:
    """Bring the first four frames near the mean and spread of the five that follow.

    An input picture's latent differs a little from what the model paints; left alone the difference shows
    as a flash. Each frame keeps its own pattern; mean and standard deviation move within
    :data:`MEAN_SLACK` and :data:`STD_SLACK`. A video of four latent frames or fewer has nothing to compare
    with and stays as it is.

    Args:
        latent: [T, H, W, C].

    Returns:
        A new tensor of the same shape.
    """
    reference = latent[NORMALISED_FRAMES : NORMALISED_FRAMES + REFERENCE_FRAMES]
    if reference.shape[0] == 0:
        return latent.clone()
    frames = latent[:NORMALISED_FRAMES]
    mean = frames.mean(dim=(1, 2, 3), keepdim=True)
    std = frames.std(dim=(1, 2, 3), keepdim=True)
    target_mean = reference.mean().clamp(mean + MEAN_SLACK[0], mean + MEAN_SLACK[1])
    target_std = reference.std().clamp(std + STD_SLACK[0], std + STD_SLACK[1])
    normalised = (frames - mean) / std * target_std + target_mean
    return torch.cat([normalised, latent[NORMALISED_FRAMES:]])

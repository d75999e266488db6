"""How the latent goes into the transformer, with a given picture or without.

Three kinds of checkpoint: video models take [x, zeros, mask], and a given picture is their first frame;
the editing model takes [x, the picture's latent, ones]; the text-to-image model takes x alone.
Latents are [T, H, W, C] float32.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch

from kandinsky5.model.dit import DiTConfig
from kandinsky5.model.positions import TokenOrder
from kandinsky5.presets import Preset

NORMALISED_FRAMES = 4
REFERENCE_FRAMES = 5
MEAN_SLACK = (-0.05, 0.10)
STD_SLACK = (-0.10, 0.25)
"""How far a first frame's mean and standard deviation may be moved (published constants)."""


class ModelInputs(Protocol):
    """What stands around the latent in the loop."""

    def arranged(self, order: TokenOrder) -> ModelInputs:
        """The same for latents in this order, which ``begun`` and ``of`` then take and give."""

    def begun(self, latent: torch.Tensor) -> torch.Tensor:
        """The latent as a step begins with it."""

    def of(self, latent: torch.Tensor) -> torch.Tensor:
        """A latent [T, H, W, C] as the transformer takes it, [T, H, W, config.input_channels]."""

    def finished(self, latent: torch.Tensor) -> torch.Tensor:
        """The latent as the last step leaves it, in raster order → the result."""


def config_for(config: DiTConfig, preset: Preset) -> DiTConfig:
    """The transformer's dimensions as a preset means them.

    A file without a configuration does not tell what its condition channels are for unless it is of a
    published size: an image preset means the editing model's.
    """
    if preset.is_video or not config.visual_cond:
        return config
    return dataclasses.replace(config, visual_cond=False, instruct_type="channel")


def inputs_for(config: DiTConfig, picture: torch.Tensor | None) -> ModelInputs:
    """What a transformer takes.

    Args:
        config: the transformer's.
        picture: latent of the given picture [1, H, W, C], or None.

    Raises:
        ValueError: a picture for a model that takes none.
    """
    if picture is None:
        return Alone(conditions=config.input_channels - config.in_visual_dim)
    if config.visual_cond:
        return FirstFrame(picture)
    if config.instruct_type == "channel":
        return Edited(picture)
    raise ValueError("a picture for a transformer without channels for it")


@dataclass(frozen=True)
class Alone:
    """No picture: x, and zeros in the channels that are for one."""

    conditions: int = 0

    def arranged(self, order: TokenOrder) -> Alone:
        return self

    def begun(self, latent: torch.Tensor) -> torch.Tensor:
        return latent

    def of(self, latent: torch.Tensor) -> torch.Tensor:
        if not self.conditions:
            return latent
        return torch.cat([latent, latent.new_zeros(*latent.shape[:-1], self.conditions)], dim=-1)

    def finished(self, latent: torch.Tensor) -> torch.Tensor:
        return latent


@dataclass(frozen=True)
class FirstFrame:
    """A video that begins with a picture.

    Its latent replaces the first frame before every step and after the last, and then the first frames are
    renormalised. The mask tells the model; the condition channels stay zeros.
    """

    picture: torch.Tensor

    def arranged(self, order: TokenOrder) -> FirstFrame:
        return FirstFrame(order.arranged(self.picture))

    def begun(self, latent: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.picture, latent[1:]])

    def of(self, latent: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros_like(latent[..., :1])
        mask[:1] = 1.0
        return torch.cat([latent, torch.zeros_like(latent), mask], dim=-1)

    def finished(self, latent: torch.Tensor) -> torch.Tensor:
        return normalise_first_frames(self.begun(latent))


@dataclass(frozen=True)
class Edited:
    """A picture that is made out of another one, which stands beside the latent."""

    picture: torch.Tensor

    def arranged(self, order: TokenOrder) -> Edited:
        return Edited(order.arranged(self.picture))

    def begun(self, latent: torch.Tensor) -> torch.Tensor:
        return latent

    def of(self, latent: torch.Tensor) -> torch.Tensor:
        beside = self.picture.expand_as(latent)
        return torch.cat([latent, beside, torch.ones_like(latent[..., :1])], dim=-1)

    def finished(self, latent: torch.Tensor) -> torch.Tensor:
        return latent


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

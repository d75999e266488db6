"""What a job asks of memory: its models, sizes and the user's own choices. Arithmetic only, no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from kandinsky5.errors import UserError
from kandinsky5.family import (
    MODEL_SETS,
    WEIGHT_BYTES,
    ModelSet,
    TextEncoderShape,
    TransformerShape,
)
from kandinsky5.memory.activations import EvaluationSize
from kandinsky5.presets import PRESETS, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from kandinsky5.request import CHOICES, GenerationRequest, latent_shape, nabla_of

SOURCES = ("resident", "pinned", "disk")
"""Where a model's weights are while it computes: on the device; page-locked in RAM and streamed; streamed
from the file. Ordered by what they cost."""
MIN_SLOTS = 2
TEXT_LAYERS_TOO_FEW_TO_STREAM = 3


@dataclass(frozen=True)
class PlanChoices:
    """What the user decides instead of the plan; None leaves it to the plan.

    Attributes:
        weights: of the transformer: ``bf16``, ``int8`` or ``fp8``.
        text_weights: of the text encoder: ``bf16`` or ``nf4``.
        source: of :data:`SOURCES`, for the transformer.
        resident_blocks: visual blocks that stay on the device.
        slots: buffers for streamed blocks, 2 or more.
        chunk_tokens, chunk_heads: see ``kandinsky5.model.chunks``.
        vae_tile: longest side of a tile of the VAE.
        vae_tiling: how it decodes a video: ``rolling``, ``whole`` or ``published``.
    """

    weights: str | None = None
    text_weights: str | None = None
    source: str | None = None
    resident_blocks: int | None = None
    slots: int | None = None
    chunk_tokens: int | None = None
    chunk_heads: int | None = None
    vae_tile: int | None = None
    vae_tiling: str | None = None

    @property
    def made(self) -> dict[str, Any]:
        """Those that are not left to the plan."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class PlanRequest:
    """A job as its plan sees it.

    Attributes:
        preset: its name; sizes that would fit are looked for among the preset's.
        models: their dimensions.
        width_px, height_px, frames: of the result.
        steps: of the schedule.
        guided: whether a step has two evaluations.
        text_tokens: most tokens of a prompt.
        template_tokens: of the template around it.
        expand: whether the text encoder is to rewrite the prompt first.
        picture: whether there is an input image.
        encoder_sees: whether the text encoder reads that image too.
        sparse: NABLA attention.
        dtype: ``bf16`` or ``fp32``, what is computed in.
        file_weights: format of the transformer's file.
        formats, text_formats: those that work on this machine, for ``auto``.
        choices: the user's.

    Raises:
        UserError: a choice that no budget would make possible.
    """

    preset: str
    models: ModelSet
    width_px: int
    height_px: int
    frames: int
    steps: int
    guided: bool
    text_tokens: int = 256
    template_tokens: int = 129
    expand: bool = False
    picture: bool = False
    encoder_sees: bool = False
    sparse: bool = False
    dtype: str = "bf16"
    file_weights: str = "bf16"
    formats: tuple[str, ...] = ("bf16", "int8")
    text_formats: tuple[str, ...] = ("bf16", "nf4")
    choices: PlanChoices = PlanChoices()

    def __post_init__(self) -> None:
        choices, shape = self.choices, self.models.transformer
        for name in ("weights", "text_weights"):
            allowed = tuple(value for value in CHOICES[name] if value != "auto")
            if getattr(choices, name) not in (None, *allowed):
                raise UserError(name, getattr(choices, name), f"one of auto, {', '.join(allowed)}")
        if choices.source not in (None, *SOURCES):
            raise UserError("source", choices.source, f"one of {', '.join(SOURCES)}")
        if self.file_weights not in WEIGHT_BYTES:
            raise UserError("dit", self.file_weights, f"weights in {', '.join(WEIGHT_BYTES)}")
        for name, low, high in (
            ("resident_blocks", 0, shape.visual_blocks),
            ("slots", MIN_SLOTS, shape.visual_blocks),
            ("chunk_tokens", 1, None),
            ("chunk_heads", 1, shape.heads),
            ("vae_tile", 64, None),
        ):
            value = getattr(choices, name)
            if value is not None and (value < low or (high is not None and value > high)):
                allowed_range = f"{low} or more" if high is None else f"{low} to {high}"
                raise UserError(name, value, f"a number of {allowed_range}")

    @classmethod
    def of(
        cls,
        request: GenerationRequest,
        *,
        transformer: TransformerShape | None = None,
        text_encoder: TextEncoderShape | None = None,
        file_weights: str = "bf16",
        dtype: str = "bf16",
        choices: PlanChoices = PlanChoices(),
    ) -> PlanRequest:
        """From a settled request whose width and height are known.

        Args:
            transformer, text_encoder: the files' own dimensions, where they are not the preset's.
            file_weights: format of the transformer's weights.
            choices: they come before the request's own.

        Raises:
            UserError: a choice that cannot be.
        """
        preset = PRESETS[request.preset]
        assert request.width and request.height and request.steps and request.guidance
        models = MODEL_SETS["image-edit" if preset.mode == "i2i" else preset.model]
        models = dataclasses.replace(
            models,
            transformer=transformer or models.transformer,
            text_encoder=text_encoder or models.text_encoder,
        )
        latent_frames = latent_shape(request)[0]
        chosen = {
            name: value
            for name, made in vars(choices).items()
            if made is None and (value := getattr(request, name)) not in ("auto", None)
        }
        if not preset.is_video:
            chosen.pop("vae_tiling", None)
        return cls(
            preset=preset.name,
            models=models,
            width_px=request.width,
            height_px=request.height,
            frames=TEMPORAL_COMPRESSION * (latent_frames - 1) + 1,
            steps=request.steps,
            guided=abs(request.guidance - 1.0) > 1e-6,
            text_tokens=preset.text_tokens,
            expand=request.expand and not preset.is_builtin,
            picture=preset.takes_image,
            encoder_sees=preset.mode == "i2i",
            sparse=nabla_of(request) is not None,
            dtype=dtype,
            file_weights=file_weights,
            choices=dataclasses.replace(choices, **chosen),
        )

    @property
    def branches(self) -> int:
        return 2 if self.guided else 1

    @property
    def number_bytes(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // TEMPORAL_COMPRESSION + 1

    @property
    def tokens(self) -> int:
        """Visual tokens of one evaluation."""
        side = 2 * SPATIAL_COMPRESSION
        return self.latent_frames * (self.height_px // side) * (self.width_px // side)

    @property
    def evaluation(self) -> EvaluationSize:
        shape = self.models.transformer
        return EvaluationSize(
            tokens=self.tokens,
            model_dim=shape.model_dim,
            ff_dim=shape.ff_dim,
            heads=shape.heads,
            head_dim=shape.head_dim,
            branches=self.branches,
            number_bytes=self.number_bytes,
            sparse=self.sparse,
        )

    @property
    def latent_bytes(self) -> int:
        """On the device in the loop: x, the velocities and the model's input, in float32."""
        shape = self.models.transformer
        channels = 2 * shape.output_channels * self.branches + 2 * shape.input_channels
        return 4 * 4 * self.tokens * channels

    @property
    def step_table_bytes(self) -> int:
        """What one step takes from the host's table: modulation of every block, and texts."""
        shape = self.models.transformer
        vectors = (9 * shape.visual_blocks + 2) * shape.model_dim * 4
        return self.branches * (vectors + self.text_bytes)

    @property
    def text_bytes(self) -> int:
        """One prompt after the text blocks."""
        return self.text_tokens * self.models.transformer.model_dim * self.number_bytes

    def plain(self, weights: str) -> str:
        """The format that weights have when computing is in float32."""
        return "fp32" if self.dtype == "fp32" and weights == "bf16" else weights

"""Dimensions of every model a job can need, as rows of frozen tables, and what they weigh.

Figures: the published configurations (kandinskylab/Kandinsky-5.0-*, Qwen/Qwen2.5-VL-7B-Instruct,
openai/clip-vit-large-patch14, hunyuanvideo-community/HunyuanVideo, FLUX.1's VAE) and the files of the
built-in demo. Counts of parameters follow from them and are checked against the models themselves, without
weights, in tests/test_family.py. Only the standard library is needed; GB is 10⁹ bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PATCH_CELLS = 4
"""Latent cells of a token: patches are 1×2×2."""

WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "fp8": 1.0, "nf4": 0.5}
"""Bytes of one weight of a linear layer, its scales not counted."""
PLAIN_FORMATS = ("fp32", "bf16")
"""Formats without scales."""
SCALE_BYTES = 4
INT8_GROUP = 1024
"""Input channels that share a scale in this project's int8 (``int8.scheme``)."""
NF4_GROUP = 64
"""Weights that share a scale in bitsandbytes' NF4 (``kandinsky5.model.text_nf4``)."""


def linear_bytes(out_features: int, in_features: int, weights: str, *, bias: bool = True) -> int:
    """Bytes of one linear layer with its scales; the bias stays in bf16 (fp32 in ``fp32``).

    Args:
        weights: a key of :data:`WEIGHT_BYTES`.
    """
    count = out_features * in_features
    total = math.ceil(count * WEIGHT_BYTES[weights])
    if weights == "int8":
        total += SCALE_BYTES * out_features * math.ceil(in_features / INT8_GROUP)
    elif weights == "fp8":
        total += SCALE_BYTES * out_features
    elif weights == "nf4":
        total += SCALE_BYTES * math.ceil(count / NF4_GROUP)
    return total + (out_features * plain_bytes(weights) if bias else 0)


def plain_bytes(weights: str) -> int:
    """Bytes of a number that is never quantised (norms, biases, embeddings) beside weights of a format."""
    return 4 if weights == "fp32" else 2


@dataclass(frozen=True)
class TransformerShape:
    """A diffusion transformer; the fields are those of the published configurations.

    Attributes:
        name: ``lite``, ``pro``, ``image``, ``image-edit``, ``demo``, or ``custom``.
        model_dim, ff_dim, time_dim: widths.
        text_blocks, visual_blocks: counts.
        axes_dims: channels of a head for each rotary axis (time, height, width).
        input_channels: of the latent as the model takes it, conditions and mask included.
    """

    name: str
    model_dim: int
    ff_dim: int
    time_dim: int
    text_blocks: int
    visual_blocks: int
    axes_dims: tuple[int, int, int]
    input_channels: int = 33
    output_channels: int = 16
    text_dim: int = 3584
    pooled_dim: int = 768

    @property
    def head_dim(self) -> int:
        return sum(self.axes_dims)

    @property
    def heads(self) -> int:
        return self.model_dim // self.head_dim

    @property
    def visual_block_parameters(self) -> int:
        return self._attention(2) + 2 * self.model_dim * self.ff_dim + self.modulation_parameters(9)

    @property
    def text_block_parameters(self) -> int:
        return self._attention(1) + 2 * self.model_dim * self.ff_dim + self.modulation_parameters(6)

    @property
    def outer_parameters(self) -> int:
        """Of the embeddings and the output layer."""
        dim, time = self.model_dim, self.time_dim
        times = time * (dim + 1) + time * (time + 1)
        texts = dim * (self.text_dim + 3) + time * (self.pooled_dim + 3)
        visual = dim * (PATCH_CELLS * self.input_channels + 1)
        out = self.modulation_parameters(2) + PATCH_CELLS * self.output_channels * (dim + 1)
        return times + texts + visual + out

    @property
    def parameters(self) -> int:
        blocks = self.visual_blocks * self.visual_block_parameters
        return blocks + self.text_blocks * self.text_block_parameters + self.outer_parameters

    @property
    def tensors(self) -> int:
        """In the state dict."""
        return 24 * self.visual_blocks + 14 * self.text_blocks + 18

    def modulation_parameters(self, parts: int) -> int:
        """Of one modulation layer: 9 parts in visual blocks, 6 in text blocks, 2 in the output layer."""
        return parts * self.model_dim * (self.time_dim + 1)

    def visual_block_bytes(self, weights: str, *, modulation: bool = False) -> int:
        """One visual block as it is streamed: without its modulation, which is used before the loop."""
        return self._block_bytes(weights, attentions=2, parts=9 if modulation else 0)

    def text_block_bytes(self, weights: str) -> int:
        """One text block with its modulation."""
        return self._block_bytes(weights, attentions=1, parts=6)

    def modulation_bytes(self, weights: str) -> int:
        """The modulation layer of one visual block; never quantised."""
        return plain_bytes(weights) * self.modulation_parameters(9)

    def outer_bytes(self, weights: str) -> int:
        """Embeddings and output layer; never quantised."""
        return plain_bytes(weights) * self.outer_parameters

    def total_bytes(self, weights: str) -> int:
        """All weights."""
        visual = self.visual_blocks * self.visual_block_bytes(weights, modulation=True)
        text = self.text_blocks * self.text_block_bytes(weights)
        return visual + text + self.outer_bytes(weights)

    @classmethod
    def of_config(cls, values: Mapping[str, Any]) -> TransformerShape:
        """From the dimensions of a file: the fields of ``DiTConfig`` as a mapping.

        A family member keeps its name; anything else is ``custom``.
        """
        conditioned = values["visual_cond"] or values["instruct_type"] == "channel"
        latent = values["in_visual_dim"]
        shape = cls(
            name="custom",
            model_dim=values["model_dim"],
            ff_dim=values["ff_dim"],
            time_dim=values["time_dim"],
            text_blocks=values["num_text_blocks"],
            visual_blocks=values["num_visual_blocks"],
            axes_dims=tuple(values["axes_dims"]),
            input_channels=2 * latent + 1 if conditioned else latent,
            output_channels=values["out_visual_dim"],
            text_dim=values["in_text_dim"],
            pooled_dim=values["in_text_dim2"],
        )
        return next(
            (row for row in TRANSFORMERS.values() if row.dimensions == shape.dimensions), shape
        )

    @property
    def dimensions(self) -> tuple[Any, ...]:
        """Everything but the name."""
        return tuple(value for name, value in vars(self).items() if name != "name")

    def _attention(self, count: int) -> int:
        dim = self.model_dim
        return count * (4 * dim * (dim + 1) + 2 * self.head_dim)

    def _block_bytes(self, weights: str, *, attentions: int, parts: int) -> int:
        dim, ff, plain = self.model_dim, self.ff_dim, plain_bytes(weights)
        projection = linear_bytes(dim, dim, weights)
        norms = 2 * self.head_dim * plain
        feed_forward = linear_bytes(ff, dim, weights, bias=False)
        feed_forward += linear_bytes(dim, ff, weights, bias=False)
        modulation = plain * self.modulation_parameters(parts)
        return attentions * (4 * projection + norms) + feed_forward + modulation


@dataclass(frozen=True)
class TextEncoderShape:
    """The language part of Qwen2.5-VL, its output layer, and its vision tower.

    Attributes:
        hidden, layers, key_value_dim, intermediate: of the language part.
        vocabulary: rows of the token table and of the output layer (which generating needs).
        tied: whether output layer and token table are one.
        vision_parameters: of the tower that reads pictures; 0 where the program has no use for it.
    """

    name: str
    hidden: int
    layers: int
    key_value_dim: int
    intermediate: int
    vocabulary: int
    vision_parameters: int
    tied: bool = False

    @property
    def layer_parameters(self) -> int:
        return self.linear_parameters + self._layer_plain()

    @property
    def linear_parameters(self) -> int:
        """Weights of a layer's matrices: what NF4 quantises."""
        return sum(rows * columns for rows, columns, _ in self._linears())

    @property
    def largest_linear(self) -> int:
        """Weights of the largest of them."""
        return max(rows * columns for rows, columns, _ in self._linears())

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def language_parameters(self) -> int:
        """Token table, layers and last norm; without the output layer."""
        return self.embedding_parameters + self.layers * self.layer_parameters + self.hidden

    @property
    def head_parameters(self) -> int:
        return 0 if self.tied else self.embedding_parameters

    @classmethod
    def of_dimensions(cls, values: Mapping[str, Any]) -> TextEncoderShape:
        """From a file's dimensions: these fields without the name, as a mapping.

        A row keeps its name; anything else is ``custom``.
        """
        shape = cls(name="custom", **values)
        rows = (QWEN_7B, DEMO_ENCODER)
        return next(
            (row for row in rows if dataclasses.replace(shape, name=row.name) == row), shape
        )

    def layer_bytes(self, weights: str, number_bytes: int | None = None) -> int:
        """One layer.

        Args:
            weights: ``bf16``, ``fp32`` or ``nf4``.
            number_bytes: of a number that is never quantised; None takes :func:`plain_bytes`.
        """
        linears = sum(
            linear_bytes(rows, columns, weights, bias=False) for rows, columns, _ in self._linears()
        )
        return linears + self._layer_plain() * (number_bytes or plain_bytes(weights))

    def vision_bytes(self, weights: str, number_bytes: int | None = None) -> int:
        """The vision tower; never quantised."""
        return self.vision_parameters * (number_bytes or plain_bytes(weights))

    def table_bytes(self, weights: str, number_bytes: int | None = None) -> int:
        """The token table, or the output layer, which is as large; never quantised."""
        return self.embedding_parameters * (number_bytes or plain_bytes(weights))

    def total_bytes(
        self, weights: str, number_bytes: int | None = None, *, generating: bool, pictures: bool
    ) -> int:
        """All that is loaded for a task: the output layer for generating, the tower for pictures."""
        plain = number_bytes or plain_bytes(weights)
        total = self.table_bytes(weights, plain) + self.layers * self.layer_bytes(weights, plain)
        total += self.hidden * plain + (self.head_parameters * plain if generating else 0)
        return total + (self.vision_bytes(weights, plain) if pictures else 0)

    def _linears(self) -> tuple[tuple[int, int, bool], ...]:
        """(rows, columns, whether there is a bias) of a layer's matrices."""
        hidden, narrow, wide = self.hidden, self.key_value_dim, self.intermediate
        attention = ((hidden, hidden, True), (narrow, hidden, True), (narrow, hidden, True))
        rest = ((hidden, hidden, False), (wide, hidden, False), (wide, hidden, False))
        return (*attention, *rest, (hidden, wide, False))

    def _layer_plain(self) -> int:
        """Numbers of a layer that are never quantised: biases and two norms."""
        return sum(rows for rows, _, bias in self._linears() if bias) + 2 * self.hidden


@dataclass(frozen=True)
class ClipShape:
    """The text part of CLIP; kept in float32, as published."""

    name: str
    parameters: int

    @property
    def total_bytes(self) -> int:
        return 4 * self.parameters


@dataclass(frozen=True)
class VaeShape:
    """An autoencoder.

    Attributes:
        widths: channels of its levels (``block_out_channels``).
        layers: residual blocks of a level (``layers_per_block``).
        is_video: causal in time (HunyuanVideo), or of single pictures (FLUX).
    """

    name: str
    parameters: int
    widths: tuple[int, ...]
    layers: int
    is_video: bool
    latent_channels: int = 16

    def total_bytes(self, bytes_per_number: int = 2) -> int:
        return self.parameters * bytes_per_number


_PRO_AXES, _LITE_AXES = (32, 48, 48), (16, 24, 24)
_IMAGE = TransformerShape("image", 2560, 10240, 512, 2, 50, _PRO_AXES, input_channels=16)
_DEMO = TransformerShape("demo", 192, 768, 128, 1, 6, _LITE_AXES, text_dim=128, pooled_dim=64)
TRANSFORMERS: dict[str, TransformerShape] = {
    row.name: row
    for row in (
        TransformerShape("lite", 1792, 7168, 512, 2, 32, _LITE_AXES),
        TransformerShape("pro", 4096, 16384, 1024, 4, 60, _PRO_AXES),
        _IMAGE,
        TransformerShape("image-edit", 2560, 10240, 512, 2, 50, _PRO_AXES),
        _DEMO,
    )
}
"""Transformers by the name of the family member; ``image`` makes pictures, ``image-edit`` edits them."""

QWEN_7B = TextEncoderShape("Qwen2.5-VL 7B", 3584, 28, 512, 18944, 152_064, 676_550_144)
DEMO_ENCODER = TextEncoderShape("demo text encoder", 128, 2, 64, 256, 896, 0, tied=True)
CLIP_L = ClipShape("CLIP-L", 123_060_480)
DEMO_CLIP = ClipShape("demo CLIP", 133_440)
HUNYUAN_VAE = VaeShape("HunyuanVideo VAE", 246_478_803, (128, 256, 512, 512), 2, is_video=True)
FLUX_VAE = VaeShape("FLUX VAE", 83_819_683, (128, 256, 512, 512), 2, is_video=False)
DEMO_VAE = VaeShape("demo VAE", 2_909_539, (16, 32, 64, 64), 1, is_video=True)


@dataclass(frozen=True)
class ModelSet:
    """Everything one job runs."""

    transformer: TransformerShape
    text_encoder: TextEncoderShape = QWEN_7B
    clip: ClipShape = CLIP_L
    vae: VaeShape = HUNYUAN_VAE


MODEL_SETS: dict[str, ModelSet] = {
    "lite": ModelSet(TRANSFORMERS["lite"]),
    "pro": ModelSet(TRANSFORMERS["pro"]),
    "image": ModelSet(TRANSFORMERS["image"], vae=FLUX_VAE),
    "image-edit": ModelSet(TRANSFORMERS["image-edit"], vae=FLUX_VAE),
    "demo": ModelSet(TRANSFORMERS["demo"], DEMO_ENCODER, DEMO_CLIP, DEMO_VAE),
}
"""Model sets by the name of the transformer's row."""

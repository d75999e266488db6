"""The Kandinsky 5 diffusion transformer (arXiv 2511.14993), one class for Lite, Image, Pro and the demo.

Tensor names and shapes are those of the published checkpoints. The model does not know whether it is
streamed, quantised or cached: linear layers come from a factory, attention from an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kandinsky5.model.attention import AttentionEngine, NablaParams, sdpa
from kandinsky5.model.blocks import TextBlock, VisualBlock
from kandinsky5.model.chunks import WHOLE
from kandinsky5.model.dimensions import dimensions_of
from kandinsky5.model.layers import (
    Attention,
    LinearFactory,
    OutLayer,
    TextEmbeddings,
    TimeEmbeddings,
    VisualEmbeddings,
)
from kandinsky5.model.positions import TokenOrder, VisualPositions, positions_of
from kandinsky5.model.rope import rope_angles_1d, rope_of

if TYPE_CHECKING:
    from kandinsky5.model.text import Conditioning


@dataclass(frozen=True)
class DiTConfig:
    """Dimensions of a transformer; fields and meanings as in the published configurations.

    ``in_visual_dim`` counts the latent's channels alone: with ``visual_cond`` or
    ``instruct_type="channel"`` the model's input has as many condition channels again and one mask.
    """

    in_visual_dim: int = 16
    out_visual_dim: int = 16
    in_text_dim: int = 3584
    in_text_dim2: int = 768
    time_dim: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    model_dim: int = 1792
    ff_dim: int = 7168
    num_text_blocks: int = 2
    num_visual_blocks: int = 32
    axes_dims: tuple[int, int, int] = (16, 24, 24)
    visual_cond: bool = True
    instruct_type: str | None = None

    @property
    def head_dim(self) -> int:
        return sum(self.axes_dims)

    @property
    def input_channels(self) -> int:
        """Channels of the latent as the model takes it: with conditions and mask where it has them."""
        conditioned = self.visual_cond or self.instruct_type == "channel"
        return 2 * self.in_visual_dim + 1 if conditioned else self.in_visual_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiTConfig:
        """Read a published ``config.json``; keys that are not dimensions of the model are ignored."""
        return cls(**dimensions_of(cls, values))


@dataclass(frozen=True)
class StepConditioning:
    """All that one evaluation takes from the prompt and the time, and that x has no part in.

    Attributes:
        text: [L, model_dim] in the weights' dtype, after the text blocks.
        visual: modulation of each visual block, float32 [1, 9·model_dim].
        out: modulation of the output layer, float32 [1, 2·model_dim].
    """

    text: torch.Tensor
    visual: tuple[torch.Tensor, ...]
    out: torch.Tensor


@dataclass
class Residual:
    """What the visual blocks add to one branch's stream, for :meth:`DiffusionTransformer3D.evaluate`.

    Attributes:
        value: [S, model_dim]: added instead of running the blocks. None: they run, and it is put here.
    """

    value: torch.Tensor | None = None


class DiffusionTransformer3D(nn.Module):
    """Predicts the velocity of a latent on its way from noise to video.

    Args:
        config: dimensions.
        attention: engine of every attention layer.
        linear: factory of the layers in attention and feed-forward; embeddings, modulation and the
            output layer are always ``nn.Linear``.

    Attributes:
        chunks: how much of a visual block is computed at once; may be set at any time.
    """

    def __init__(
        self,
        config: DiTConfig,
        *,
        attention: AttentionEngine = sdpa,
        linear: LinearFactory = nn.Linear,
    ) -> None:
        super().__init__()
        self.config = config
        self.time_embeddings = TimeEmbeddings(config.model_dim, config.time_dim)
        self.text_embeddings = TextEmbeddings(config.in_text_dim, config.model_dim)
        self.pooled_text_embeddings = TextEmbeddings(config.in_text_dim2, config.time_dim)
        self.visual_embeddings = VisualEmbeddings(
            config.input_channels, config.model_dim, config.patch_size
        )
        self.text_transformer_blocks = nn.ModuleList(
            TextBlock(config, attention, linear) for _ in range(config.num_text_blocks)
        )
        self.visual_transformer_blocks = nn.ModuleList(
            VisualBlock(config, attention, linear) for _ in range(config.num_visual_blocks)
        )
        self.out_layer = OutLayer(
            config.model_dim, config.time_dim, config.out_visual_dim, config.patch_size
        )
        self.chunks = WHOLE

    def use_attention(self, engine: AttentionEngine) -> None:
        """Have every attention layer compute with this engine from now on."""
        for layer in self.modules():
            if isinstance(layer, Attention):
                layer.engine = engine

    @property
    def visual_modulations(self) -> nn.ModuleList:
        """The visual blocks' modulations, in order: all that :meth:`prepare` needs of those blocks."""
        return nn.ModuleList(
            block.get_submodule("visual_modulation") for block in self.visual_transformer_blocks
        )

    def forward(
        self,
        x: torch.Tensor,
        text_embed: torch.Tensor,
        pooled_text_embed: torch.Tensor,
        time: float | torch.Tensor,
        *,
        rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
        sparse: NablaParams | None = None,
    ) -> torch.Tensor:
        """One evaluation. A leading batch axis on every tensor is allowed (training uses it).

        Args:
            x: latent [T, H, W, C_in], C_in = ``config.input_channels``; H and W multiples of the patch.
            text_embed: [L, in_text_dim], L ≥ 1.
            pooled_text_embed: [in_text_dim2].
            time: in [0, 1], 1 being pure noise.
            rope_scale: divisor of the rotary angles along (time, height, width).
            sparse: NABLA settings, or None for full attention.

        Returns:
            Velocity [T, H, W, C_out] in the dtype of the model's weights.

        Raises:
            ValueError: the grid is longer than 128 tokens on an axis; with ``sparse``, its height or width is
                no multiple of 8 tokens (128 pixels).
        """
        positions = self.positions(x, rope_scale=rope_scale, sparse=sparse)
        branches = self._conditioned([(text_embed, pooled_text_embed, time)])
        (velocity,) = self.evaluate(positions.order.arranged(x), branches, positions)
        return positions.order.restored(velocity)

    def prepare(
        self,
        conditionings: Sequence[Conditioning],
        times: Sequence[float],
        *,
        keep: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ) -> list[list[StepConditioning]]:
        """What a whole schedule takes from its prompts, so that those weights are not needed in the loop.

        Every text block is called for all times and prompts before the next one is, every member of
        :attr:`visual_modulations` once with all of them. Each is computed by itself: the numbers are those
        of :meth:`forward`.

        Args:
            conditionings: the prompts, on the model's device.
            times: in [0, 1].
            keep: applied to each tensor that is kept, e.g. to have it wait in main memory.

        Returns:
            For each time, for each prompt: (9 · visual blocks + 2) · model_dim float32 numbers and the text.
        """
        rows = [(c.text, c.pooled, time) for time in times for c in conditionings]
        prepared = self._conditioned(rows, keep)
        count = len(conditionings)
        return [prepared[i : i + count] for i in range(0, len(rows), count)]

    def positions(
        self,
        latent: torch.Tensor,
        *,
        rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
        sparse: NablaParams | None = None,
    ) -> VisualPositions:
        """What all evaluations of a schedule take from the size of its latent.

        Args:
            latent: [..., T, H, W, C]; only its sides and its device matter.
            rope_scale, sparse: as in :meth:`forward`.

        Raises:
            ValueError: as :meth:`forward`.
        """
        config, device = self.config, latent.device
        order = TokenOrder.of(latent, config.patch_size, sparse)
        return positions_of(order, config.axes_dims, rope_scale, sparse=sparse, device=device)

    def evaluate(
        self,
        x: torch.Tensor,
        branches: Sequence[StepConditioning],
        positions: VisualPositions,
        *,
        residuals: Sequence[Residual | None] | None = None,
    ) -> list[torch.Tensor]:
        """The velocity of x under each of several conditionings, all of them through a block before the next.

        Args:
            x: latent as :meth:`forward` takes it, in the order of ``positions``.
            branches: at least one, on x's device.
            positions: of :meth:`positions`.
            residuals: for each branch what a step cache lends or wants; None lets its blocks run. Of a
                branch with a value only ``out`` is used, and when all have one no block is called.

        Returns:
            For each branch, in the order of x; where its blocks run what :meth:`forward` gives, to the bit.

        Raises:
            ValueError: x is not what ``positions`` are of.
        """
        positions.order.check(x)
        slots = [None] * len(branches) if residuals is None else list(residuals)
        running = [i for i, slot in enumerate(slots) if slot is None or slot.value is None]
        through = self._through_blocks(x, [branches[i] for i in running], positions)
        velocities = []
        for slot, branch in zip(slots, branches, strict=True):
            if slot is None or slot.value is None:
                stream = through.pop(0)
            else:
                stream = self._stream(x).add_(slot.value)
            grid = positions.order.arranged_grid
            velocities.append(self.out_layer(stream, branch.out, grid, self.chunks))
            if slot is not None and slot.value is None:
                # Embedded again: the blocks wrote over their input. In place: the cache takes no more.
                slot.value = stream.sub_(self._stream(x))
            del stream
        return velocities

    def _stream(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens of a latent before the first block, [..., S, D]."""
        tokens: torch.Tensor = self.visual_embeddings(x)
        return tokens.flatten(-4, -2)

    def _through_blocks(
        self, x: torch.Tensor, branches: Sequence[StepConditioning], positions: VisualPositions
    ) -> list[torch.Tensor]:
        """What each branch's stream is behind the last block, [..., S, D]."""
        if not branches:
            return []
        first = self._stream(x)
        streams = [first, *(first.clone() for _ in branches[1:])]
        del first
        for index, block in enumerate(self.visual_transformer_blocks):
            for i, branch in enumerate(branches):
                streams[i] = block(
                    streams[i],
                    branch.text,
                    branch.visual[index],
                    positions.rope,
                    self.chunks,
                    positions.engine,
                )
        return streams

    def _conditioned(
        self,
        rows: Sequence[tuple[torch.Tensor, torch.Tensor, float | torch.Tensor]],
        keep: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ) -> list[StepConditioning]:
        """For each (text, pooled text, time); block by block, row by row."""
        vectors = [self._time_vector(time, pooled) for _, pooled, time in rows]
        texts = [self.text_embeddings(text) for text, _, _ in rows]
        ropes = {
            length: rope_of(rope_angles_1d(length, self.config.head_dim, texts[0].device))
            for length in {text.shape[-2] for text in texts}
        }
        for block in self.text_transformer_blocks:
            for i, text in enumerate(texts):
                texts[i] = block(text, vectors[i], ropes[text.shape[-2]])
        texts = [keep(text) for text in texts]
        visual = [[keep(made) for made in layer(*vectors)] for layer in self.visual_modulations]
        out = [keep(made) for made in self.out_layer.modulation(*vectors)]
        return [
            StepConditioning(text, tuple(block[i] for block in visual), out[i])
            for i, text in enumerate(texts)
        ]

    def _time_vector(self, time: float | torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """float32 [..., 1, time_dim]: embedded time plus embedded pooled text."""
        moment = torch.as_tensor(time, dtype=torch.float32, device=pooled.device)
        embedded = self.pooled_text_embeddings(pooled).float().unsqueeze(-2)
        return self.time_embeddings(moment) + embedded

"""Where the visual tokens are: their order, their rotary angles, who attends to whom.

All of it follows from the size of the latent, so it is made once and holds for every step of a schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kandinsky5.model.attention import AttentionEngine, NablaParams
from kandinsky5.model.nabla import TILE, NablaAttention, check_grid, stacked, unstacked
from kandinsky5.model.rope import MAX_ROPE_POSITIONS, Rope, rope_angles_3d, rope_of

Sides = tuple[int, int, int]
"""Along time, height and width."""


@dataclass(frozen=True)
class TokenOrder:
    """The order in which the tokens of a latent go through the visual blocks.

    Full attention takes them in raster order, NABLA tile after tile. No token has to be moved for that: a
    latent whose frames are cut into squares as large as a tile, and these stacked, has the tiles' order as
    its own raster order. It is stacked before a schedule begins, and unstacked for whoever looks at it.

    Attributes:
        latent: sides of the latent in raster order.
        patch: of a token, in positions of the latent.
        by_tiles: tile after tile.

    Raises:
        ValueError: ``by_tiles``, and tiles do not cover the grid of tokens.
    """

    latent: Sides
    patch: Sides
    by_tiles: bool = False

    def __post_init__(self) -> None:
        if self.by_tiles:
            check_grid(self.grid)

    @classmethod
    def of(cls, latent: torch.Tensor, patch: Sides, sparse: NablaParams | None) -> TokenOrder:
        """That in which a latent [..., T, H, W, C] is attended to: by tiles with NABLA."""
        frames, height, width = latent.shape[-4:-1]
        return cls((frames, height, width), patch, by_tiles=sparse is not None)

    @property
    def grid(self) -> Sides:
        """Tokens along each axis, in raster order."""
        return _grid(self.latent, self.patch)

    @property
    def arranged_grid(self) -> Sides:
        """Tokens along each axis of an arranged latent."""
        frames, height, width = self.grid
        return (frames, height * width // TILE, TILE) if self.by_tiles else self.grid

    def arranged(self, latent: torch.Tensor) -> torch.Tensor:
        """[..., T, H, W, C] of any T and C, in raster order → the same in this order.

        That is [..., T, H·W/w, w, C], w the width of a tile; without tiles the latent itself.
        """
        return stacked(latent, self._tile) if self.by_tiles else latent

    def restored(self, latent: torch.Tensor) -> torch.Tensor:
        """Undoes :meth:`arranged`."""
        return unstacked(latent, self.latent[1:], self._tile) if self.by_tiles else latent

    def arranged_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """[S, channels] in raster order → the same in this order."""
        if not self.by_tiles:
            return tokens
        return stacked(tokens.unflatten(0, self.grid)).flatten(0, 2)

    def restored_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Undoes :meth:`arranged_tokens`."""
        if not self.by_tiles:
            return tokens
        return unstacked(tokens.unflatten(0, self.arranged_grid), self.grid[1:]).flatten(0, 2)

    def check(self, latent: torch.Tensor) -> None:
        """Refuse a latent that is not arranged so.

        Raises:
            ValueError: its sides are others.
        """
        sides = tuple(latent.shape[-4:-1])
        if _grid(sides, self.patch) != self.arranged_grid:
            raise ValueError(
                f"a latent of {sides} positions where one of {self.latent} is computed"
                f" in {self.arranged_grid} tokens"
            )

    @property
    def _tile(self) -> tuple[int, int]:
        """Height and width of a tile in positions of the latent."""
        return TILE * self.patch[1], TILE * self.patch[2]


@dataclass(frozen=True)
class VisualPositions:
    """What an evaluation takes from the size of its latent; nothing in it changes from step to step.

    Attributes:
        order: of the tokens.
        rope: of the tokens in that order.
        engine: of self-attention among them; None is that of the layers.
    """

    order: TokenOrder
    rope: Rope
    engine: AttentionEngine | None = None


def positions_of(
    order: TokenOrder,
    axes_dims: Sequence[int],
    rope_scale: Sequence[float],
    *,
    sparse: NablaParams | None,
    device: torch.device,
) -> VisualPositions:
    """Positions of tokens on a device.

    Args:
        axes_dims, rope_scale: as :func:`~kandinsky5.model.rope.rope_angles_3d` takes them.
        sparse: NABLA settings, for an order by tiles; None for full attention.

    Raises:
        ValueError: the grid is longer than 128 tokens on an axis; NABLA's share is not in (0, 1].
    """
    grid = order.grid
    if max(grid) > MAX_ROPE_POSITIONS:
        raise ValueError(f"token grid {grid} is longer than {MAX_ROPE_POSITIONS} on an axis")
    angles = rope_angles_3d(grid, axes_dims, rope_scale, device).flatten(0, 2)
    engine = None if sparse is None else NablaAttention(sparse, grid, device)
    return VisualPositions(order, rope_of(order.arranged_tokens(angles)), engine)


def _grid(sides: Sequence[int], patch: Sides) -> Sides:
    frames, height, width = (side // part for side, part in zip(sides, patch, strict=True))
    return frames, height, width

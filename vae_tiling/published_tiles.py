"""Sizes of the published tiling: arithmetic only. See ``vae_tiling.published``."""

from __future__ import annotations

from dataclasses import dataclass

from vae_tiling.compression import VIDEO, Compression


@dataclass(frozen=True)
class PublishedTiles:
    """Tile sizes and strides in pixels.

    Attributes:
        frames, stride_frames: of a tile in time, and from one to the next. A tile of 17 frames is five
            latent frames; strides are multiples of four frames.
        height_px, width_px, stride_height_px, stride_width_px: the same in space; multiples of 8.
        compression: pixels per latent cell.

    Raises:
        ValueError: a size that is no multiple of a cell, or a stride longer than its tile.
    """

    frames: int = 17
    stride_frames: int = 8
    height_px: int = 256
    width_px: int = 256
    stride_height_px: int = 192
    stride_width_px: int = 192
    compression: Compression = VIDEO

    def __post_init__(self) -> None:
        time, space = self.compression.time, self.compression.space
        checks = (
            ("frames", self.frames - 1, self.stride_frames, time),
            ("height_px", self.height_px, self.stride_height_px, space),
            ("width_px", self.width_px, self.stride_width_px, space),
        )
        for name, size, stride, cell in checks:
            if size < cell or size % cell or stride < cell or stride % cell or stride > size:
                raise ValueError(
                    f"{name}: sizes and strides must be multiples of {cell} (frames: plus 1 for the "
                    f"size), the stride no longer than the size; not {size} and {stride}"
                )

    @property
    def in_pixels(self) -> Sizes:
        return Sizes(
            (self.frames - 1, self.height_px, self.width_px),
            (self.stride_frames, self.stride_height_px, self.stride_width_px),
        )

    @property
    def in_cells(self) -> Sizes:
        time, space = self.compression.time, self.compression.space
        return self.in_pixels.divided_by((time, space, space))


def published_tiles(side_px: int) -> PublishedTiles:
    """The published tiling with square tiles of a side, neighbours sharing a quarter as in 256 px.

    Raises:
        ValueError: a side that is no multiple of 8 px.
    """
    stride = max(8, side_px * 3 // 32 * 8)
    return PublishedTiles(
        height_px=side_px,
        width_px=side_px,
        stride_height_px=stride,
        stride_width_px=stride,
    )


@dataclass(frozen=True)
class Sizes:
    """(time, height, width) of a tile and of the step to the next; time without a tile's first frame."""

    tile: tuple[int, int, int]
    stride: tuple[int, int, int]

    def divided_by(self, cell: tuple[int, int, int]) -> Sizes:
        return Sizes(_divided(self.tile, cell), _divided(self.stride, cell))

    def overlap(self, axis: int) -> int:
        return self.tile[axis] - self.stride[axis]


def _divided(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[int, int, int]:
    return a[0] // b[0], a[1] // b[1], a[2] // b[2]

"""Latents to frames, tile by tile, piece by piece, so that frames leave as soon as they are done.

A tile is decoded over the whole duration before the next one begins: what it carries from frame to frame
(gigabytes) then never has to be moved, only its finished frames (megabytes, 8-bit) wait for its neighbours.
With one tile nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from vae_tiling.published import published_decode
from vae_tiling.published_tiles import PublishedTiles
from vae_tiling.statistics import STAY, Places, Samples, taken
from vae_tiling.tiles import Span, TilePlan, blend_ramp, published_plan

TileFunction = Callable[[torch.Tensor], torch.Tensor]
"""A latent tile [1, C, t, h, w] → its pixels [1, 3, 4t−3, 8h, 8w] in [−1, 1]."""


class TileDecoder(Protocol):
    """One tile on its way through time."""

    def push(self, features: torch.Tensor) -> torch.Tensor:
        """The next latent frame [1, D, 1, h, w] → its pixel frames [1, 3, n, 8h, 8w] in [−1, 1]."""


@runtime_checkable
class RollingDecoder(Protocol):
    """A decoder that takes a video frame by frame and remembers what it needs. Made for one video."""

    def narrow(self, latents: torch.Tensor) -> torch.Tensor:
        """What needs all frames at once: [1, C, t, h, w] → features [1, D, t, h, w]."""

    def calibrate(self, samples: Samples, places: Places) -> None:
        """Fix what depends on the whole video, from samples of its features.

        ``places`` says where they may wait, if they have a window.
        """

    def start(self) -> TileDecoder:
        """A tile, before its first frame."""


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [1, 3, n, H, W] in [−1, 1] → uint8 [n, H, W, 3]; what lies outside is clamped."""
    levels = ((pixels[0].float().clamp(-1.0, 1.0) + 1.0) * 127.5).round()
    return levels.to(torch.uint8).permute(1, 2, 3, 0)


def as_floats(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [1, 3, n, H, W] → float32 [n, H, W, 3], unclamped: for comparisons."""
    return pixels[0].float().permute(1, 2, 3, 0)


def tiled_decode(
    decode_tile: TileFunction | RollingDecoder,
    latents: torch.Tensor,
    plan: TilePlan | PublishedTiles,
    *,
    convert: Callable[[torch.Tensor], torch.Tensor] = to_uint8,
    places: Places = STAY,
    before_piece: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[torch.Tensor]:
    """Decode a video in tiles and yield its frames in order.

    Args:
        decode_tile: a :class:`RollingDecoder`, fed one latent frame at a time; or a function, given a tile
            with all of its frames (an image VAE; the published tiling).
        latents: [1, C, t, h, w], unscaled, on the decoder's device.
        plan: where the tiles lie.
        convert: pixels of a piece [1, 3, n, H, W] → [n, H, W, 3].
        places: moves features and finished frames off the device, if it should be kept free of them.
        before_piece: called with (pieces done, pieces in all) before each piece; what it raises stops the
            decode. A piece is one latent frame of one tile, or all that is decoded together of it.

    Yields:
        uint8 [n, H, W, 3] (what ``convert`` gives), parked. All of them together have exactly the plan's
        frames, height and width.

    Raises:
        ValueError: the latents are not those of the plan; or it wants a function and a rolling decoder is
            given.
    """
    if isinstance(plan, PublishedTiles):
        frames, height, width = latents.shape[2:]
        time, space = plan.compression.time, plan.compression.space
        plan = published_plan(time * (frames - 1) + 1, space * height, space * width, plan)
    expected = (1, latents.shape[1], *plan.latent_shape)
    if tuple(latents.shape) != expected:
        raise ValueError(
            f"latents must be {list(expected)} for this plan, not {list(latents.shape)}"
        )
    rolls = isinstance(decode_tile, RollingDecoder)
    if rolls and (plan.at_once or plan.published is not None):
        raise ValueError("this plan decodes the frames of a tile together: pass a function")

    def finish(pixels: torch.Tensor) -> torch.Tensor:
        return places.park(convert(pixels))

    if plan.published is not None:
        assert not isinstance(decode_tile, RollingDecoder)
        tiles = _Told(decode_tile, before_piece, plan.time_steps * plan.tiles)
        yield from map(finish, published_decode(tiles, latents, plan.published))
        return
    if isinstance(decode_tile, RollingDecoder):
        features = decode_tile.narrow(latents)
        del latents
        samples = taken(features, plan)
        parked = places.park(features)
        del features
        decode_tile.calibrate(samples, places)
        del samples
        pieces = _Pieces(plan, _rolling(decode_tile, parked, plan, places), plan.latent_shape[0])
    else:
        pieces = _Pieces(plan, _at_once(decode_tile, latents), 1)
    yield from _assembled(pieces, finish, before_piece)


class _Told:
    """A function that tells before each of its calls how many there have been."""

    def __init__(
        self, decode_tile: TileFunction, before: Callable[[int, int], None], total: int
    ) -> None:
        self._decode_tile, self._before = decode_tile, before
        self._done, self._total = 0, total

    def __call__(self, tile: torch.Tensor) -> torch.Tensor:
        self._before(self._done, self._total)
        self._done += 1
        return self._decode_tile(tile)


TilePieces = Callable[[Span, Span], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class _Pieces:
    """What tiles are made of: ``of(row, column)`` gives a tile's pixels in ``per_tile`` pieces."""

    plan: TilePlan
    of: TilePieces
    per_tile: int


def _rolling(
    decoder: RollingDecoder, features: torch.Tensor, plan: TilePlan, places: Places
) -> TilePieces:
    def pieces(row: Span, column: Span) -> Iterator[torch.Tensor]:
        tile = decoder.start()
        for frame in range(plan.latent_shape[0]):
            piece = features[
                :, :, frame : frame + 1, row.start : row.stop, column.start : column.stop
            ]
            yield tile.push(places.fetch(piece))

    return pieces


def _at_once(decode_tile: TileFunction, latents: torch.Tensor) -> TilePieces:
    def pieces(row: Span, column: Span) -> Iterator[torch.Tensor]:
        yield decode_tile(latents[..., row.start : row.stop, column.start : column.stop])

    return pieces


def _assembled(
    pieces: _Pieces,
    finish: Callable[[torch.Tensor], torch.Tensor],
    before_piece: Callable[[int, int], None],
) -> Iterator[torch.Tensor]:
    """Blend tiles into strips (one for each row of tiles), strips into frames."""
    plan, done = pieces.plan, 0
    total = plan.tiles * pieces.per_tile
    strips: list[torch.Tensor] = []
    for row in plan.rows:
        strip = None
        for column in plan.columns:
            tile, first = pieces.of(row, column), 0
            for _ in range(pieces.per_tile):
                before_piece(done, total)
                piece = finish(next(tile))
                done += 1
                if plan.tiles == 1:
                    yield piece
                    continue
                if strip is None:
                    strip = _empty_strip(piece, plan)
                last = first + len(piece)
                _lay(strip[first:last], piece, column, plan, dim=2)
                if row is plan.rows[-1] and column is plan.columns[-1]:
                    yield _stacked([*(s[first:last] for s in strips), strip[first:last]], plan)
                first = last
        if strip is not None:
            strips.append(strip)


def _empty_strip(piece: torch.Tensor, plan: TilePlan) -> torch.Tensor:
    return piece.new_empty(plan.frames, piece.shape[1], plan.width_px, piece.shape[3])


def _stacked(strips: list[torch.Tensor], plan: TilePlan) -> torch.Tensor:
    """Frames [n, H, W, 3] from the same frames of every strip."""
    if len(strips) == 1:
        return strips[0].clone()
    frames = strips[0].new_empty(len(strips[0]), plan.height_px, *strips[0].shape[2:])
    for strip, row in zip(strips, plan.rows, strict=True):
        _lay(frames, strip, row, plan, dim=1)
    return frames


def _lay(target: torch.Tensor, piece: torch.Tensor, span: Span, plan: TilePlan, dim: int) -> None:
    """Put a piece in its place along ``dim``, faded in over the pixels it shares with the one before."""
    space = plan.compression.space
    start, lead = span.start * space, span.lead * space
    if lead:
        shape = [1] * piece.dim()
        shape[dim] = lead
        ramp = torch.tensor(blend_ramp(lead), device=piece.device).view(shape)
        under = target.narrow(dim, start, lead)
        blended = torch.lerp(under.float(), piece.narrow(dim, 0, lead).float(), ramp)
        under.copy_(blended if piece.is_floating_point() else blended.round())
    length = piece.shape[dim] - lead
    target.narrow(dim, start + lead, length).copy_(piece.narrow(dim, lead, length))

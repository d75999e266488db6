"""Decoding and encoding a video's latent tile by tile: plans and blending. Knows torch, nothing of K1.

The plans need no torch: what does is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vae_tiling.plan import (
    Compression,
    DecoderDims,
    TilePlan,
    at_once_plan,
    decode_peak_bytes,
    encode_peak_bytes,
    plan_for_budget,
    plan_tiles,
    smaller_plan,
)
from vae_tiling.published_tiles import PublishedTiles
from vae_tiling.tiles import published_plan

if TYPE_CHECKING:
    from vae_tiling.decode import Places, RollingDecoder, TileDecoder, tiled_decode, to_uint8
    from vae_tiling.encode import tiled_encode

__all__ = [
    "Compression",
    "DecoderDims",
    "Places",
    "PublishedTiles",
    "RollingDecoder",
    "TileDecoder",
    "TilePlan",
    "at_once_plan",
    "decode_peak_bytes",
    "encode_peak_bytes",
    "plan_for_budget",
    "plan_tiles",
    "published_plan",
    "smaller_plan",
    "tiled_decode",
    "tiled_encode",
    "to_uint8",
]

_MODULES = {
    "Places": "decode",
    "RollingDecoder": "decode",
    "TileDecoder": "decode",
    "tiled_decode": "decode",
    "tiled_encode": "encode",
    "to_uint8": "decode",
}
"""Name → module that has it, for what needs torch."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

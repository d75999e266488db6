"""What decoding costs, counted on the meta device with the published VAE's shapes: A8 of the targets.

Nothing is computed: tensors there have shapes and lifetimes only. Attention counts by its output and its
products, as the fused kernels of a GPU have it; norms and padding by their outputs. All latent frames behind
the second cost the same, so three are run and the rest is multiplied out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from kandinsky5.circumstances import circumstances
from kandinsky5.model.bench import LiveBytes
from kandinsky5.model.vae import VideoVAE, VideoVAEConfig
from kandinsky5.model.vae_rolling import RollingVAEDecoder
from vae_tiling import (
    DecoderDims,
    Places,
    TilePlan,
    decode_peak_bytes,
    plan_for_budget,
    plan_tiles,
    tiled_decode,
)

WORK_TARGET = 1.10
FRAMES = 121
"""Of the video whose work is counted."""
FRAMES_RUN = 3
CASES = (  # frames, height, width in pixels; most bytes, weights included
    (121, 512, 768, 4_000_000_000),
    (241, 512, 768, 4_000_000_000),
    (121, 1024, 1024, 6_000_000_000),
    (241, 1024, 1024, 6_000_000_000),
)


@dataclass(frozen=True)
class Cost:
    """Of decoding one video.

    Attributes:
        multiply_adds: of convolutions, matrix products and attention.
        peak_bytes: most bytes alive on the device, without the weights.
        stage_peaks: the same for each stage.
        frame_multiply_adds: behind the narrow stage, of one latent frame in every tile.
    """

    multiply_adds: int
    peak_bytes: int
    stage_peaks: dict[str, int]
    frame_multiply_adds: int


def decode_work(*, height: int = 512, width: int = 768) -> dict[str, Any]:
    """Work against the untiled decode, and peaks of the target's cases, in bfloat16.

    Args:
        height, width: of the video of 121 frames whose work is counted.

    Raises:
        ValueError: a size that no video has.
    """
    plan = plan_tiles(FRAMES, height, width)
    rolling, untiled = rolling_cost(plan), untiled_multiply_adds(plan)
    cases = [peak_case(*case) for case in CASES]
    return {
        "benchmark": "decode-work",
        "video": f"{width}x{height}, {FRAMES} frames",
        "multiply_adds": rolling.multiply_adds,
        "untiled_multiply_adds": untiled,
        "work_ratio": round(rolling.multiply_adds / untiled, 4),
        "target_work_ratio": WORK_TARGET,
        "peaks": cases,
        "reached": rolling.multiply_adds <= WORK_TARGET * untiled
        and all(case["reached"] for case in cases),
        **circumstances(),
    }


def peak_case(frames: int, height: int, width: int, limit_bytes: int) -> dict[str, Any]:
    """One video in the fewest tiles that its limit allows: bytes counted and predicted, with the weights."""
    config = VideoVAEConfig()
    weights_bytes = 2 * sum(weight.numel() for weight in _vae(config).parameters())
    budget_bytes = limit_bytes - weights_bytes
    plan = plan_for_budget(frames, height, width, dims_of(config), budget_bytes)
    cost = rolling_cost(plan)
    peak_bytes = cost.peak_bytes + weights_bytes
    return {
        "video": f"{width}x{height}, {frames} frames",
        "tiles": plan.tiles,
        "weights_bytes": weights_bytes,
        **asdict(cost),
        "peak_bytes": peak_bytes,
        "predicted_bytes": decode_peak_bytes(plan, dims_of(config)) + weights_bytes,
        "limit_bytes": limit_bytes,
        "reached": peak_bytes <= limit_bytes,
    }


def dims_of(config: VideoVAEConfig) -> DecoderDims:
    return DecoderDims(config.block_out_channels, config.layers_per_block, config.latent_channels)


def rolling_cost(plan: TilePlan, config: VideoVAEConfig | None = None) -> Cost:
    """Count one decode by :func:`vae_tiling.tiled_decode`."""
    vae = _vae(config or VideoVAEConfig())
    work_before: list[int] = []
    stage_peaks: dict[str, int] = {}
    frames = plan.latent_shape[0]
    with torch.inference_mode(), _Counters(vae) as counters:

        def before_piece(done: int, total: int) -> None:
            work_before.append(counters.multiply_adds)
            if done == min(FRAMES_RUN, frames):
                raise _Enough

        decoder = _Staged(vae, lambda stage: stage_peaks.update({stage: counters.take_peak()}))
        latents = torch.empty(
            1, vae.config.latent_channels, *plan.latent_shape, dtype=torch.bfloat16, device="meta"
        )
        try:
            for _ in tiled_decode(decoder, latents, plan, places=_HOST, before_piece=before_piece):
                pass
        except _Enough:
            pass
        work_before.append(counters.multiply_adds)
        stage_peaks["frames"] = counters.take_peak()
    each = [after - before for before, after in pairwise(work_before)]
    of_tile = sum(each[: min(FRAMES_RUN, frames)])
    if frames > FRAMES_RUN:
        of_tile += (frames - FRAMES_RUN) * each[FRAMES_RUN - 1]
    multiply_adds = work_before[0] + plan.tiles * of_tile
    peak_bytes = max(stage_peaks.values())
    return Cost(
        multiply_adds, peak_bytes, stage_peaks, plan.tiles * each[min(FRAMES_RUN, frames) - 1]
    )


def untiled_multiply_adds(plan: TilePlan, config: VideoVAEConfig | None = None) -> int:
    """Of ``VideoVAE.decode`` on the whole video."""
    vae = _vae(config or VideoVAEConfig())
    shape = (1, vae.config.latent_channels, *plan.latent_shape)
    with torch.inference_mode(), _Counters(vae) as counters:
        vae.decode(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        return counters.multiply_adds


def at_once_peak_counted(plan: TilePlan, config: VideoVAEConfig | None = None) -> int:
    """Most bytes alive while a video is decoded with all frames together, without the weights."""
    vae = _vae(config or VideoVAEConfig())
    shape = (1, vae.config.latent_channels, *plan.latent_shape)
    with torch.inference_mode(), _Counters(vae) as counters:
        vae.decode(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        return counters.take_peak()


def encode_peak_counted(plan: TilePlan, config: VideoVAEConfig | None = None) -> int:
    """Most bytes alive while one tile of a plan is encoded, without the weights."""
    vae = _vae(config or VideoVAEConfig())
    height, width = (cells * plan.compression.space for cells in plan.largest_tile)
    with torch.inference_mode(), _Counters(vae) as counters:
        vae.encode(
            torch.empty(1, 3, plan.frames, height, width, dtype=torch.bfloat16, device="meta")
        )
        return counters.take_peak()


class _Enough(Exception):
    """The rest is known."""


class _Staged(RollingVAEDecoder):
    """Says when a stage is over."""

    def __init__(self, vae: VideoVAE, over: Callable[[str], None]) -> None:
        super().__init__(vae)
        self._over = over

    def narrow(self, z: torch.Tensor) -> torch.Tensor:
        features = super().narrow(z)
        self._over("narrow")
        return features

    def calibrate(self, samples: Any, places: Any) -> None:
        super().calibrate(samples, places)
        self._over("statistics")


class _Counters(TorchFunctionMode):
    """Bytes alive and multiply-adds, with attention as one operation that allocates its output."""

    def __init__(self, vae: VideoVAE) -> None:
        super().__init__()
        self.multiply_adds = 0
        self._live = _DeviceBytes(apart_from=vae)

    def __enter__(self) -> _Counters:
        self._live.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._live.__exit__(*exception)

    def take_peak(self) -> int:
        """Most bytes since the last time this was asked."""
        peak, self._live.peak_bytes = self._live.peak_bytes, self._live.now_bytes
        return peak

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, _ = args
            self.multiply_adds += 2 * query.numel() * key.shape[-2]
            return torch.empty_like(query)
        if (
            func is F.batch_norm
        ):  # given its statistics; the stand-in would go through a dozen steps
            return torch.empty_like(args[0])
        if func is F.pad:
            sides = zip(args[0].shape[::-1], args[1][::2], args[1][1::2], strict=False)
            grown = [length + before + after for length, before, after in sides][::-1]
            return args[0].new_empty(*args[0].shape[: args[0].dim() - len(grown)], *grown)
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            self.multiply_adds += result.numel() * args[1][0].numel()
        return result


_PRODUCTS = {F.conv2d, F.conv3d, F.linear}
"""Functions of (input, weight [out, …], …): each number of the result takes one row of the weight."""


class _DeviceBytes(LiveBytes):
    """The meta device stands for the GPU; what lies elsewhere is in main memory."""

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type == "meta":
            super()._add(storage)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(
        tensor.shape, dtype=tensor.dtype, device="cpu"
    )  # never touched, so never there


def _to_device(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


_HOST = Places(park=_to_host, fetch=_to_device)


def _vae(config: VideoVAEConfig) -> VideoVAE:
    with torch.device("meta"):
        return VideoVAE(config).to(torch.bfloat16)

"""Between the pipeline's latents [T, H, W, C] and the video VAE's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from kandinsky5.memory.whole import to_device, to_host
from kandinsky5.model.vae import VideoVAE
from kandinsky5.model.vae_rolling import RollingVAEDecoder
from kandinsky5.pipeline.denoise import draw_noise
from vae_tiling import Places, TilePlan, tiled_decode, tiled_encode


@torch.inference_mode()
def decoded(
    vae: VideoVAE,
    latents: torch.Tensor,
    plan: TilePlan,
    *,
    device: torch.device,
    before_piece: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[np.ndarray]:
    """Scaled latents [t, h, w, C] → uint8 frames [n, 8h, 8w, 3] as they are done, 4t−3 in all.

    Args:
        plan: how the picture is cut.
        device: the VAE's.
        before_piece: called with (pieces done, pieces in all); what it raises ends the decoding.
    """
    dtype = next(vae.parameters()).dtype
    scaled = to_device(latents, device) / vae.config.scaling_factor
    z = scaled.permute(3, 0, 1, 2)[None].to(dtype)
    places = Places(park=to_host, fetch=lambda tensor: to_device(tensor, device))
    frames = tiled_decode(RollingVAEDecoder(vae), z, plan, places=places, before_piece=before_piece)
    for batch in frames:
        yield batch.numpy()


@torch.inference_mode()
def encode_image(
    vae: VideoVAE,
    pixels: torch.Tensor,
    generator: torch.Generator,
    device: torch.device,
    plan: TilePlan,
) -> torch.Tensor:
    """A draw from the posterior of one picture, scaled: float32 [1, h, w, C]."""
    dtype = next(vae.parameters()).dtype

    def moments(tile: torch.Tensor) -> torch.Tensor:
        return torch.cat(vae.encode(tile), dim=1)

    encoded = tiled_encode(moments, to_device(pixels, device).to(dtype), plan)
    mean, logvar = encoded.float().chunk(2, dim=1)
    drawn = to_device(draw_noise(tuple(mean.shape), generator), device)
    latent = (mean + torch.exp(0.5 * logvar) * drawn) * vae.config.scaling_factor
    return latent[0].permute(1, 2, 3, 0)

"""Between the pipeline's latents [T, H, W, C] and the VAEs' tensors; a picture is a video of one frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from kandinsky5.memory.whole import to_device, to_host
from kandinsky5.model.vae import VideoVAE
from kandinsky5.model.vae_loading import VAE
from kandinsky5.model.vae_rolling import RollingVAEDecoder
from kandinsky5.pipeline.denoise import draw_noise
from vae_tiling import Places, TilePlan, tiled_decode, tiled_encode


@torch.inference_mode()
def decoded(
    vae: VAE,
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
    frames = tiled_decode(_decoder_of(vae, plan), z, plan, places=places, before_piece=before_piece)
    for batch in frames:
        yield batch.numpy()


@torch.inference_mode()
def encode_image(
    vae: VAE,
    pixels: torch.Tensor,
    generator: torch.Generator,
    device: torch.device,
    plan: TilePlan,
) -> torch.Tensor:
    """A draw from the posterior of one picture, scaled: float32 [1, h, w, C]."""
    dtype = next(vae.parameters()).dtype
    encoded = tiled_encode(_encoder_of(vae), to_device(pixels, device).to(dtype), plan)
    mean, logvar = encoded.float().chunk(2, dim=1)
    drawn = to_device(draw_noise(tuple(mean.shape), generator), device)
    latent = (mean + torch.exp(0.5 * logvar) * drawn) * vae.config.scaling_factor
    return latent[0].permute(1, 2, 3, 0)


def _decoder_of(
    vae: VAE, plan: TilePlan
) -> RollingVAEDecoder | Callable[[torch.Tensor], torch.Tensor]:
    """What decodes a tile, as :func:`vae_tiling.tiled_decode` takes it."""
    if not isinstance(vae, VideoVAE):
        return lambda tile: vae.decode(tile[:, :, 0])[:, :, None]
    if plan.at_once or plan.published is not None:
        return vae.decode
    return RollingVAEDecoder(vae)


def _encoder_of(vae: VAE) -> Callable[[torch.Tensor], torch.Tensor]:
    """Pixels of a tile [1, 3, T, h, w] → its moments."""
    if isinstance(vae, VideoVAE):
        return lambda tile: torch.cat(vae.encode(tile), dim=1)
    return lambda tile: torch.cat(vae.encode(tile[:, :, 0]), dim=1)[:, :, None]

"""Between the pipeline's latents [T, H, W, C] and the video VAE's tensors."""

from __future__ import annotations

import numpy as np
import torch

from kandinsky5.model.vae import VideoVAE
from kandinsky5.pipeline.denoise import draw_noise


@torch.inference_mode()
def decode_frames(vae: VideoVAE, latents: torch.Tensor) -> np.ndarray:
    """Scaled latents [t, h, w, C] → uint8 frames [4t−3, 8h, 8w, 3]."""
    dtype = next(vae.parameters()).dtype
    z = (latents / vae.config.scaling_factor).permute(3, 0, 1, 2)[None].to(dtype)
    video = vae.decode(z)[0].float().clamp(-1.0, 1.0)
    return ((video + 1.0) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


@torch.inference_mode()
def encode_image(
    vae: VideoVAE, pixels: torch.Tensor, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """A draw from the posterior of one picture, scaled: float32 [1, h, w, C]."""
    dtype = next(vae.parameters()).dtype
    mean, logvar = (part.float() for part in vae.encode(pixels.to(device, dtype)))
    drawn = draw_noise(tuple(mean.shape), generator).to(device)
    latent = (mean + torch.exp(0.5 * logvar) * drawn) * vae.config.scaling_factor
    return latent[0].permute(1, 2, 3, 0)

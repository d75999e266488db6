"""Previews by a small decoder, where there is one for the VAE and the machine can afford it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from kandinsky5.errors import CheckpointError
from kandinsky5.model.tiny_decoder import LEVELS, TinyDecoder, load_tiny_decoder, work_macs
from kandinsky5.model.vae_loading import VAEConfig
from kandinsky5.pipeline.preview import (
    HUNYUAN_VIDEO_COLOURS,
    MAX_PIXELS,
    LinearPreviewer,
    Previewer,
    colours_of,
    encode_webp,
    is_hunyuan_video,
    preview_size,
)

log = logging.getLogger(__name__)

DECODER_FILE = Path("preview") / "tiny_decoder.safetensors"
"""In a VAE's folder; ``tools/fit_tiny_preview.py`` writes it."""
PUBLISHED_FILES = (Path("vae_approx") / "taehv.safetensors", Path("taehv.safetensors"))
"""In the folders of models; for HunyuanVideo's latents."""
MAX_MACS = {"cpu": 3 * 10**9, "cuda": 5 * 10**12}
"""Of one preview: some tenths of a second."""
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


class TinyPreviewer:
    """Decodes with a small decoder, with fewer enlargements or linearly where that would take too long.

    Args:
        decoder: for the latents that will come, where they are.
        fallback: asked where the decoder would be too slow, and from then on when memory runs out.
        max_pixels: of all frames of a picture together.
    """

    def __init__(
        self, decoder: TinyDecoder, fallback: Previewer | None, *, max_pixels: int = MAX_PIXELS
    ) -> None:
        self._decoder: TinyDecoder | None = decoder
        self._fallback, self._max_pixels = fallback, max_pixels

    @torch.inference_mode()
    def picture(self, clean: torch.Tensor) -> bytes:
        """Animated WebP of all frames; empty when neither way is open."""
        frames, height, width, _ = clean.shape
        decoder = self._decoder
        levels = (
            None
            if decoder is None
            else affordable_levels(
                decoder.widths, (frames, height, width), MAX_MACS.get(clean.device.type, 0)
            )
        )
        if decoder is not None and levels is not None:
            try:
                rgb = decoder(clean, levels).permute(0, 3, 1, 2)
                size = preview_size(frames, height, width, self._max_pixels)
                size = (min(size[0], rgb.shape[-2]), min(size[1], rgb.shape[-1]))
                rgb = F.interpolate(rgb, size, mode="bilinear", antialias=True)
                pixels = (rgb.nan_to_num(0.5) * 255).round().clamp(0, 255).to(torch.uint8)
                return encode_webp(pixels.permute(0, 2, 3, 1).contiguous().cpu())
            except OUT_OF_MEMORY as error:  # a preview must not take the run with it
                log.warning("no memory for the preview's decoder: %s", error)
                self._decoder = None
        return b"" if self._fallback is None else self._fallback.picture(clean)


def affordable_levels(
    widths: tuple[int, int, int, int], latent: tuple[int, int, int], max_macs: int
) -> int | None:
    """How many enlargements to make of a latent (frames, height, width); None if even none is too much."""
    for levels in range(LEVELS, -1, -1):
        if work_macs(widths, *latent, levels) <= max_macs:
            return levels
    return None


def choose_previewer(
    folder: Path,
    config: VAEConfig,
    *,
    device: torch.device,
    models_dirs: Sequence[Path] = (),
) -> tuple[Previewer | None, str | None]:
    """The best previewer for a VAE's latents.

    Args:
        folder: the VAE's; what was fitted to it lies there.
        config: its dimensions.
        device: where the latents are.
        models_dirs: folders that may hold a published tiny decoder.

    Returns:
        The previewer, or None when nothing is known of the VAE's latents; and a notice when a file that is
        there could not be used.
    """
    notice = None
    linear: LinearPreviewer | None = None
    try:
        colours = colours_of(folder, config)
        linear = None if colours is None else LinearPreviewer(colours)
    except ValueError as error:
        notice = str(error)
        if is_hunyuan_video(config):
            linear = LinearPreviewer(HUNYUAN_VIDEO_COLOURS)
    candidates = [folder / DECODER_FILE]
    # On a CPU the published one takes half a minute for five seconds of video.
    if is_hunyuan_video(config) and device.type != "cpu":
        candidates += [parent / name for parent in models_dirs for name in PUBLISHED_FILES]
    for path in filter(Path.is_file, candidates):
        try:
            decoder = load_tiny_decoder(path, channels=config.latent_channels, device=device)
        except CheckpointError as error:
            notice = f"the preview's decoder is not used: {error}"
        else:
            return TinyPreviewer(decoder, linear), notice
    return linear, notice

"""Pictures of a video while it is being painted: the clean estimate of a step as an animated WebP.

The estimate is free: a flow x_t = (1−t)·x₀ + t·z with velocity v = z − x₀ gives x₀ = x_t − t·v. A previewer
turns it into a picture. :class:`LinearPreviewer` maps the channels of each latent position to a colour with
fixed factors; nothing is normalised by what a picture happens to hold, so colours stay steady from frame to
frame and from step to step.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image

from kandinsky5.events import EventSink, PreviewReady
from kandinsky5.model.image_vae import ImageVAEConfig
from kandinsky5.model.vae import VideoVAEConfig
from kandinsky5.model.vae_loading import VAEConfig
from kandinsky5.pipeline.preview_pace import PreviewEvery
from kandinsky5.request import LATENT_FRAMES_PER_SECOND

COLOURS_FILE = "preview.json"
"""Factors fitted to a VAE by ``tools/fit_preview.py`` lie in its folder under this name."""
COLOURS_VERSION = 1
MAX_COLOURS_BYTES = 1_000_000

MAX_PIXELS = 400_000
"""Of all frames together: about 30 ms of one core and 150 kB."""
MAX_ENLARGEMENT = 8.0
"""From latent to preview; beyond it there are no pixels in the result either."""
WEBP_QUALITY = 85
"""Below it the blocks of the compression show once the page enlarges the picture."""
LESSER_QUALITIES = (60, 30)
"""For what comes out too large, which is noise: there no blocks are seen."""
MAX_BYTES = 300_000
WEBP_METHOD = 0
"""The fastest; the slower ones make files 8 % smaller in three times the time."""


class Previewer(Protocol):
    """Turns a clean estimate into a picture."""

    def picture(self, clean: torch.Tensor) -> bytes:
        """Animated WebP of all frames, for x₀ [T, H, W, C] float32 on any device; empty for none."""
        ...


@dataclass(frozen=True)
class LatentColours:
    """A linear map from a scaled latent's channels to RGB in [−1, 1].

    Attributes:
        factors: (red, green, blue) for each channel.
        bias: (red, green, blue).
    """

    factors: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float]

    def __post_init__(self) -> None:
        for row in (*self.factors, self.bias):
            if len(row) != 3 or not all(math.isfinite(value) for value in row):
                raise ValueError(f"{row}: three finite numbers are wanted")

    @property
    def channels(self) -> int:
        return len(self.factors)


HUNYUAN_VIDEO_COLOURS = LatentColours(
    factors=(
        (-0.0395, -0.0331, 0.0445),
        (0.0696, 0.0795, 0.0518),
        (0.0135, -0.0945, -0.0282),
        (0.0108, -0.0250, -0.0765),
        (-0.0209, 0.0032, 0.0224),
        (-0.0804, -0.0254, -0.0639),
        (-0.0991, 0.0271, -0.0669),
        (-0.0646, -0.0422, -0.0400),
        (-0.0696, -0.0595, -0.0894),
        (-0.0799, -0.0208, -0.0375),
        (0.1166, 0.1627, 0.0962),
        (0.1165, 0.0432, 0.0407),
        (-0.2315, -0.1920, -0.1355),
        (-0.0270, 0.0401, -0.0821),
        (-0.0616, -0.0997, -0.0727),
        (0.0249, -0.0469, -0.1703),
    ),
    bias=(0.0259, -0.0192, -0.0761),
)
"""For the HunyuanVideo VAE; the figures several public previewers use."""


FLUX_COLOURS = LatentColours(
    factors=(
        (-0.0346, 0.0244, 0.0681),
        (0.0034, 0.0210, 0.0687),
        (0.0275, -0.0668, -0.0433),
        (-0.0174, 0.0160, 0.0617),
        (0.0859, 0.0721, 0.0329),
        (0.0004, 0.0383, 0.0115),
        (0.0405, 0.0861, 0.0915),
        (-0.0236, -0.0185, -0.0259),
        (-0.0245, 0.0250, 0.1180),
        (0.1008, 0.0755, -0.0421),
        (-0.0515, 0.0201, 0.0011),
        (0.0428, -0.0012, -0.0036),
        (0.0817, 0.0765, 0.0749),
        (-0.1264, -0.0522, -0.1103),
        (-0.0280, -0.0881, -0.0499),
        (-0.1262, -0.0982, -0.0778),
    ),
    bias=(-0.0308, -0.0772, -0.0924),
)
"""For FLUX.1's VAE; the figures several public previewers use. Theirs are for latents less the shift factor,
which Kandinsky's are not: the biases here have the shift, 0.1159 · 0.3611 in each channel, taken off."""


def colours_of(folder: Path, config: VAEConfig) -> LatentColours | None:
    """The colours of a VAE: those fitted to it, else those known for its architecture, else None.

    Args:
        folder: the VAE's; a ``preview.json`` in it counts first.
        config: the VAE's dimensions.

    Raises:
        ValueError: ``preview.json`` is there and cannot be used; one line says why.
    """
    path = folder / COLOURS_FILE
    if path.is_file():
        return read_colours(path, channels=config.latent_channels)
    if is_hunyuan_video(config):
        return HUNYUAN_VIDEO_COLOURS
    return FLUX_COLOURS if _is_like(config, ImageVAEConfig()) else None


def is_hunyuan_video(config: VAEConfig) -> bool:
    """Whether a VAE has the published dimensions."""
    return _is_like(config, VideoVAEConfig())


def _is_like(config: VAEConfig, published: VAEConfig) -> bool:
    return type(config) is type(published) and (
        config.latent_channels,
        config.block_out_channels,
    ) == (
        published.latent_channels,
        published.block_out_channels,
    )


def read_colours(path: Path, *, channels: int) -> LatentColours:
    """Read what :func:`write_colours` wrote, for a latent of that many channels.

    Raises:
        ValueError: the file cannot be read, is no such file, newer, or for another number of channels.
    """
    try:
        if path.stat().st_size > MAX_COLOURS_BYTES:
            raise ValueError(f"more than {MAX_COLOURS_BYTES} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] != COLOURS_VERSION:
            raise ValueError(f"version {values['version']!r}, {COLOURS_VERSION} is known")
        rows = [tuple(float(number) for number in row) for row in values["factors"]]
        colours = LatentColours(tuple(rows), tuple(map(float, values["bias"])))  # type: ignore[arg-type]
        if colours.channels != channels:
            raise ValueError(f"factors for {colours.channels} channels, the latent has {channels}")
    except KeyError as error:
        raise ValueError(f"{path}: without {error}") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not usable as preview colours ({error})") from error
    return colours


def write_colours(path: Path, colours: LatentColours, **facts: Any) -> None:
    """Write colours as JSON; ``facts`` say how they were found and are only for people."""
    document = {
        "version": COLOURS_VERSION,
        "factors": [list(row) for row in colours.factors],
        "bias": list(colours.bias),
        **facts,
    }
    text = json.dumps(document, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


class LinearPreviewer:
    """Channels to colours by a fixed linear map.

    Args:
        colours: of the VAE that the latents are for.
        max_pixels: of all frames together; the pictures are made smaller or larger to come near it.
    """

    def __init__(self, colours: LatentColours, *, max_pixels: int = MAX_PIXELS) -> None:
        self._max_pixels = max_pixels
        self._factors = torch.tensor(colours.factors, dtype=torch.float32)
        self._bias = torch.tensor(colours.bias, dtype=torch.float32)

    @torch.inference_mode()
    def picture(self, clean: torch.Tensor) -> bytes:
        """Animated WebP of all frames; raises ValueError for a latent of other channels."""
        return encode_webp(self.pixels(clean))

    @torch.inference_mode()
    def pixels(self, clean: torch.Tensor) -> torch.Tensor:
        """x₀ [T, H, W, C] → uint8 [T, h, w, 3] on the CPU."""
        if clean.ndim != 4 or clean.shape[-1] != self._factors.shape[0]:
            wanted = f"[T, H, W, {self._factors.shape[0]}]"
            raise ValueError(f"a latent {list(clean.shape)} where {wanted} is wanted")
        device = clean.device
        rgb = clean.float() @ self._factors.to(device) + self._bias.to(device)
        height, width = preview_size(
            clean.shape[0], clean.shape[1], clean.shape[2], self._max_pixels
        )
        rgb = rgb.permute(0, 3, 1, 2).contiguous()  # in planes it takes half the time
        rgb = F.interpolate(rgb, (height, width), mode="bilinear", antialias=True)
        # NaN would become any number at all; grey says that there is nothing to see.
        bytes_ = ((rgb.nan_to_num(0.0) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return bytes_.permute(0, 2, 3, 1).contiguous().cpu()


def preview_size(frames: int, height: int, width: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) of a latent's preview: as ``max_pixels`` in all frames allow, at most 8×."""
    scale = min(MAX_ENLARGEMENT, math.sqrt(max_pixels / (frames * height * width)))
    return max(1, int(height * scale)), max(1, int(width * scale))


def encode_webp(frames: torch.Tensor) -> bytes:
    """uint8 [T, H, W, 3] → animated WebP at the latent's own pace, 6 frames a second.

    What is larger than ``MAX_BYTES`` is encoded again more coarsely, twice at most; then even noise is not.
    """
    pictures = [Image.fromarray(frame) for frame in frames.numpy()]
    encoded = b""
    for quality in (WEBP_QUALITY, *LESSER_QUALITIES):
        encoded = _encoded(pictures, quality)
        if len(encoded) <= MAX_BYTES:
            break
    return encoded


def _encoded(pictures: list[Image.Image], quality: int) -> bytes:
    file = io.BytesIO()
    pictures[0].save(
        file,
        "WEBP",
        save_all=len(pictures) > 1,
        append_images=pictures[1:],
        duration=round(1000 / LATENT_FRAMES_PER_SECOND),
        loop=0,
        quality=quality,
        method=WEBP_METHOD,
        kmin=0,
        kmax=0,  # no key frames: nobody seeks in a preview, and they cost twice the time
    )
    return file.getvalue()


def clean_estimate(
    latent: torch.Tensor,
    velocity: torch.Tensor,
    time: float,
    first_frame: torch.Tensor | None = None,
) -> torch.Tensor:
    """x₀ = x_t − t·v [T, H, W, C]; the pairs before and after an Euler step along v give the same.

    Args:
        latent: x_t, [T, H, W, C] float32.
        velocity: v, of the same shape.
        time: t.
        first_frame: [1, H, W, C] of a video that begins with a given picture: that frame is known.
    """
    clean = latent - time * velocity
    if first_frame is not None:
        clean[:1] = first_frame
    return clean


class PreviewFeed:
    """Makes a preview after a step when one is due and tells it as :class:`PreviewReady`.

    A run without previews has no feed, so that none costs nothing.

    Args:
        previewer: makes the pictures.
        emit: gets the events.
        every: how often.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        previewer: Previewer,
        emit: EventSink,
        *,
        every: PreviewEvery,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._previewer, self._emit = previewer, emit
        self._every, self._clock = every, clock
        self._last_step: int | None = None
        self._last_at = -math.inf

    def is_due(self, step: int, total: int) -> bool:
        """Whether a preview is wanted after ``step`` of ``total`` steps."""
        if step == total or self._last_step is None:
            return True
        return (
            step - self._last_step >= self._every.stride(total)
            and self._clock() - self._last_at >= self._every.seconds
        )

    def step_done(self, step: int, total: int, clean: Callable[[], torch.Tensor]) -> None:
        """Call after each step; ``clean`` gives x₀ [T, H, W, C] and is called only when a preview is due."""
        if not self.is_due(step, total):
            return
        picture = self._previewer.picture(clean())
        self._last_step, self._last_at = step, self._clock()
        if picture:
            self._emit(PreviewReady(step, total, picture))

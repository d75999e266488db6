"""From the final latent to the finished file: frames are encoded as they are decoded; a picture is a PNG."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from kandinsky5.errors import Stopped
from kandinsky5.model.vae_loading import VAE
from kandinsky5.output.media import VideoWriter, write_png
from kandinsky5.pipeline.codec import decoded
from kandinsky5.pipeline.job import Job
from kandinsky5.presets import FRAMES_PER_SECOND
from kandinsky5.request import frames_of

Metadata: TypeAlias = Callable[[Job], dict[str, Any]]
"""Tells what goes into the file, as far as it is known by then."""

FLAT_LEVELS = 2.0
"""Frames in which no colour's levels (0 … 255) spread more than this around their mean show nothing."""


@dataclass(frozen=True)
class Painted:
    """What was written: frames, and their size in pixels."""

    frames: int
    width: int
    height: int


def paint(
    job: Job,
    vae: VAE,
    latents: torch.Tensor,
    device: torch.device,
    metadata: Metadata,
) -> Painted:
    """Decode a latent [t, h, w, C] and write it to ``job.out``; the file appears whole or not at all.

    Raises:
        OutOfMemory: while decoding; nothing is left under the final name.
        Stopped: between two pieces.
        RuntimeError: the decoder gave other sizes than the job's.
    """
    with job.stage("decode"), closing(_batches(job, vae, latents, device)) as frames:
        write = _write_video if job.preset.is_video else _write_picture
        painted, spread = write(job, frames, metadata)
    if spread < FLAT_LEVELS:
        job.notice(
            "every frame is of one colour: look at the prompt, the guidance and the checkpoint;"
            " another attention engine or dtype fp32 may help"
        )
    return painted


def _write_video(
    job: Job, batches: Iterable[np.ndarray], metadata: Metadata
) -> tuple[Painted, float]:
    """What was written, and how far levels spread in the frame where they do most."""
    request = job.request
    assert request.width and request.height
    wanted = frames_of(request.seconds or 0.0)
    spread = 0.0
    writer = VideoWriter(
        job.out,
        width=request.width,
        height=request.height,
        fps=FRAMES_PER_SECOND,
        crf=request.crf,
        frames=wanted,
        metadata=metadata(job),
    )
    with writer:
        for batch in batches:
            for frame in batch:
                writer.write(frame)
                spread = max(spread, _spread(frame))
        if writer.frames != wanted:
            raise RuntimeError(f"decoded {writer.frames} frames of {wanted}")
        writer.set_metadata(metadata(job))
    return Painted(wanted, request.width, request.height), spread


def _write_picture(
    job: Job, batches: Iterable[np.ndarray], metadata: Metadata
) -> tuple[Painted, float]:
    frames = [frame for batch in batches for frame in batch]
    if len(frames) != 1:
        raise RuntimeError(f"decoded {len(frames)} frames of 1")
    write_png(job.out, frames[0], metadata(job))
    height, width = frames[0].shape[:2]
    return Painted(1, width, height), _spread(frames[0])


def _spread(frame: np.ndarray) -> float:
    return float(frame[::4, ::4].std(axis=(0, 1)).max())


def _batches(
    job: Job, vae: VAE, latents: torch.Tensor, device: torch.device
) -> Generator[np.ndarray, None, None]:
    def before_piece(done: int, total: int) -> None:
        job.place = f"decode, piece {done + 1} of {total}"
        if job.to.should_stop():
            raise Stopped(f"stopped while decoding, {done} of {total} pieces done")

    size = (job.request.height, job.request.width)
    for batch in decoded(
        vae, latents, job.plan.decode_tiles, device=device, before_piece=before_piece
    ):
        if batch.shape[1:3] != size:
            found = f"{batch.shape[2]}x{batch.shape[1]}"
            raise RuntimeError(f"decoded {found} of {size[1]}x{size[0]} px")
        yield batch

"""From the final latent to the finished file: frames go to the encoder as they are decoded."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kandinsky5.errors import Stopped
from kandinsky5.model.vae import VideoVAE
from kandinsky5.output.media import VideoWriter
from kandinsky5.pipeline.codec import decoded
from kandinsky5.pipeline.job import Job
from kandinsky5.presets import FRAMES_PER_SECOND
from kandinsky5.request import frames_of

FLAT_LEVELS = 2.0
"""Frames whose levels (0 … 255) spread less than this around their mean show nothing."""


@dataclass(frozen=True)
class Painted:
    """What was written: frames, and their size in pixels."""

    frames: int
    width: int
    height: int


def paint(
    job: Job,
    vae: VideoVAE,
    latents: torch.Tensor,
    device: torch.device,
    metadata: Callable[[Job], dict[str, Any]],
) -> Painted:
    """Decode a latent [t, h, w, C] and write it to ``job.out``; the file appears whole or not at all.

    Raises:
        OutOfMemory: while decoding; nothing is left under the final name.
        Stopped: between two pieces.
        RuntimeError: the decoder gave other sizes than the job's.
    """
    request = job.request
    assert request.width and request.height
    wanted = frames_of(request.seconds or 0.0)
    spread = 0.0
    with job.stage("decode"):
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
            with closing(_batches(job, vae, latents, device)) as batches:
                for batch in batches:
                    if batch.shape[1:3] != (request.height, request.width):
                        size = f"{batch.shape[2]}x{batch.shape[1]}"
                        raise RuntimeError(f"decoded {size} of {request.width}x{request.height} px")
                    for frame in batch:
                        writer.write(frame)
                        spread = max(spread, float(frame[::4, ::4].std()))
            if writer.frames != wanted:
                raise RuntimeError(f"decoded {writer.frames} frames of {wanted}")
            writer.set_metadata(metadata(job))
    if spread < FLAT_LEVELS:
        job.notice(
            "every frame is of one colour: look at the prompt, the guidance and the checkpoint;"
            " another attention engine or dtype fp32 may help"
        )
    return Painted(wanted, request.width, request.height)


def _batches(
    job: Job, vae: VideoVAE, latents: torch.Tensor, device: torch.device
) -> Generator[np.ndarray, None, None]:
    def before_piece(done: int, total: int) -> None:
        job.place = f"decode, piece {done + 1} of {total}"
        if job.to.should_stop():
            raise Stopped(f"stopped while decoding, {done} of {total} pieces done")

    yield from decoded(
        vae, latents, job.plan.decode_tiles, device=device, before_piece=before_piece
    )

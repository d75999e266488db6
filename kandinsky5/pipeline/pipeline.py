"""One job from request to file: encode text, encode image, denoise, decode, save.

The pipeline knows neither worker nor page: it is given an event sink and a question ("stop?"), and keeps
its models warm for the next job.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kandinsky5.errors import UserError
from kandinsky5.events import EventSink, StepDone, ignore
from kandinsky5.memory import meter
from kandinsky5.memory.residency import Residency
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.loading import check_transformer, load_transformer, load_video_vae
from kandinsky5.model.text import Conditioning, TextEncoders
from kandinsky5.model.vae import VideoVAE
from kandinsky5.output.media import VideoWriter
from kandinsky5.output.metadata import describe
from kandinsky5.output.state import load_latents, save_latents
from kandinsky5.pipeline.codec import decode_frames, encode_image
from kandinsky5.pipeline.denoise import Guidance, StepState, denoise, draw_noise, schedule
from kandinsky5.pipeline.image import to_pixels
from kandinsky5.pipeline.job import Job, accept
from kandinsky5.presets import FRAMES_PER_SECOND
from kandinsky5.request import GenerationRequest, GenerationResult, latent_shape
from kandinsky5.templates import PROMPT_TEMPLATES


class Pipeline:
    """Runs jobs one at a time and keeps the models of the last one.

    Args:
        models_dirs: folders in which models are looked for, besides those K1 knows.
    """

    def __init__(self, *, models_dirs: Sequence[Path] = ()) -> None:
        self._models_dirs = tuple(models_dirs)
        self._models = Residency()

    def run(
        self,
        request: GenerationRequest,
        *,
        out: Path | None = None,
        emit: EventSink = ignore,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> GenerationResult:
        """Make what the request asks for and write it to ``out`` (else ``request.out``, else a name here).

        Raises:
            UserError, CheckpointError, OutOfMemory, Stopped: see :mod:`kandinsky5.errors`. Nothing is left
            under the final name then.
        """
        started = time.monotonic()
        meter.start_measuring()
        job = accept(
            request,
            out=out,
            emit=emit,
            should_stop=should_stop,
            models_dirs=self._models_dirs,
        )
        guidance = self._encode_text(job)
        first_frame, noise = self._start(job)
        latents = self._denoise(job, guidance, noise, first_frame)
        if job.request.save_latents:
            save_latents(Path(job.request.save_latents), latents.cpu(), job.request)
        frames = self._decode(job, latents)
        self._save(job, frames)
        job.seconds["total"] = time.monotonic() - started
        return self._result(job, frames)

    def _encode_text(self, job: Job) -> Guidance:
        request, preset = job.request, job.preset
        with job.stage("load"):
            encoders = self._models.get(
                "text encoder",
                (job.files.text_encoder, job.files.text_encoder_2, job.device, job.dtype),
                lambda: TextEncoders.load(job.files, device=job.device, dtype=job.dtype),
            )
        template = PROMPT_TEMPLATES[preset.template]

        def encode(prompt: str, clip_prompt: str) -> Conditioning:
            return encoders.encode(
                prompt,
                clip_prompt,
                template=template,
                max_tokens=preset.text_tokens,
                clip_tokens=preset.clip_tokens,
            )

        with job.stage("encode text"):
            positive = encode(request.prompt, request.clip_prompt or request.prompt)
            assert request.guidance is not None
            if abs(request.guidance - 1.0) <= 1e-6:
                return Guidance(positive)
            negative = encode(request.negative_prompt, request.negative_prompt)
            return Guidance(positive, negative, request.guidance)

    def _start(self, job: Job) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The input picture's latent (or None) and the noise, both on the device."""
        assert job.request.seed is not None and job.request.width and job.request.height
        generator = torch.Generator().manual_seed(job.request.seed)
        channels = check_transformer(job.files.transformer).in_visual_dim
        shape = (*latent_shape(job.request), channels)
        noise = draw_noise(shape, generator)
        if job.request.init_latents:
            noise = _given_noise(job.request.init_latents, shape)
        first_frame = None
        if job.picture is not None:
            with job.stage("load"):
                vae = self._vae(job)
            with job.stage("encode image"):
                pixels = to_pixels(job.picture, job.request.width, job.request.height)
                first_frame = encode_image(vae, pixels, generator, job.device)
        return first_frame, noise.to(job.device)

    def _denoise(
        self,
        job: Job,
        guidance: Guidance,
        noise: torch.Tensor,
        first_frame: torch.Tensor | None,
    ) -> torch.Tensor:
        request = job.request
        assert request.steps and request.shift
        with job.stage("load"):
            transformer = self._transformer(job)
        started = time.monotonic()

        def on_step(state: StepState) -> None:
            job.evaluations += guidance.evaluations_per_step
            job.place = f"denoise, step {state.step + 1} of {state.total}"
            each = (time.monotonic() - started) / state.step
            job.emit(StepDone(state.step, state.total, each, each * (state.total - state.step)))

        with job.stage("denoise"):
            return denoise(
                transformer,
                noise,
                guidance,
                schedule(request.steps, request.shift),
                rope_scale=job.preset.rope_scale,
                first_frame=first_frame,
                on_step=on_step,
                should_stop=job.should_stop,
            )

    def _decode(self, job: Job, latents: torch.Tensor) -> np.ndarray:
        with job.stage("load"):
            vae = self._vae(job)
        with job.stage("decode"):
            return decode_frames(vae, latents)

    def _save(self, job: Job, frames: np.ndarray) -> None:
        with job.stage("save"):
            writer = VideoWriter(
                job.out,
                width=frames.shape[2],
                height=frames.shape[1],
                fps=FRAMES_PER_SECOND,
                crf=job.request.crf,
                frames=frames.shape[0],
                metadata=self._metadata(job),
            )
            with writer:
                for frame in frames:
                    writer.write(frame)
                writer.set_metadata(self._metadata(job))

    def _metadata(self, job: Job) -> dict[str, Any]:
        assert job.request.seed is not None
        return describe(
            job.request,
            checkpoint=job.files.transformer,
            seed=job.request.seed,
            seconds=job.seconds,
            peak_vram_bytes=meter.peak_vram_bytes(),
            peak_rss_bytes=meter.peak_rss_bytes(),
        )

    def _result(self, job: Job, frames: np.ndarray) -> GenerationResult:
        request = job.request
        assert request.seed is not None and request.steps
        return GenerationResult(
            output=str(job.out),
            frames=frames.shape[0],
            width=frames.shape[2],
            height=frames.shape[1],
            seed=request.seed,
            steps_run=request.steps,
            evaluations_run=job.evaluations,
            evaluations_skipped=0,
            seconds={name: round(value, 3) for name, value in job.seconds.items()},
            peak_vram_bytes=meter.peak_vram_bytes(),
            peak_rss_bytes=meter.peak_rss_bytes(),
            notices=tuple(job.notices),
        )

    def _transformer(self, job: Job) -> DiffusionTransformer3D:
        return self._models.get(
            "transformer",
            (job.files.transformer, job.device, job.dtype),
            lambda: load_transformer(job.files.transformer, device=job.device, dtype=job.dtype),
        )

    def _vae(self, job: Job) -> VideoVAE:
        return self._models.get(
            "VAE",
            (job.files.vae, job.device, job.dtype),
            lambda: load_video_vae(job.files.vae, device=job.device, dtype=job.dtype),
        )


def _given_noise(path: str, shape: tuple[int, ...]) -> torch.Tensor:
    latents, _ = load_latents(Path(path).expanduser())
    if tuple(latents.shape) != shape:
        raise UserError(
            "init_latents", list(latents.shape), f"the shape {list(shape)} of this request"
        )
    return latents

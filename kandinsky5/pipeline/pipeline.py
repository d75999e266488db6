"""One job from request to file: encode text, encode image, prepare, denoise, decode, save.

The pipeline knows neither worker nor page: it is given an event sink and a question ("stop?"), and keeps
its models warm for the next job as far as that job's memory plan allows.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import torch

from kandinsky5.errors import K1Error, NotFinite, OutOfMemory, Stopped, UserError
from kandinsky5.events import EventSink, ignore, reading
from kandinsky5.memory.text_stages import why_not_expanded
from kandinsky5.memory.whole import to_device, to_host
from kandinsky5.model.loading import check_vae
from kandinsky5.output.autosave import StateKeeper
from kandinsky5.output.run_state import load_run_state
from kandinsky5.output.state import load_latents, save_latents
from kandinsky5.output.tensor_store import TensorStore
from kandinsky5.pipeline.accept import accept, accept_latents, accept_saved
from kandinsky5.pipeline.cache import StepCache
from kandinsky5.pipeline.codec import encode_image
from kandinsky5.pipeline.decodable import read_decodable
from kandinsky5.pipeline.denoise import Guidance, denoise, draw_noise, schedule
from kandinsky5.pipeline.embedding_cache import EmbeddingCache, default_folder
from kandinsky5.pipeline.expanded_prompt import ExpandedPrompt
from kandinsky5.pipeline.image import to_pixels
from kandinsky5.pipeline.job import Job, Listeners, PaintingJob, forget_frames
from kandinsky5.pipeline.kept_latents import kept_beside_the_result
from kandinsky5.pipeline.models import TEXT, TRANSFORMER, Models, ready
from kandinsky5.pipeline.outcome import metadata_of, result_of
from kandinsky5.pipeline.painting import Painted, paint
from kandinsky5.pipeline.preview import PreviewFeed
from kandinsky5.pipeline.preview_pace import PreviewEvery
from kandinsky5.pipeline.prompting import encode_text, expand_text
from kandinsky5.pipeline.run import Run
from kandinsky5.pipeline.steps import Steps
from kandinsky5.pipeline.tiny_preview import choose_previewer
from kandinsky5.request import GenerationRequest, GenerationResult, latent_shape

Result = TypeVar("Result")

CPU = torch.device("cpu")
CHANGED_BY_LESS = ("expand", "encode image", "decode")
"""Stages of which a smaller plan gives other numbers: other tiles, a text encoder that writes otherwise."""


class Pipeline:
    """Runs jobs one at a time and keeps the models of the last one.

    Args:
        models_dirs: folders in which models are looked for, besides those K1 knows; may be set between jobs.
        step_cache: gives a run its step cache.
        embeddings: keeps what prompts came to; by default nothing is kept.
    """

    def __init__(
        self,
        *,
        models_dirs: Sequence[Path] = (),
        step_cache: Callable[[Run, PaintingJob], StepCache | None] = Run.step_cache,
        embeddings: EmbeddingCache | None = None,
    ) -> None:
        self.models_dirs: Sequence[Path] = tuple(models_dirs)
        self._step_cache = step_cache
        self._embeddings = embeddings or EmbeddingCache(None)
        self._models = Models()

    def run(
        self,
        request: GenerationRequest,
        *,
        out: Path | None = None,
        emit: EventSink = ignore,
        should_stop: Callable[[], bool] = lambda: False,
        should_finish: Callable[[], bool] = lambda: False,
        previews: PreviewEvery | None = None,
        states: StateKeeper | None = None,
    ) -> GenerationResult:
        """Make what the request asks for and write it to ``out`` (else ``request.out``, else a name here).

        Args:
            emit: gets the events.
            should_stop: asked between steps.
            should_finish: asked between steps, the first one done: whether to save the run there and to
                decode its clean estimate; the result then has fewer ``steps_run`` than its schedule.
            previews: how often pictures of the unfinished video are made; None makes none, and neither does
                a request without ``preview``.
            states: keeps the unfinished run on disk; None keeps nothing.

        Raises:
            UserError, CheckpointError, OutOfMemory, Stopped: see :mod:`kandinsky5.errors`. Nothing is left
            under the final name then.
        """
        started = time.monotonic()
        to = Listeners(emit, should_stop, previews, states, should_finish)
        job = accept(request, to, out=out, models_dirs=self.models_dirs)
        models, kept = self._models, self._embeddings
        self._with_less(job, "expand", lambda: expand_text(job, models, kept))
        guidance = self._with_less(job, "encode text", lambda: encode_text(job, models, kept))
        run = self._with_less(job, "encode image", lambda: self._begun(job, guidance))
        return self._finished(job, run, started)

    def expand(
        self,
        request: GenerationRequest,
        *,
        out: Path,
        emit: EventSink = ignore,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> ExpandedPrompt:
        """Only rewrite the prompt; what the job would refuse at its start is refused here too.

        Args:
            out: where the job's result would go; nothing is written there.

        Raises:
            UserError: the model's text encoder does not write, or would take too long; and as :meth:`run`.
        """
        started = time.monotonic()
        asked = dataclasses.replace(request, expand=True, expanded_prompt=None)
        job = accept(asked, Listeners(emit, should_stop), out=out, models_dirs=self.models_dirs)
        plan = job.plan
        if plan.text.expand is None:
            reason = "a model whose text encoder writes"
            reason = why_not_expanded(plan.job, plan.budget) if plan.job.expand else reason
            raise UserError("expand", job.preset.name, reason)
        models, kept = self._models, self._embeddings
        self._with_less(job, "expand", lambda: expand_text(job, models, kept))
        taken_s = round(time.monotonic() - started, 3)
        return ExpandedPrompt(job.expanded_prompt, taken_s, tuple(job.notices))

    def resume(
        self,
        path: Path,
        *,
        out: Path | None = None,
        emit: EventSink = ignore,
        should_stop: Callable[[], bool] = lambda: False,
        should_finish: Callable[[], bool] = lambda: False,
        previews: PreviewEvery | None = None,
        states: StateKeeper | None = None,
        save_latents: Path | None = None,
        keep_paths: bool = False,
        otherwise: Mapping[str, str] | None = None,
    ) -> GenerationResult:
        """Go on from a saved state; the result is that of a run that never stopped.

        Args:
            emit, should_stop, should_finish, previews, states: as for :meth:`run`.
            save_latents: file for the final latents.
            keep_paths: write where the state's request says, unless told otherwise here. Only for states of
                one's own: whoever made a state would choose which files of this machine are replaced.
            otherwise: ``attention``, ``weights`` or ``dtype`` to go on with in place of the run's own; the
                result is then not to the bit what it would have become.

        Raises:
            UserError: the state or its model's files are not as they were; and as :meth:`run`.
        """
        started = time.monotonic()
        state = load_run_state(path)
        if not keep_paths or save_latents is not None:
            state = state.written_to(save_latents)
        if otherwise:
            state = state.computed_in(otherwise)
        to = Listeners(emit, should_stop, previews, states, should_finish)
        job = accept_saved(state, to, out=out, models_dirs=self.models_dirs)
        state.check_checkpoints(job.digests)
        return self._finished(job, Run.of_state(state), started)

    def _finished(self, job: PaintingJob, run: Run, started: float) -> GenerationResult:
        """From the run's latent to the file. Whatever ends it before, what has been computed is kept."""
        try:
            latents = self._with_less(
                job, "denoise", lambda: self._denoise(job, run), progress=lambda: run.step
            )
        except Stopped:
            if run.estimate is not None:
                return self._early(job, run, run.estimate, started)
            if job.to.states is not None and job.to.states.save_on_stop:
                run.save(job)
            raise
        except NotFinite as error:
            # Gone on with in the same way it would come to the same; in another way it need not.
            if run.step == 0 or (path := run.save(job)) is None:
                raise
            raise NotFinite(error.step, error.total, path) from error
        except OutOfMemory as error:
            path = run.save(job)
            if path is None:
                raise
            kept = f"{error}; step {run.step} is kept: resume {path}"
            raise OutOfMemory(kept, in_pieces=error.in_pieces) from error
        except (K1Error, RuntimeError, OSError):
            run.save(job)
            raise
        is_kept = run.save(job) is not None or bool(job.request.save_latents)
        if job.request.save_latents:
            save_latents(Path(job.request.save_latents), to_host(latents), job.request)
        with nullcontext() if is_kept else kept_beside_the_result(job, latents):
            painted = self._paint(job, latents)
        return result_of(job, painted, started, steps=run.total)

    def _early(
        self, job: PaintingJob, run: Run, estimate: torch.Tensor, started: float
    ) -> GenerationResult:
        """What there is of a run that the user wants no further step of; it can still be gone on with."""
        run.save(job)
        job.early_step = run.step
        job.notice(f"stopped at step {run.step} of {run.total}: this is what was there by then")
        latents = run.inputs(job.config, CPU).finished(estimate)
        return result_of(job, self._paint(job, latents), started, steps=run.step)

    def decode(
        self,
        path: Path,
        *,
        out: Path | None = None,
        emit: EventSink = ignore,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> GenerationResult:
        """Decode latents that ``save_latents`` kept, or a state behind its last step; only the VAE is needed.

        Raises:
            UserError, CheckpointError, OutOfMemory, Stopped: as :meth:`run`.
        """
        started = time.monotonic()
        latents, values = read_decodable(path)
        request = GenerationRequest.from_dict(values)
        request = dataclasses.replace(request, out=None)  # not for the file to choose
        shape = tuple(latents.shape)
        if request.seed is None or not request.width or shape[:3] != latent_shape(request):
            raise UserError("file", str(path), "latents that fit the request in their header")
        to = Listeners(emit, should_stop)
        job = accept_latents(request, to, out=out, models_dirs=self.models_dirs)
        channels = check_vae(job.vae, job.preset.vae).latent_channels
        if shape[3] != channels:
            raise UserError("file", str(path), f"latents of {channels} channels for this VAE")
        return result_of(job, self._paint(job, latents), started, steps=0)

    def release(self) -> None:
        """Let go of the models that are kept warm."""
        self._models.release()

    def _with_less(
        self,
        job: Job,
        stage: str,
        work: Callable[[], Result],
        *,
        progress: Callable[[], int] = lambda: 0,
    ) -> Result:
        """As :meth:`Job.with_less`; what waits from before makes room for each try.

        Where a smaller plan would change the result, the same is first tried again with nothing else kept.
        """

        def tried() -> Result:
            self._models.make_room(job)
            return work()

        if stage in CHANGED_BY_LESS:
            try:
                return tried()
            except OutOfMemory as error:
                forget_frames(error)
                job.notice(f"{error}: once more, with nothing else kept")
            self._models.release()
        return job.with_less(stage, tried, progress=progress)

    def _begun(self, job: PaintingJob, guidance: Guidance) -> Run:
        """The run before its first step: noise, and the input picture's latent if there is one."""
        request = job.request
        assert request.seed is not None and request.width and request.height
        assert request.steps and request.shift
        generator = torch.Generator().manual_seed(request.seed)
        shape = (*latent_shape(request), job.config.in_visual_dim)
        noise = draw_noise(shape, generator)
        if request.init_latents:
            noise = _given_noise(request.init_latents, shape)
        picture = None
        if job.picture is not None:
            assert job.plan.encode_tiles is not None
            pixels = to_pixels(job.picture, request.width, request.height)
            with ready(job, self._models.vae(job)) as vae, job.stage("encode image"):
                tiles = job.plan.encode_tiles
                picture = to_host(encode_image(vae, pixels, generator, job.device, tiles))
        return Run(guidance, schedule(request.steps, request.shift), noise, picture)

    def _denoise(self, job: PaintingJob, run: Run) -> torch.Tensor:
        """The final latent, from wherever the run is; each step done stays in the run."""
        if run.step == run.total:
            return run.inputs(job.config, CPU).finished(run.latent)
        self._models.done_with(job, TEXT)
        with job.stage("prepare"), reading(job.emit, job.files.transformer):
            tenant = self._models.transformer_tenant(job)
            left = run.times[run.step : run.total].tolist()
            conditioning = tenant.prepare(run.guidance.conditionings, left, start_step=run.step)
        feed, cache = self._preview_feed(job), self._step_cache(run, job)
        with ready(job, self._models.transformer(job, tenant)) as transformer, job.stage("denoise"):
            told = Steps(job, run, transformer, feed)
            return denoise(
                transformer,
                to_device(run.latent, job.device),
                run.guidance,
                run.times,
                conditioning=conditioning,
                cache=cache,
                start_step=run.step,
                rope_scale=job.preset.rope_scale,
                inputs=run.inputs(job.config, job.device),
                expect_passes=transformer.expect,
                on_step=told.step_done,
                should_stop=told.should_stop,
            )

    def _paint(self, job: Job, latents: torch.Tensor) -> Painted:
        """Decode and write; from a card that is too small at last on the CPU."""

        def on(device: torch.device, dtype: torch.dtype) -> Painted:
            self._models.done_with(job, TEXT, TRANSFORMER)
            with ready(job, self._models.vae(job, device, dtype)) as vae:
                return paint(job, vae, latents, device, metadata_of)

        try:
            return self._with_less(job, "decode", lambda: on(job.device, job.dtype))
        except OutOfMemory as error:
            if job.device.type == "cpu":
                raise
            job.notice(f"{error}: decoding on the CPU, which takes long")
        self._models.release()
        return on(CPU, torch.float32)

    def _preview_feed(self, job: PaintingJob) -> PreviewFeed | None:
        if job.to.previews is None or not job.request.preview:
            return None
        config = check_vae(job.vae, job.preset.vae)
        previewer, notice = choose_previewer(
            job.vae, config, device=job.device, models_dirs=self.models_dirs
        )
        if notice and notice not in job.notices:
            job.notice(notice)
        if previewer is None:
            return None
        return PreviewFeed(previewer, job.emit, every=job.to.previews)


def caching_pipeline(*, models_dirs: Sequence[Path] = ()) -> Pipeline:
    """A pipeline that keeps what prompts came to in the user's cache folder."""
    return Pipeline(
        models_dirs=models_dirs, embeddings=EmbeddingCache(TensorStore(default_folder()))
    )


def _given_noise(path: str, shape: tuple[int, ...]) -> torch.Tensor:
    latents, _ = load_latents(Path(path).expanduser())
    if tuple(latents.shape) != shape:
        raise UserError(
            "init_latents", list(latents.shape), f"the shape {list(shape)} of this request"
        )
    return latents

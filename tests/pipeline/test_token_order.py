"""With NABLA a latent is put into the order of tiles once a schedule; outside it is in raster order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky5.model import nabla, positions
from kandinsky5.model.attention import NablaParams, sdpa
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.positions import VisualPositions
from kandinsky5.model.reader import TransformerReader
from kandinsky5.model.text import Conditioning
from kandinsky5.output.autosave import Autosave, StateKeeper
from kandinsky5.output.run_state import load_run_state
from kandinsky5.output.state import load_latents
from kandinsky5.pipeline.denoise import Guidance, StepState, denoise, draw_noise, schedule
from kandinsky5.pipeline.model_inputs import Edited, FirstFrame, ModelInputs
from kandinsky5.pipeline.painting import Painted
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.pipeline.preview_pace import PreviewEvery
from kandinsky5.pipeline.steps import Steps
from kandinsky5.pipeline.transformer import Placement, TransformerTenant
from kandinsky5.request import GenerationRequest
from tests.support import tiny_transformer

CPU = torch.device("cpu")
CONFIG = tiny_transformer.CONFIG
SHAPE = (5, 16, 32)
STEPS = 3
TIMES = schedule(STEPS, 5.0)
FEW, ALL = NablaParams(0.5, 3, 1, 1), NablaParams(1.0, 1, 1, 1)


def conditioning(seed: int, tokens: int) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(tokens, CONFIG.in_text_dim, generator=generator)
    return Conditioning(text, torch.randn(CONFIG.in_text_dim2, generator=generator))


GUIDANCE = Guidance(conditioning(1, 5), conditioning(2, 3), 3.0)
NOISE, PICTURE = (
    draw_noise((frames, *SHAPE[1:], 16), torch.Generator().manual_seed(frames))
    for frames in (SHAPE[0], 1)
)


@pytest.fixture
def tenant(tmp_path: Path):
    path = tiny_transformer.save(tmp_path / "tiny.safetensors", tiny_transformer.weights(CONFIG))
    placement = Placement(resident=0, slots=1, source="disk")
    made = TransformerTenant(TransformerReader(path), device=CPU, placement=placement)
    yield made
    made.close()


def run(
    tenant: TransformerTenant, sparse: NablaParams | None
) -> tuple[torch.Tensor, list[StepState]]:
    """A guided run that begins with a picture, its blocks streamed."""
    tenant.attend(sdpa, sparse)
    conditioning = tenant.prepare(GUIDANCE.conditionings, TIMES[:-1].tolist())
    states: list[StepState] = []
    latent = denoise(
        tenant.enter(),
        NOISE,
        GUIDANCE,
        TIMES,
        conditioning=conditioning,
        inputs=FirstFrame(PICTURE),
        on_step=states.append,
    )
    tenant.leave()
    return latent, states


class Calls:
    """Notes the shape of the first argument, or the argument, of every call of a function."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.seen: list[Any] = []
        function = getattr(module, name)

        def noted(first: Any, *others: Any, **options: Any) -> Any:
            self.seen.append(tuple(getattr(first, "shape", first)))
            return function(first, *others, **options)

        monkeypatch.setattr(module, name, noted)


@pytest.mark.parametrize("sparse", [None, FEW], ids=["full", "nabla"])
def test_all_that_follows_from_the_size_is_made_once_for_a_schedule(
    tenant, monkeypatch, sparse
) -> None:
    stacked, unstacked, angles, tables = (
        Calls(monkeypatch, positions, name)
        for name in ("stacked", "unstacked", "rope_angles_3d", "rope_of")
    )
    window = Calls(monkeypatch, nabla, "window_of")
    attended = Calls(monkeypatch, nabla, "chosen_blocks")
    run(tenant, sparse)
    grid, half = (5, 8, 16), CONFIG.head_dim // 2
    assert angles.seen == [grid]
    assert len(tables.seen) == 1
    if sparse is None:
        assert stacked.seen == unstacked.seen == window.seen == []
        return
    assert window.seen == [grid]
    assert stacked.seen == [(*grid, half), (*NOISE.shape,), (*PICTURE.shape,)]
    assert unstacked.seen == [(5, 32, 16, 16)] * (2 * STEPS + 1), "latents for those outside"
    evaluations = 2 * STEPS * CONFIG.num_visual_blocks
    assert len(attended.seen) == evaluations * max(1, 2 // nabla.HEADS_TOGETHER)


def test_with_all_kept_every_step_is_told_as_full_attention_tells_it(tenant) -> None:
    latent, states = run(tenant, ALL)
    expected, wanted = run(tenant, None)
    few, _ = run(tenant, FEW)
    assert latent.shape == expected.shape == NOISE.shape
    for state, other in zip(states, wanted, strict=True):
        torch.testing.assert_close(state.latent, other.latent, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state.velocity, other.velocity, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)
    assert (few - expected).abs().max() > 1e-2, "these settings leave something out"


class InRasterOrder:
    """A transformer that is given raster order, and in each evaluation has the tokens moved and back."""

    def __init__(self, model: DiffusionTransformer3D) -> None:
        self.config, self._model = model.config, model
        self.prepare = model.prepare

    def positions(self, latent: torch.Tensor, **options: Any) -> VisualPositions:
        return self._model.positions(latent, **options)

    def evaluate(self, x, branches, positions, *, residuals) -> list[torch.Tensor]:
        tiles = self._model.positions(x, sparse=FEW)
        velocities = self._model.evaluate(tiles.order.arranged(x), branches, tiles)
        return [tiles.order.restored(velocity) for velocity in velocities]


class WithNabla(DiffusionTransformer3D):
    def positions(self, latent: torch.Tensor, **options: Any) -> VisualPositions:
        return super().positions(latent, sparse=FEW, **options)


@pytest.mark.parametrize(
    ("config", "frames", "inputs"),
    [
        ({}, 5, FirstFrame(PICTURE)),
        ({"visual_cond": False, "instruct_type": "channel"}, 1, Edited(PICTURE)),
        ({"visual_cond": False}, 2, None),
    ],
    ids=["i2v", "i2i", "t2i"],
)
def test_a_run_equals_one_that_moves_the_tokens_in_each_evaluation_to_the_bit(
    config: dict[str, Any], frames: int, inputs: ModelInputs | None
) -> None:
    config = DiTConfig(**{**vars(CONFIG), **config})
    stacked, plain = (kind(config).eval() for kind in (WithNabla, DiffusionTransformer3D))
    for model in (stacked, plain):
        model.load_state_dict(tiny_transformer.weights(config))
    given = (NOISE[:frames], GUIDANCE, TIMES[:3])
    states: list[list[StepState]] = [[], []]
    latents = [
        denoise(model, *given, inputs=inputs, on_step=seen.append)
        for model, seen in zip((stacked, InRasterOrder(plain)), states, strict=True)
    ]
    assert torch.equal(*latents) and latents[0].isfinite().all()
    for ours, theirs in zip(*states, strict=True):
        assert torch.equal(ours.latent, theirs.latent)
        assert torch.equal(ours.velocity, theirs.velocity)


# Whole jobs

KINDS: dict[str, dict[str, Any]] = {
    "few": {"nabla_p": 0.3, "nabla_wt": 1, "nabla_wh": 1, "nabla_ww": 1},
    "all": {"nabla_p": 1.0},
    "full": {"attention": "sdpa"},
}


@dataclass
class Job:
    """A guided job of two tiles a frame; some evaluations are skipped.

    Attributes:
        latent: its result.
        states: saved after each step but the last.
        previews: what was to be shown after each step.
    """

    latent: torch.Tensor
    states: list[Path]
    previews: list[torch.Tensor]


@pytest.fixture(scope="module")
def unpainted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "_paint", lambda *_: Painted(5, 256, 128))
        yield


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, unpainted: None) -> dict[str, Job]:
    pipeline = Pipeline()
    return {
        kind: job_of(pipeline, tmp_path_factory.mktemp(kind), values)
        for kind, values in KINDS.items()
    }


def job_of(pipeline: Pipeline, folder: Path, values: dict[str, Any]) -> Job:
    size = {"width": 256, "height": 128, "seconds": 1 / 6, "steps": STEPS, "guidance": 2.0}
    cached = {"cache": "magcache", "cache_threshold": 5.0, "cache_retention": 0.25}
    latents = str(folder / "latents.safetensors")
    request = GenerationRequest(
        prompt="a red circle",
        seed=3,
        device="cpu",
        save_latents=latents,
        **{**size, **cached, "attention": "nabla", **values},
    )
    every_step = Autosave(every_minutes=None, every_steps=1)
    previews: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        clean = Steps._clean
        patch.setattr(Steps, "_clean", lambda *of: previews.append(clean(*of)) or previews[-1])
        pipeline.run(
            request,
            out=folder / "out.mp4",
            states=StateKeeper(folder / "states", autosave=every_step, keep=STEPS),
            previews=PreviewEvery(steps=1, seconds=0.0),
        )
    return Job(load_latents(latents)[0], sorted((folder / "states").iterdir()), previews)


def test_a_job_with_nabla_shows_and_saves_in_raster_order(jobs: dict[str, Job]) -> None:
    """One that leaves nothing out shows and saves what one with full attention does."""
    ours, theirs = jobs["all"], jobs["full"]
    assert (len(ours.states), len(ours.previews)) == (STEPS, STEPS)
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)
    for shown, expected in zip(ours.previews, theirs.previews, strict=True):
        close(shown, expected)
    carried = 0
    for path, other in zip(ours.states, theirs.states, strict=True):
        state, expected = load_run_state(path), load_run_state(other)
        close(state.latent, expected.latent)
        close(dict(state.cache_tensors), dict(expected.cache_tensors))
        carried += len(state.cache_tensors)
    assert carried >= 2
    close(ours.latent, theirs.latent)


def test_a_cached_job_with_nabla_goes_on_to_the_bit(tmp_path: Path, jobs: dict[str, Job]) -> None:
    job = jobs["few"]
    assert (job.latent - jobs["full"].latent).abs().max() > 1e-2, "nothing was left out"
    carrying = next(path for path in job.states if load_run_state(path).cache_tensors)
    latents = tmp_path / "latents.safetensors"
    Pipeline().resume(carrying, out=tmp_path / "out.mp4", save_latents=latents)
    assert torch.equal(load_latents(latents)[0], job.latent)

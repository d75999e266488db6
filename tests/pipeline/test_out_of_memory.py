"""Memory runs out anywhere in a job: it goes on with less and ends with the same video, or can be resumed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_runs import STEPS, Ran, Refuser, frames_of, keeper, picture_request, ran

from kandinsky5.errors import OutOfMemory
from kandinsky5.events import ReadingFile, StateSaved, StepDone, ignore
from kandinsky5.memory import fragmentation
from kandinsky5.memory.plan import lowered
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.text import TextEncoders
from kandinsky5.model.vae_rolling import RollingVAETile
from kandinsky5.output.run_state import load_run_state
from kandinsky5.pipeline import job as job_module
from kandinsky5.pipeline import pipeline as pipeline_module
from kandinsky5.pipeline.accept import accept
from kandinsky5.pipeline.job import Listeners
from kandinsky5.pipeline.models import TRANSFORMER, Models
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.pipeline.transformer import TransformerTenant

Refuse = Callable[..., Refuser]
GIB = 1 << 30
CPU = (torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def warm() -> Pipeline:
    """One pipeline for all: what a failure leaves behind must not show in the next run."""
    return Pipeline()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, warm: Pipeline) -> Ran:
    """The run that never ran out of memory."""
    folder = tmp_path_factory.mktemp("whole")
    return ran(folder, picture_request(folder), pipeline=warm)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """``refuse(owner, name, *calls)``: those calls of a function find no memory."""

    def refuse(owner: object, name: str, *calls: int) -> Refuser:
        refuser = Refuser(getattr(owner, name), set(calls))
        monkeypatch.setattr(owner, name, refuser)
        return refuser

    return refuse


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages for which a smaller plan was asked for; there always is one, if only the same again."""
    asked: list[str] = []

    def noting(plan, stage):
        asked.append(stage)
        return lowered(plan, stage) or plan

    monkeypatch.setattr(job_module, "lowered", noting)
    return asked


POINTS = [
    (TextEncoders, "encode", "encode text", "encode text"),
    (DiffusionTransformer3D, "prepare", "denoise", "prepare"),
    (TransformerTenant, "_streamer", "denoise", "loading the transformer"),
    (DiffusionTransformer3D, "evaluate", "denoise", "denoise, step 1 of 4"),
]


@pytest.mark.parametrize(("owner", "name", "stage", "place"), POINTS)
def test_it_goes_on_with_less_from_every_stage_to_the_same_video(
    tmp_path, whole, warm, refuse, stages, owner, name, stage, place
) -> None:
    refuse(owner, name, 1)
    run = ran(tmp_path, picture_request(tmp_path), pipeline=warm)
    assert stages == [stage]
    assert run.is_like(whole)
    assert run.result.evaluations_run == 2 * STEPS
    (notice,) = [text for text in run.notices if "memory" in text]
    assert place in notice and "going on with less" in notice
    assert list(run.result.notices).count(notice) == 1


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_step_that_found_no_memory_is_done_again_and_those_before_it_are_not(
    tmp_path, whole, warm, refuse, step
) -> None:
    refuser = refuse(DiffusionTransformer3D, "evaluate", step)
    run = ran(tmp_path, picture_request(tmp_path), pipeline=warm)
    assert refuser.seen == STEPS + 1
    assert [event.step for event in run.events if isinstance(event, StepDone)] == [1, 2, 3, 4]
    assert run.is_like(whole)
    assert f"denoise, step {step} of {STEPS}" in " ".join(run.notices)


@pytest.mark.parametrize(("refused", "lowered_for"), [([1], []), ([2], []), ([1, 2], ["decode"])])
def test_a_video_half_written_is_written_again_from_its_first_frame(
    tmp_path, whole, warm, refuse, stages, refused, lowered_for
) -> None:
    """First in the same tiles, then with a smaller plan."""
    refuse(RollingVAETile, "push", *refused)
    run = ran(tmp_path, picture_request(tmp_path), pipeline=warm)
    assert stages == lowered_for
    assert run.is_like(whole)
    said = [text for text in run.notices if "memory" in text]
    assert f"decode, piece {refused[0]} of 2" in said[0] and "nothing else kept" in said[0]
    assert all("going on with less" in text for text in said[1:])
    assert len(said) == len(refused)


@pytest.mark.parametrize(("refused", "lowered_for"), [([1], []), ([1, 2], ["encode image"])])
def test_a_picture_is_encoded_as_it_was_before_it_is_in_smaller_tiles(
    tmp_path, whole, warm, refuse, stages, refused, lowered_for
) -> None:
    refuse(pipeline_module, "encode_image", *refused)
    run = ran(tmp_path, picture_request(tmp_path), pipeline=warm)
    assert (stages, run.is_like(whole)) == (lowered_for, True)


def test_before_tiles_become_smaller_no_other_model_is_kept(
    tmp_path, whole, warm, monkeypatch
) -> None:
    kept: list[bool] = []
    paint = pipeline_module.paint

    def painted(job, vae, latents, device, metadata):
        kept.append(warm._models._models.held(TRANSFORMER) is not None)
        if len(kept) == 1:
            raise OutOfMemory("out of memory during decode")
        return paint(job, vae, latents, device, metadata)

    monkeypatch.setattr(pipeline_module, "paint", painted)
    assert ran(tmp_path, picture_request(tmp_path), pipeline=warm).is_like(whole)
    assert kept == [True, False]


def test_the_lowered_plan_streams_what_was_resident(
    tmp_path, whole, warm, refuse, monkeypatch
) -> None:
    refuse(DiffusionTransformer3D, "evaluate", 2)
    plans = []
    placed = TransformerTenant.place
    monkeypatch.setattr(
        TransformerTenant, "place", lambda self, to: (plans.append(to), placed(self, to))[1]
    )
    run = ran(tmp_path, picture_request(tmp_path), pipeline=warm)
    assert plans[0].resident is None
    assert plans[-1].resident is not None and plans[-1].source == "disk"
    assert run.is_like(whole)


def test_refusals_far_apart_are_counted_anew(tmp_path, whole, warm, refuse, stages) -> None:
    refuse(DiffusionTransformer3D, "evaluate", 1, 3, 5, 6)
    run = ran(tmp_path, picture_request(tmp_path), pipeline=warm)
    assert stages == ["denoise"] * 4
    assert run.is_like(whole)


def test_every_file_is_named_while_it_is_read(tmp_path, whole) -> None:
    named = [event.path for event in whole.events if isinstance(event, ReadingFile)]
    assert named[-1] is None and named[0] is not None  # the last word is that nothing is read
    assert all((now is None) != (then is None) for now, then in pairwise(named))
    ends = [Path(path).name for path in named if path is not None]
    assert ends[0] == "start.png"  # fault 4: a crash names the last of them
    transformer = Path(next(path for path in named if path and path.endswith(".safetensors")))
    assert {"text_encoder", transformer.name, "vae"} <= set(ends)
    assert transformer.parent.name == "transformer"


def test_three_refusals_in_a_row_stop_it_resumable(
    tmp_path, whole, warm, refuse, stages, monkeypatch
) -> None:
    pieces = fragmentation.DeviceMemory(reserved_bytes=10 * GIB, allocated_bytes=7 * GIB)
    monkeypatch.setattr(fragmentation, "device_memory", lambda: pieces)
    refuse(DiffusionTransformer3D, "evaluate", 3, 4, 5)
    states = keeper(tmp_path / "states")
    run = ran(tmp_path, picture_request(tmp_path), pipeline=warm, states=states, catch=OutOfMemory)
    assert isinstance(run.error, OutOfMemory) and run.error.exit_code == 4
    assert "step 3 of 4" in str(run.error) and str(states.newest()) in str(run.error)
    (saved,) = [event for event in run.events if isinstance(event, StateSaved)]
    assert (saved.step, saved.path) == (2, str(states.newest()))
    assert not (tmp_path / "out.mp4").exists()
    assert run.error.in_pieces  # a new process would do
    most = load_run_state(states.newest()).facts["settings"]["most_resident_blocks"]
    resumed = ran(tmp_path, resume=states.newest(), pipeline=warm)
    assert (
        f"memory ran out before: no more than {most} blocks stay on the device" in resumed.notices
    )
    assert resumed.is_like(whole)
    assert resumed.result.evaluations_run == 2 * STEPS


def test_four_refusals_while_decoding_leave_the_finished_latents(
    tmp_path, whole, warm, refuse, stages
) -> None:
    refuse(RollingVAETile, "push", 1, 2, 3, 4)
    states = keeper(tmp_path / "states")
    run = ran(tmp_path, picture_request(tmp_path), pipeline=warm, states=states, catch=OutOfMemory)
    assert run.error.exit_code == 4
    assert not run.error.in_pieces
    assert torch.equal(run.latents, whole.latents)
    assert states.newest().name == f"step-{STEPS:05d}.safetensors"
    evaluated = refuse(DiffusionTransformer3D, "evaluate", 1)
    assert ran(tmp_path, resume=states.newest(), pipeline=warm).is_like(whole)
    assert evaluated.seen == 0


def test_a_card_too_small_to_decode_leaves_it_to_the_cpu(
    tmp_path, whole, warm, stages, monkeypatch
) -> None:
    devices = []
    vae_of, paint = Models.vae, pipeline_module.paint

    def painted(job, vae, latents, device, metadata):
        devices.append(device.type)
        if device.type == "cuda":
            raise OutOfMemory("out of GPU memory during decode")
        return paint(job, vae, latents, device, metadata)

    monkeypatch.setattr(pipeline_module, "paint", painted)
    monkeypatch.setattr(Models, "vae", lambda models, job, *where: vae_of(models, job, *CPU))
    monkeypatch.setattr(Models, "make_room", lambda models, job: None)
    to = Listeners(ignore, lambda: False)
    job = accept(picture_request(tmp_path), to, out=tmp_path / "out.mp4", models_dirs=())
    job.device = torch.device("cuda")
    warm._paint(job, whole.latents)
    assert devices == ["cuda"] * 4 + ["cpu"] and stages == ["decode"] * 2
    assert "decoding on the CPU" in job.notices[-1]
    assert np.array_equal(frames_of(tmp_path / "out.mp4"), whole.frames)


def test_a_failed_try_holds_no_tensor_while_the_next_one_runs(tmp_path, warm, monkeypatch) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    evaluate = DiffusionTransformer3D.evaluate

    def hungry(model, x, *arguments, **options):
        if held:
            alive.append(held[0]() is not None)
            return evaluate(model, x, *arguments, **options)
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DiffusionTransformer3D, "evaluate", hungry)
    ran(tmp_path, pipeline=warm)
    assert alive and not any(alive)

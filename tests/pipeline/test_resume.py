"""A run goes on from a saved state as if it had never stopped; a state that does not fit is refused."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from demo_runs import Ran, frames_of, keeper, picture_request, quick, ran

from kandinsky5.errors import K1Error, NotFinite, Stopped, UserError
from kandinsky5.events import StateSaved
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.safetensors_file import SafetensorsFile
from kandinsky5.output import run_state
from kandinsky5.output.atomic import DiskFull
from kandinsky5.output.run_state import load_run_state, save_run_state
from kandinsky5.output.state import load_latents
from kandinsky5.pipeline import painting
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.presets import DEMO_FOLDER
from kandinsky5.request import GenerationRequest

Asked = Callable[[Path], GenerationRequest]
STEPS = 3


def of_text(folder: Path) -> GenerationRequest:
    return quick(steps=STEPS)


def of_picture(folder: Path) -> GenerationRequest:
    return picture_request(folder, steps=STEPS)


@pytest.fixture(scope="module")
def warm() -> Pipeline:
    return Pipeline()


@pytest.fixture(scope="module", params=[of_text, of_picture], ids=["t2v", "i2v"])
def whole(request, tmp_path_factory, warm) -> tuple[Asked, Ran]:
    """What is asked for, and the run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return request.param, ran(folder, request.param(folder), pipeline=warm)


def stopped(folder: Path, request: GenerationRequest, before: int, **options: object) -> Path:
    """The state of a run that was stopped."""
    states = keeper(folder / "states")
    run = ran(folder, request, stop_before=before, states=states, catch=Stopped, **options)
    assert isinstance(run.error, Stopped) and not (folder / "out.mp4").exists()
    path = states.newest()
    assert path is not None
    assert [e.path for e in run.events if isinstance(e, StateSaved)][-1] == str(path)
    return path


@pytest.mark.parametrize("done", range(STEPS))
def test_stopped_after_any_step_it_comes_to_the_same_bits(tmp_path, warm, whole, done) -> None:
    asked, unbroken = whole
    path = stopped(tmp_path, asked(tmp_path), done + 1, pipeline=warm)
    assert load_run_state(path).step == done
    resumed = ran(tmp_path, resume=path, pipeline=warm)
    assert resumed.is_like(unbroken)
    assert resumed.result.evaluations_run == unbroken.result.evaluations_run
    assert resumed.result.seconds.keys() == unbroken.result.seconds.keys()


def test_another_process_needs_neither_text_encoders_nor_picture(tmp_path, warm, whole) -> None:
    asked, unbroken = whole
    path = stopped(tmp_path, asked(tmp_path), STEPS, pipeline=warm)
    (tmp_path / "start.png").unlink(missing_ok=True)
    pipeline = Pipeline()
    pipeline._models.text_encoders = None  # whoever asks for them fails
    assert ran(tmp_path, resume=path, pipeline=pipeline).is_like(unbroken)


def test_stopped_while_decoding_no_step_is_done_again(tmp_path, warm, whole, monkeypatch) -> None:
    asked, unbroken = whole
    path = stopped(tmp_path, asked(tmp_path), STEPS + 2, pipeline=warm)
    assert path.name == f"step-{STEPS:05d}.safetensors"
    monkeypatch.setattr(warm._models, "transformer_tenant", None)
    assert ran(tmp_path, resume=path, pipeline=warm).is_like(unbroken)


def test_a_stop_without_saving_leaves_nothing(tmp_path, warm) -> None:
    states = keeper(tmp_path / "states")
    states._on_stop.clear()
    ran(tmp_path, of_text(tmp_path), states=states, stop_before=1, catch=Stopped, pipeline=warm)
    assert states.newest() is None


def test_of_states_saved_on_the_way_the_last_two_stay(tmp_path, warm) -> None:
    states = keeper(tmp_path / "states", every_steps=1)
    run = ran(tmp_path, of_text(tmp_path), states=states, pipeline=warm)
    saved = [event.step for event in run.events if isinstance(event, StateSaved)]
    assert saved == [1, 2, 3]
    names = sorted(path.name for path in states.folder.iterdir())
    assert names == ["step-00002.safetensors", "step-00003.safetensors"]


@pytest.mark.parametrize(
    "error", [DiskFull("states", 10**9, 10**6), K1Error("states: cannot be written (I/O error)")]
)
def test_a_full_or_broken_disk_costs_the_state_and_not_the_run(
    tmp_path, warm, monkeypatch, error
) -> None:
    def full(*arguments: object, **options: object) -> Path:
        raise error

    monkeypatch.setattr(run_state, "save_run_state", full)
    states = keeper(tmp_path / "states", every_steps=1)
    run = ran(tmp_path, of_text(tmp_path), states=states, pipeline=warm)
    assert run.result is not None and (tmp_path / "out.mp4").exists()
    said = [text for text in run.notices if "could not be saved" in text]
    assert said == [f"the unfinished run could not be saved: {error}"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo's model, to be changed."""
    return Path(shutil.copytree(DEMO_FOLDER, tmp_path / "model"))


def weights_of(folder: Path) -> Path:
    (found,) = folder.glob("*.safetensors")
    return found


def retrained(path: Path) -> None:
    """Other numbers under the same header: what a checkpoint tuned from this one looks like."""
    with SafetensorsFile(path) as file:
        at = file._data_start
        infos = list(file.tensors.values())
    with path.open("r+b") as stream:
        for info in infos:
            stream.seek(at + info.begin)
            first = stream.read(1)
            stream.seek(at + info.begin)
            stream.write(bytes([first[0] ^ 1]))


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_other_weights_than_it_began_with_are_refused(tmp_path, model, part) -> None:
    path = stopped(tmp_path, quick(steps=STEPS, model_dir=str(model)), 2)
    retrained(weights_of(model / part))
    refused = ran(tmp_path, resume=path, catch=UserError)
    assert f"{part}: " in str(refused.error) and "another file" in str(refused.error)
    assert not (tmp_path / "out.mp4").exists()


def test_a_copy_of_the_model_elsewhere_is_the_same_model(tmp_path, warm, model) -> None:
    path = stopped(tmp_path, quick(steps=STEPS, model_dir=str(model)), 2, pipeline=warm)
    for part in model.rglob("*.safetensors"):
        os.utime(part)
    assert ran(tmp_path, resume=path, pipeline=warm).result is not None


@pytest.fixture(scope="module")
def saved(tmp_path_factory, warm) -> Path:
    """A state of the run of text, to be read."""
    folder = tmp_path_factory.mktemp("saved")
    return stopped(folder, of_text(folder), STEPS, pipeline=warm)


def test_an_edited_state_is_refused(tmp_path, warm, saved) -> None:
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    path = tmp_path / "edited.safetensors"
    path.write_bytes(data)
    refused = ran(tmp_path, resume=path, catch=UserError)
    assert "damaged or was edited" in str(refused.error)


def test_the_files_that_a_foreign_state_names_are_not_written(tmp_path, warm, saved) -> None:
    names = {name: str(tmp_path / f"{name}.precious") for name in ("out", "save_latents")}
    for name in names.values():
        Path(name).write_text("of somebody else")
    state = load_run_state(saved)
    request = dataclasses.replace(state.request, **names)
    path = tmp_path / "foreign.safetensors"
    save_run_state(path, dataclasses.replace(state, request=request))
    warm.resume(path, out=tmp_path / "out.mp4")
    assert {Path(name).read_text() for name in names.values()} == {"of somebody else"}
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"foreign.safetensors", "out.mp4", "out.precious", "save_latents.precious"}
    warm.resume(path, out=tmp_path / "out.mp4", save_latents=tmp_path / "latents.safetensors")
    assert load_latents(tmp_path / "latents.safetensors")[0].shape == state.latent.shape


@pytest.mark.parametrize(
    "facts",
    [
        {"settings": {"weights": "int8", "chunk_tokens": -5, "chunk_heads": "all"}},
        {"settings": {"chunk_tokens": 10**30, "chunk_heads": 10**30}},
        {"settings": [], "dtype": "int3", "seconds": "long", "evaluations": -1},
        {"seconds": {"denoise": -1.0, "load": True, "sleep": 3}, "evaluations": True},
    ],
)
def test_strange_facts_in_a_state_do_no_harm(tmp_path, warm, saved, facts) -> None:
    state = load_run_state(saved)
    path = save_run_state(tmp_path / "f.safetensors", dataclasses.replace(state, facts=facts))
    run = ran(tmp_path, resume=path, pipeline=warm, catch=K1Error)
    assert isinstance(run.error, (UserError, type(None)))


def test_latents_are_decoded_with_nothing_but_the_vae(tmp_path, warm, model) -> None:
    unbroken = ran(tmp_path / "whole", quick(steps=STEPS, model_dir=str(model)), pipeline=warm)
    for part in model.iterdir():
        if part.is_dir() and part.name != "vae":
            shutil.rmtree(part)
    result = Pipeline().decode(tmp_path / "whole" / "latents.safetensors", out=tmp_path / "d.mp4")
    again = Ran(tmp_path)
    shutil.move(tmp_path / "d.mp4", tmp_path / "out.mp4")
    assert np.array_equal(again.frames, unbroken.frames)
    assert (result.steps_run, result.evaluations_run) == (0, 0)


@pytest.mark.parametrize("colour", [(0, 0, 0), (200, 30, 30)])
def test_flat_frames_get_a_notice_with_the_result(tmp_path, warm, monkeypatch, colour) -> None:
    frames = np.broadcast_to(np.array(colour, np.uint8), (5, 64, 64, 3)).copy()
    monkeypatch.setattr(painting, "decoded", lambda *arguments, **options: iter([frames]))
    run = ran(tmp_path, of_text(tmp_path), pipeline=warm)
    (notice,) = [text for text in run.notices if "one colour" in text]
    assert notice in run.result.notices
    assert (tmp_path / "out.mp4").exists()


def test_a_run_that_met_nan_is_kept_and_goes_on_in_another_way(tmp_path, warm, monkeypatch) -> None:
    evaluate, seen = DiffusionTransformer3D.evaluate, []

    def breaks(model, x, *arguments, **options):
        velocities = evaluate(model, x, *arguments, **options)
        seen.append(1)
        return [v * float("nan") for v in velocities] if len(seen) == 2 else velocities

    monkeypatch.setattr(DiffusionTransformer3D, "evaluate", breaks)
    states = keeper(tmp_path / "states")
    request = of_text(tmp_path)
    run = ran(tmp_path / "nan", request, pipeline=warm, states=states, catch=NotFinite)
    newest = states.newest()
    assert newest is not None and load_run_state(newest).step == 1
    assert f"step 1 is kept: resume {newest} --attention sdpa" in str(run.error)
    out = tmp_path / "out.mp4"
    result = warm.resume(newest, out=out, otherwise={"attention": "sdpa", "weights": "int8"})
    assert (result.steps_run, result.frames) == (STEPS, len(frames_of(out)))
    assert len(seen) == 2 + STEPS - 1
    with pytest.raises(UserError, match="attention"):
        warm.resume(newest, out=out, otherwise={"attention": "magic"})


def test_what_a_run_is_otherwise_computed_in_replaces_what_it_had(saved) -> None:
    state = load_run_state(saved)
    facts = {"dtype": "fp32", "attention": {"engine": "sage"}, "settings": {"weights": "int8"}}
    state = dataclasses.replace(state, facts=facts)
    changed = state.computed_in({"attention": "sdpa", "weights": "bf16"})
    assert (changed.request.attention, changed.request.weights) == ("sdpa", "bf16")
    assert changed.facts == {"dtype": "fp32", "settings": {}}

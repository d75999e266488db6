"""A job whose weights come from the file while it runs: what happens to the file, and what is left behind."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from demo_runs import Ran, keeper, quick, ran
from open_files import open_files

from kandinsky5.errors import CheckpointError, NotFinite, Stopped
from kandinsky5.events import StepDone
from kandinsky5.memory.source import PAGEABLE_NOTICE
from kandinsky5.model.safetensors_file import SafetensorsFile
from kandinsky5.pipeline import models, transformer
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.pipeline.transformer import Placement
from kandinsky5.presets import DEMO_FOLDER

FROM_DISK = Placement(resident=2, slots=2, source="disk", ring=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The run with all weights resident."""
    return ran(tmp_path_factory.mktemp("whole"))


@pytest.fixture(autouse=True)
def from_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "placement_of", lambda plan: FROM_DISK)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_FOLDER, tmp_path / "model"))


@pytest.fixture
def checkpoint(model: Path) -> Path:
    (found,) = (model / "transformer").glob("*.safetensors")
    return found


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is never done reading ahead."""
    fill = transformer._Fill.__call__

    def slowly(self, index, slab):
        time.sleep(0.02)
        fill(self, index, slab)

    monkeypatch.setattr(transformer._Fill, "__call__", slowly)


def reading_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("k1-weights")]


def test_the_video_is_that_of_resident_weights(tmp_path, whole) -> None:
    run = ran(tmp_path)
    assert run.is_like(whole)
    assert reading_threads() == []


def vanish(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    os.replace(copy, path)


@pytest.mark.parametrize(
    ("harm", "said"),
    [(vanish, "vanished"), (truncate, "shorter"), (replace, "replaced")],
)
def test_a_file_harmed_while_it_streams_is_named_and_the_steps_are_kept(
    tmp_path, whole, model, checkpoint, harm: Callable[[Path], None], said
) -> None:
    states = keeper(tmp_path / "states")
    spare = Path(shutil.copy2(checkpoint, tmp_path / "spare"))
    pipeline = Pipeline()
    events: list[object] = []

    def emit(event: object) -> None:
        events.append(event)
        if event == next((e for e in events if isinstance(e, StepDone)), None):
            harm(checkpoint)

    with pytest.raises(CheckpointError, match=said) as failure:
        pipeline.run(
            quick(model_dir=str(model)), out=tmp_path / "out.mp4", emit=emit, states=states
        )
    assert str(checkpoint) in str(failure.value) and failure.value.exit_code == 3
    assert states.newest() is not None and states.newest().name >= "step-00001"
    assert not (tmp_path / "out.mp4").exists()
    assert reading_threads() == []
    shutil.move(spare, checkpoint)
    resumed = ran(tmp_path, resume=states.newest(), pipeline=pipeline)
    assert resumed.result is not None and (resumed.frames == whole.frames).all()


def test_the_vae_alone_is_enough_once_the_last_step_is_done(tmp_path, whole, model) -> None:
    def emit(event: object) -> None:
        if isinstance(event, StepDone) and event.step == event.total:
            shutil.rmtree(model / "transformer")
            shutil.rmtree(model / "text_encoder")

    Pipeline().run(quick(model_dir=str(model)), out=tmp_path / "out.mp4", emit=emit)
    assert (Ran(tmp_path).frames == whole.frames).all()


def test_a_stop_in_the_middle_of_a_prefetch_leaves_no_thread_and_no_file(
    tmp_path, model, slow
) -> None:
    pipeline = Pipeline()
    request = quick(model_dir=str(model))
    stopped = ran(tmp_path, request, stop_before=2, pipeline=pipeline, catch=Stopped)
    assert isinstance(stopped.error, Stopped)
    assert reading_threads() == []
    pipeline._models.release()
    assert open_files(model) == []


def test_memory_that_cannot_be_locked_is_said_once(tmp_path, whole, monkeypatch) -> None:
    class Refusing:
        def lock(self, address: int, nbytes: int) -> bool:
            return False

        def unlock(self, address: int) -> None:
            raise AssertionError("never locked")

    monkeypatch.setattr(transformer, "page_lock_for", lambda device: Refusing())
    run = ran(tmp_path)
    assert run.notices.count(PAGEABLE_NOTICE) == 1
    assert run.is_like(whole)


def test_weights_that_give_nan_end_it_at_that_step(tmp_path, model, checkpoint) -> None:
    with SafetensorsFile(checkpoint) as file:
        info = file.tensors["out_layer.out_layer.weight"]
        at = file._data_start + info.begin
    with checkpoint.open("r+b") as stream:
        stream.seek(at)
        stream.write(b"\xff" * info.size_bytes)  # NaN in every floating dtype
    states = keeper(tmp_path / "states")
    run = ran(tmp_path, quick(model_dir=str(model)), states=states, catch=NotFinite)
    assert "step 1 of 4" in str(run.error) and "sdpa" in str(run.error)
    assert "\n" not in str(run.error)
    assert not [event for event in run.events if isinstance(event, StepDone)]
    assert states.newest() is None and not (tmp_path / "out.mp4").exists()

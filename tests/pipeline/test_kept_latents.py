"""While a video is decoded its latents are on disk, whatever keeps states or does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from demo_runs import keeper, quick, ran

from kandinsky5.errors import K1Error
from kandinsky5.output.atomic import DiskFull
from kandinsky5.output.state import load_latents
from kandinsky5.pipeline import kept_latents, painting
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.pipeline.run import Run

NAME = "out.latents.safetensors"


@pytest.fixture(scope="module")
def warm() -> Pipeline:
    return Pipeline()


def run(folder: Path, pipeline: Pipeline, **options: object):
    """Without a file for the latents of its own."""
    folder.mkdir(exist_ok=True)
    request = quick(steps=2)
    return pipeline.run(request, out=folder / "out.mp4", **options)


def test_without_states_they_lie_beside_the_result_and_go_when_it_is_there(
    tmp_path, warm, monkeypatch
) -> None:
    seen: list[list[str]] = []
    decoded = painting.decoded

    def noting(*arguments, **options):
        seen.append(sorted(path.name for path in tmp_path.glob("*.safetensors")))
        return decoded(*arguments, **options)

    monkeypatch.setattr(painting, "decoded", noting)
    run(tmp_path, warm)
    assert seen == [[NAME]]
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_a_decode_that_fails_leaves_them_and_they_decode_to_the_video(
    tmp_path, warm, monkeypatch
) -> None:
    (tmp_path / NAME).write_text("somebody's own")
    notices: list[str] = []

    def breaks(*arguments, **options):
        raise RuntimeError("broken")

    with monkeypatch.context() as broken:
        broken.setattr(painting, "decoded", breaks)
        with pytest.raises(RuntimeError, match="broken"):
            run(tmp_path, warm, emit=lambda event: notices.append(str(event)))
    assert (tmp_path / NAME).read_text() == "somebody's own"
    kept = tmp_path / "out1.latents.safetensors"
    assert any(f"k1.py decode {kept}" in notice for notice in notices)
    whole = ran(tmp_path / "whole", quick(steps=2), pipeline=warm)
    assert torch.equal(load_latents(kept)[0], whole.latents)
    assert warm.decode(kept, out=tmp_path / "again.mp4").frames == whole.result.frames


@pytest.mark.parametrize("is_full", [False, True])
def test_a_saved_state_is_enough_and_where_it_fails_they_are_kept_beside_the_result(
    tmp_path, warm, monkeypatch, is_full
) -> None:
    asked: list[Path] = []
    save = kept_latents.save_latents
    monkeypatch.setattr(
        kept_latents, "save_latents", lambda path, *rest: (asked.append(path), save(path, *rest))
    )
    if is_full:
        monkeypatch.setattr(Run, "state", lambda self, job: (_ for _ in ()).throw(K1Error("full")))
    run(tmp_path, warm, states=keeper(tmp_path / "states"))
    assert asked == ([tmp_path / NAME] if is_full else [])


def test_a_disk_that_is_full_everywhere_costs_nothing_but_a_notice(
    tmp_path, warm, monkeypatch
) -> None:
    def full(*arguments) -> None:
        raise DiskFull(tmp_path, 1, 0)

    monkeypatch.setattr(kept_latents, "save_latents", full)
    result = run(tmp_path, warm)
    assert any("latents could not be kept" in notice for notice in result.notices)
    assert (tmp_path / "out.mp4").exists()

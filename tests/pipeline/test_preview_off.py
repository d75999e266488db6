"""Previews that nobody wants cost nothing and change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from demo_runs import Ran, quick

from kandinsky5.events import PreviewReady
from kandinsky5.pipeline import pipeline as pipeline_module
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.pipeline.preview_pace import PreviewEvery
from kandinsky5.pipeline.steps import Steps


@pytest.fixture(scope="module")
def warm() -> Pipeline:
    return Pipeline()


def made(folder: Path, pipeline: Pipeline, **settings: object) -> Ran:
    folder.mkdir()
    run = Ran(folder)
    request = quick(save_latents=str(folder / "latents.safetensors"), **settings)
    run.result = pipeline.run(
        request, out=folder / "out.mp4", emit=run.events.append, previews=PreviewEvery(seconds=0)
    )
    return run


def test_without_previews_not_a_bit_differs_and_none_of_their_work_is_done(
    tmp_path, warm, monkeypatch
) -> None:
    work = []
    choose, estimate = pipeline_module.choose_previewer, Steps._clean
    monkeypatch.setattr(
        pipeline_module,
        "choose_previewer",
        lambda *given, **named: work.append("previewer") or choose(*given, **named),
    )
    monkeypatch.setattr(Steps, "_clean", lambda *given: work.append("x₀") or estimate(*given))
    shown = made(tmp_path / "on", warm)
    assert sum(isinstance(event, PreviewReady) for event in shown.events) == 4
    assert work == ["previewer", *["x₀"] * 4]
    work.clear()
    unseen = made(tmp_path / "off", warm, preview=False)
    assert work == []
    assert not any(isinstance(event, PreviewReady) for event in unseen.events)
    assert unseen.is_like(shown)

"""A second job in the same pipeline loads no model; one that was replaced on disk is loaded anew."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kandinsky5.events import PipelineEvent, StageStarted, StepDone
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.safetensors_file import SafetensorsFile
from kandinsky5.pipeline import accept
from kandinsky5.pipeline import pipeline as pipeline_module
from kandinsky5.pipeline.models import TEXT, TRANSFORMER
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.presets import DEMO_FOLDER
from kandinsky5.request import GenerationRequest

QUICK = {"steps": 1, "seconds": 1 / 6, "guidance": 1.0}

ONCE_A_SCHEDULE = re.compile(
    r"(time|text|pooled_text)_embeddings\.|text_transformer_blocks\.|out_layer\.modulation\."
    r"|visual_transformer_blocks\.\d+\.visual_modulation\."
)
"""Tensors of the transformer that turn prompts and times into conditioning; they are not kept."""

Read = Callable[[], set[str]]


@pytest.fixture
def newly_read(monkeypatch: pytest.MonkeyPatch) -> Read:
    """Gives the parts of the model of which tensors were read since the last call.

    What a schedule needs once is left out: it is read for every job, by design.
    """
    seen: set[str] = set()
    read_into = SafetensorsFile.read_into

    def noting(file: SafetensorsFile, name: str, *arguments: object, **options: object) -> None:
        if not ONCE_A_SCHEDULE.match(name):
            seen.add(file.path.parent.name)
        read_into(file, name, *arguments, **options)

    monkeypatch.setattr(SafetensorsFile, "read_into", noting)

    def taken() -> set[str]:
        names = set(seen)
        seen.clear()
        return names

    return taken


def run(pipeline: Pipeline, out: Path, **values: object) -> list[PipelineEvent]:
    events: list[PipelineEvent] = []
    request = GenerationRequest(**{"prompt": "a red circle", "seed": 1, **QUICK, **values})
    pipeline.run(request, out=out, emit=events.append)
    return events


def test_a_second_job_loads_no_model(tmp_path, newly_read) -> None:
    pipeline = Pipeline()
    run(pipeline, tmp_path / "1.mp4")
    assert newly_read() == {"transformer", "text_encoder", "text_encoder_2", "vae"}
    other = {"prompt": "a blue square moves up", "seed": 2, "steps": 2, "guidance": 2.0}
    events = run(pipeline, tmp_path / "2.mp4", **other)
    assert newly_read() == set()
    assert StageStarted("denoise") in events
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2]


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_part_that_was_replaced_on_disk_is_read_again_and_no_other(
    tmp_path, newly_read, part
) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO_FOLDER, model)
    pipeline = Pipeline()
    run(pipeline, tmp_path / "1.mp4", model_dir=str(model))
    (weights,) = (model / part).glob("*.safetensors")
    copy = weights.with_name("copy")
    shutil.copy2(weights, copy)
    os.replace(copy, weights)
    newly_read()
    run(pipeline, tmp_path / "2.mp4", model_dir=str(model))
    together = {"text_encoder", "text_encoder_2"}
    assert newly_read() == (together if part in together else {part})


def test_another_weights_format_reads_the_transformer_alone(tmp_path, newly_read) -> None:
    pipeline = Pipeline()
    run(pipeline, tmp_path / "1.mp4")
    newly_read()
    run(pipeline, tmp_path / "2.mp4", weights="int8")
    assert newly_read() == {"transformer"}


def test_another_size_reads_nothing(tmp_path, newly_read) -> None:
    pipeline = Pipeline()
    run(pipeline, tmp_path / "1.mp4")
    newly_read()
    run(pipeline, tmp_path / "2.mp4", seconds=2 / 6, guidance=3.0)
    assert newly_read() == set()


def test_main_memory_counts_every_model_and_the_least_recently_used_goes_first(
    tmp_path, newly_read
) -> None:
    pipeline = Pipeline()
    run(pipeline, tmp_path / "1.mp4")
    models = pipeline._models._models
    sizes = {role: models.held(role).host_bytes for role in ("text encoder", "transformer", "VAE")}
    for role, folders in (
        ("text encoder", ("text_encoder", "text_encoder_2")),
        ("transformer", ("transformer",)),
        ("VAE", ("vae",)),
    ):
        files = [path for name in folders for path in (DEMO_FOLDER / name).glob("*.safetensors")]
        assert sizes[role] > 0.7 * sum(path.stat().st_size for path in files), role
    newly_read()
    models.host_budget_bytes = sum(sizes.values()) - 1
    models.keep_within_budget()
    assert models.held("text encoder") is None
    assert models.held("transformer") is not None and models.held("VAE") is not None
    models.host_budget_bytes = sizes["VAE"]
    models.keep_within_budget()
    assert models.held("transformer") is None and models.held("VAE") is not None
    run(pipeline, tmp_path / "2.mp4")
    assert newly_read() == {"transformer", "text_encoder", "text_encoder_2"}


@pytest.mark.parametrize(("home", "kept"), [("disk", False), ("ram", True)])
def test_what_the_plan_keeps_nowhere_is_gone_before_the_next_stage(
    tmp_path, monkeypatch, home, kept
) -> None:
    pipeline, seen = Pipeline(), []
    plan_of, evaluate = accept.plan_of, DiffusionTransformer3D.evaluate
    paint = pipeline_module.paint

    def planned(*arguments, **options):
        plan = plan_of(*arguments, **options)
        return dataclasses.replace(plan, homes=dict.fromkeys(plan.homes, home))

    def noting(role, work):
        def noted(*arguments, **options):
            seen.append((role, pipeline._models._models.held(role) is not None))
            return work(*arguments, **options)

        return noted

    monkeypatch.setattr(accept, "plan_of", planned)
    monkeypatch.setattr(DiffusionTransformer3D, "evaluate", noting(TEXT, evaluate))
    monkeypatch.setattr(pipeline_module, "paint", noting(TRANSFORMER, paint))
    run(pipeline, tmp_path / "1.mp4")
    assert seen == [(TEXT, kept), (TRANSFORMER, kept)]

"""Memory runs out once in each stage of one job, expanding the prompt included: the video stays the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from demo_runs import Ran, Refuser, ran
from tiny_checkpoints import quick, write_model

from kandinsky5.events import StageStarted
from kandinsky5.memory.plan import lowered
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.text import TextEncoders
from kandinsky5.pipeline import expand, painting, prompting
from kandinsky5.pipeline import job as job_module
from kandinsky5.pipeline import pipeline as pipeline_module
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.pipeline.transformer import TransformerTenant
from kandinsky5.request import GenerationRequest

POINTS = {
    "expand": (prompting, "expand_prompt"),
    "encode text": (TextEncoders, "encode"),
    "encode image": (pipeline_module, "encode_image"),
    "prepare": (DiffusionTransformer3D, "prepare"),
    "load": (TransformerTenant, "_streamer"),
    "denoise": (DiffusionTransformer3D, "evaluate"),
    "decode": (painting, "decoded"),
}
LADDERS = ["encode text", "denoise", "denoise", "denoise"]
FIRST_THE_SAME = ("expand", "encode image", "decode")
ONCE, TWICE = {1}, {1, 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "i2v", "i2v", "diffusers")


def run_of(folder: Path, request: GenerationRequest) -> Ran:
    pipeline = Pipeline()
    try:
        return ran(folder, request, pipeline=pipeline)
    finally:
        pipeline.release()


@pytest.mark.parametrize(
    ("tiling", "while_decoding", "ladders"),
    [("auto", ONCE, LADDERS), ("rolling", TWICE, [*LADDERS, "decode"])],
)
def test_a_refusal_in_every_stage_of_one_job_changes_nothing_of_the_video(
    tmp_path, model, monkeypatch, tiling, while_decoding, ladders
) -> None:
    """Image → video with a rewritten prompt. While decoding, the first one leaves the plan as it is."""
    values = quick("i2v", model, expand=True, vae_tiling=tiling)
    request_of_model = GenerationRequest.from_dict(values)
    monkeypatch.setattr(expand, "EXPANSION_TOKENS", 24)
    whole = run_of(tmp_path / "whole", request_of_model)
    assert {event.stage for event in whole.events if isinstance(event, StageStarted)} == set(POINTS)
    refusers = {}
    for stage, (owner, name) in POINTS.items():
        # Three in a row would end the job: between loading and a step another step is done.
        calls = {"denoise": {2}, "decode": while_decoding}.get(stage, ONCE)
        refusers[stage] = Refuser(getattr(owner, name), calls)
        monkeypatch.setattr(owner, name, refusers[stage])
    asked: list[str] = []

    def noting(plan, stage):
        asked.append(stage)
        return lowered(plan, stage) or plan

    monkeypatch.setattr(job_module, "lowered", noting)
    run = run_of(tmp_path / "refused", request_of_model)
    assert all(refuser.seen > 1 for refuser in refusers.values())
    assert asked == ladders
    assert run.is_like(whole)
    assert run.result is not None and whole.result is not None
    assert run.result.expanded_prompt == whole.result.expanded_prompt
    less = [text for text in run.notices if "going on with less" in text]
    assert len(less) == len(ladders)
    again = [text for text in run.notices if "once more, with nothing else kept" in text]
    assert [text.partition(" during ")[2].partition(":")[0] for text in again] == [*FIRST_THE_SAME]

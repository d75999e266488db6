"""The step cache, guidance in a part of the schedule and LoRAs through whole jobs of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kandinsky5.errors import UserError
from kandinsky5.events import PipelineEvent, StepDone
from kandinsky5.magcache import SkipRule, ratios_of, skips_of
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.loading import check_transformer
from kandinsky5.model.lora import layer_sizes
from kandinsky5.output.autosave import Autosave, StateKeeper
from kandinsky5.output.run_state import load_run_state
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.presets import DEMO_FOLDER
from kandinsky5.request import GenerationRequest, GenerationResult, LoraChoice
from tests.support import loras

STEPS = 6
QUICK: dict[str, Any] = {"prompt": "a red circle", "seed": 1, "steps": STEPS, "seconds": 1 / 6}
CACHED = {"cache": "magcache", "cache_threshold": 5.0, "cache_retention": 0.25}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline()


class Ran:
    """A job's result, its final latent and its steps."""

    def __init__(self, pipeline: Pipeline, folder: Path, **values: Any) -> None:
        kept = {key: values.pop(key) for key in ("states",) if key in values}
        self.events: list[PipelineEvent] = []
        latents = folder / "latents.safetensors"
        request = GenerationRequest(**{**QUICK, **values, "save_latents": str(latents)})
        self.result: GenerationResult = pipeline.run(
            request, out=folder / "clip.mp4", emit=self.events.append, **kept
        )
        self.latent = load_file(latents)["latents"]

    @property
    def steps(self) -> list[StepDone]:
        return [event for event in self.events if isinstance(event, StepDone)]


def test_a_cached_job_skips_what_its_plan_says_and_resumes_to_the_bit(pipeline, tmp_path) -> None:
    states = StateKeeper(
        tmp_path / "states", autosave=Autosave(every_minutes=None, every_steps=1), keep=STEPS
    )
    ran = Ran(pipeline, tmp_path, states=states, **CACHED)
    skips = skips_of(ratios_of("demo-t2v") or (), [2] * STEPS, SkipRule(5.0, 0.25))
    skipped = sum(map(sum, skips))
    assert skipped >= STEPS // 2
    assert (ran.result.evaluations_run, ran.result.evaluations_skipped) == (
        2 * STEPS - skipped,
        skipped,
    )
    assert [step.evaluations_skipped for step in ran.steps] == [sum(step) for step in skips]
    assert [step.evaluations_run for step in ran.steps] == [2 - sum(step) for step in skips]

    middle = next(step for step, both in enumerate(skips) if any(both))
    path = next(tmp_path.glob(f"states/step-*{middle}.safetensors"))
    state = load_run_state(path)
    assert {t.shape for t in state.cache_tensors.values()} == {torch.Size((2 * 4 * 4, 192))}
    (tmp_path / "latents.safetensors").unlink()
    resumed = pipeline.resume(path, out=tmp_path / "again.mp4", keep_paths=True)
    assert torch.equal(load_file(tmp_path / "latents.safetensors")["latents"], ran.latent)
    assert resumed.evaluations_run == ran.result.evaluations_run
    assert resumed.evaluations_skipped == skipped


def test_without_a_cache_nothing_is_skipped(pipeline, tmp_path) -> None:
    result = Ran(pipeline, tmp_path).result
    assert (result.evaluations_run, result.evaluations_skipped) == (2 * STEPS, 0)


def test_guidance_in_a_part_of_the_schedule_saves_evaluations(pipeline, tmp_path) -> None:
    ran = Ran(pipeline, tmp_path, guidance_start=0.25, guidance_end=0.75)
    assert [step.evaluations_run for step in ran.steps] == [1, 1, 2, 2, 1, 1]
    assert ran.result.evaluations_run == 8


def test_a_preset_without_ratios_is_refused_before_anything_is_loaded(pipeline, tmp_path) -> None:
    request = GenerationRequest(
        preset="lite-t2v-5s-distilled", prompt="x", cache="magcache", out=str(tmp_path / "x.mp4")
    )
    with pytest.raises(UserError, match="cache"):
        pipeline.run(request)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, strong enough to be seen; with a trigger."""
    config = check_transformer(DEMO_FOLDER / "transformer")
    with torch.device("meta"):
        sizes = layer_sizes(DiffusionTransformer3D(config))
    attention = {name: size for name, size in sizes.items() if "to_query" in name}
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    return loras.save_peft(path, loras.random_pairs(attention, std=0.3), alpha=3.0, trigger="red ")


def test_a_lora_changes_the_latent_and_strength_zero_does_not(pipeline, tmp_path, lora) -> None:
    given = {"steps": 2, "guidance": 1.0}
    plain = Ran(pipeline, tmp_path, **given)
    off = Ran(pipeline, tmp_path, **given, loras=(LoraChoice(str(lora), 0.0),))
    acting = Ran(pipeline, tmp_path, **given, loras=(LoraChoice(str(lora)),))
    after = Ran(pipeline, tmp_path, **given)
    assert torch.equal(off.latent, plain.latent) and torch.equal(after.latent, plain.latent)
    assert not torch.equal(acting.latent, plain.latent)
    (notice,) = [text for text in acting.result.notices if "LoRA" in text]
    count = len(load_file(lora))
    assert f"style.safetensors: {count} of {count} tensors match" in notice


def test_a_saved_run_goes_on_with_its_lora_and_with_no_other(pipeline, tmp_path, lora) -> None:
    states = StateKeeper(
        tmp_path / "states", autosave=Autosave(every_minutes=None, every_steps=1), keep=STEPS
    )
    own = tmp_path / "own.safetensors"
    own.write_bytes(lora.read_bytes())
    ran = Ran(pipeline, tmp_path, steps=2, states=states, loras=(LoraChoice(str(own)),))
    path = next(tmp_path.glob("states/step-*1.safetensors"))
    (tmp_path / "latents.safetensors").unlink()
    pipeline.resume(path, out=tmp_path / "again.mp4", keep_paths=True)
    assert torch.equal(load_file(tmp_path / "latents.safetensors")["latents"], ran.latent)
    retrained = {name: tensor + 0.01 for name, tensor in load_file(own).items()}
    loras.save_file(retrained, own, {"trigger": "red "})
    with pytest.raises(UserError, match="lora"):
        pipeline.resume(path, out=tmp_path / "again.mp4")

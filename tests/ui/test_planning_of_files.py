"""The page plans with the very files that a form names: as the pipeline does, LoRAs and text encoder too."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky5 import plan_command
from kandinsky5.events import ignore
from kandinsky5.memory.budget import GB, Budget
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.lora import layer_sizes
from kandinsky5.pipeline import planning as of_worker
from kandinsky5.pipeline.accept import accept
from kandinsky5.pipeline.job import Listeners
from kandinsky5.pipeline.named_files import NamedFiles, describe_files
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, LoraChoice
from kandinsky5.ui import form, planning
from kandinsky5.ui.fields import fixed_defaults
from kandinsky5.ui.form_handlers import OUTLOOK_FIELDS
from kandinsky5.ui.model_files import files_told
from kandinsky5.ui.planning import PLAN_FIELDS, Outlook, Planner
from tests.support.deep_encoder import write_deep_encoder
from tests.support.loras import random_pairs, save_kohya
from tests.support.tiny_image_model import T2I, diffusers_layout

PRESET = "image-t2i"
LAYERS = 7
BUDGET = Budget.of_gb(None, 9)
RANK = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose text encoder is not the preset's."""
    folder = diffusers_layout(tmp_path_factory.mktemp("model"), T2I)
    shutil.rmtree(folder / "text_encoder")
    write_deep_encoder(folder / "text_encoder", LAYERS)
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.device("meta"):
        sizes = layer_sizes(DiffusionTransformer3D(T2I))
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    return save_kohya(path, random_pairs(sizes, RANK), alpha=1.0)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same budget for both sides, whatever this machine has."""
    monkeypatch.setattr(Planner, "_budget", lambda self, request, card: BUDGET)
    for module in (of_worker, plan_command):
        monkeypatch.setattr(module, "budget_for", lambda request: (BUDGET, ()))


class Worker:
    """Answers at once, as the worker's process would."""

    def describe(self, names: Any) -> dict[str, Any]:
        named = NamedFiles(names.preset, names.dit, names.model_dir, names.loras)
        return json.loads(json.dumps(describe_files(named)))


def of_page(model: Path, **changes: Any) -> Outlook:
    """What the page expects of a form that names this folder."""
    filled = {**fixed_defaults(), "preset": PRESET, "model_dir": str(model), **changes}
    filled |= {"width": 64, "height": 64, "steps": 2, "guidance": 3.0, "seconds": 0}
    named = {name: filled[name] for name in OUTLOOK_FIELDS}
    settings = form.settings_of({name: named[name] for name in PLAN_FIELDS}, PRESETS[PRESET])
    outlook = Planner().outlook(settings, (), files_told(Worker(), named))
    assert outlook is not None
    return outlook


def of_pipeline(model: Path, out: Path, **changes: Any):
    """The plan of the job that such a form queues."""
    values = {"preset": PRESET, "prompt": "a kite", "model_dir": str(model), "device": "cpu"}
    values |= {"width": 64, "height": 64, "steps": 2, "guidance": 3.0, **changes}
    request = GenerationRequest(**values)
    return accept(request, Listeners(ignore, lambda: False), out=out, models_dirs=()).plan


@pytest.mark.parametrize("strength", ["1", "-0,5", "0"])
def test_the_pages_plan_is_the_pipelines(model, lora, tmp_path, strength) -> None:
    row = {"lora_1": str(lora), "lora_1_strength": strength}
    choice = LoraChoice(str(lora), float(strength.replace(",", ".")))
    seen = of_page(model, **row)
    made = of_pipeline(model, tmp_path / "a.png", loras=(choice,))
    assert seen.plan.job == made.job
    assert (seen.plan.budget, seen.plan.stages, seen.plan.homes) == (
        made.budget,
        made.stages,
        made.homes,
    )
    assert seen.plan.job.models.text_encoder.layers == LAYERS


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_the_pages_plan_is_the_command_lines(model, lora, strength) -> None:
    typed = {"preset": PRESET, "model_dir": str(model), "width": 64, "height": 64, "steps": 2}
    typed |= {"guidance": 3.0, "loras": [{"path": str(lora), "strength": strength}]}
    document, text = plan_command.plan_of(typed)
    seen = of_page(model, lora_1=str(lora), lora_1_strength=f"{strength:g}").plan.to_dict()
    del document["notices"], seen["notices"]
    assert document == seen
    assert "tensors match" in text


def test_a_loras_memory_is_not_there_for_the_rest_and_said(model, lora) -> None:
    plain = of_page(model)
    one = of_page(model, lora_1=str(lora))
    both = of_page(model, lora_1=str(lora), lora_2=str(lora), lora_2_strength="2")
    with torch.device("meta"):
        sizes = layer_sizes(DiffusionTransformer3D(T2I)).values()
    held = 4 * RANK * sum(outputs + inputs for outputs, inputs in sizes)
    left = [seen.plan.budget.ram_bytes for seen in (plain, one, both)]
    assert left == [BUDGET.ram_bytes - count * held for count in range(3)]
    assert planning.BESIDE_LORAS.format(f"{held / 1e6:.0f} MB") in one.notices
    assert plain.notices == ()


def test_an_encoder_that_cannot_write_is_not_planned_to(model, tmp_path) -> None:
    mute = tmp_path / "mute"
    shutil.copytree(model, mute)
    config = mute / "text_encoder" / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values["tie_word_embeddings"] = values["text_config"]["tie_word_embeddings"] = False
    config.write_text(json.dumps(values), encoding="utf-8")
    for folder, writes in ((model, True), (mute, False)):
        seen, made = of_page(folder).plan, of_pipeline(folder, tmp_path / "a.png")
        assert seen.job == made.job
        assert seen.job.expand is writes


def test_a_folder_whose_encoder_cannot_be_told_is_planned_with_the_presets(model, tmp_path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "text_encoder" / "model.safetensors").write_bytes(b"version https://git-lfs")
    seen = of_page(broken)
    assert seen.plan.job.models.text_encoder.name != "custom"


def test_the_least_budget_there_is_remains() -> None:
    for budget, name in ((Budget.of_gb(24, 64), "vram"), (Budget.of_gb(None, 64), "ram")):
        left = budget.beside(1000 * GB)
        assert getattr(left, f"{name}_bytes") > 0
        least = {f"{name}_bytes": getattr(left, f"{name}_bytes")}
        assert left == dataclasses.replace(budget, **least)
        assert budget.beside(0) == budget

"""Streamed text encoders: every layer once a pass, none behind the last one, in the memory planned for it."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from kandinsky5.events import ignore
from kandinsky5.memory import text_stages
from kandinsky5.memory.budget import Budget
from kandinsky5.memory.streamer import Streamer
from kandinsky5.memory.text_stages import EncoderUse, TextPlan, text_options
from kandinsky5.model.facts import text_encoder_facts
from kandinsky5.model.text_loading import EncoderReader
from kandinsky5.pipeline import encoders, expand, models
from kandinsky5.pipeline.accept import accept
from kandinsky5.pipeline.embedding_cache import EmbeddingCache
from kandinsky5.pipeline.job import Listeners, PaintingJob
from kandinsky5.pipeline.models import Models
from kandinsky5.pipeline.planning import plan_of
from kandinsky5.pipeline.prompting import encode_text, expand_text
from kandinsky5.request import GenerationRequest
from kandinsky5.templates import PROMPT_TEMPLATES
from tests.pipeline.test_encoders import demo_files, encoded
from tests.support.deep_encoder import write_deep_encoder
from tests.support.tiny_image_model import T2I, diffusers_layout

CPU = torch.device("cpu")
DEPTH = 7
DISK = EncoderUse("fp32", "disk", text_stages.SLOTS, text_stages.RING)
PINNED = EncoderUse("fp32", "pinned", text_stages.SLOTS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny image model whose text encoder has :data:`DEPTH` layers."""
    folder = diffusers_layout(tmp_path_factory.mktemp("model"), T2I)
    shutil.rmtree(folder / "text_encoder")
    write_deep_encoder(folder / "text_encoder", DEPTH)
    return folder


@pytest.fixture
def layer_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor of the layers has been read from the file."""
    found: Counter[str] = Counter()
    read_into = EncoderReader.read_into

    def noting(self, targets) -> None:
        found.update(name for name in targets if name.startswith(encoders.LAYERS))
        read_into(self, targets)

    monkeypatch.setattr(EncoderReader, "read_into", noting)
    return found


def request_for(model: Path, **values: object) -> GenerationRequest:
    fixed = {"preset": "image-t2i", "prompt": "a red circle", "device": "cpu", "dtype": "fp32"}
    small = {"width": 64, "height": 64, "steps": 1, "seed": 1, "model_dir": str(model)}
    return GenerationRequest(**{**fixed, **small, **values})


def job_with(model: Path, text: TextPlan, **values: object) -> PaintingJob:
    """A job whose plan is to use the text encoder so."""
    to, out = Listeners(ignore, lambda: False), model.parent / "a.png"
    job = accept(request_for(model, **values), to, out=out, models_dirs=())
    job.plan = dataclasses.replace(job.plan, text=text)
    return job


def copied_bytes(job: PaintingJob) -> int:
    return sum(peaks.h2d_bytes for peaks in job.peaks.values())


def layer_bytes(model: Path) -> int:
    """Of all layers, in float32."""
    return DEPTH * encoder_job(model).models.text_encoder.layer_bytes("fp32")


def encoder_job(model: Path):
    """What a plan for this model is made of."""
    encoder = text_encoder_facts(model / "text_encoder")
    where = {"device": CPU, "dtype": torch.float32, "text_encoder": encoder}
    return plan_of(request_for(model, guidance=1.0, shift=1.0), None, "bf16", **where).job


@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 1), (3.0, 2)])
def test_encoding_reads_every_layer_once_a_prompt_and_none_behind_the_last(
    model, layer_reads, guidance, passes
) -> None:
    kept = Models()
    for job in [job_with(model, TextPlan(DISK), guidance=guidance) for _ in range(2)]:
        layer_reads.clear()
        encode_text(job, kept, EmbeddingCache(None))
        assert len({name.split(".")[1] for name in layer_reads}) == DEPTH
        assert set(layer_reads.values()) == {passes}
        assert copied_bytes(job) == passes * layer_bytes(model)
    kept.release()


def test_pinned_layers_are_read_once_and_copied_once_a_prompt(model, layer_reads) -> None:
    kept = Models()
    for _ in range(2):
        job = job_with(model, TextPlan(PINNED), guidance=3.0)
        encode_text(job, kept, EmbeddingCache(None))
        assert copied_bytes(job) == 2 * layer_bytes(model)
    assert set(layer_reads.values()) == {1}
    kept.release()


def test_an_answer_of_full_length_reads_every_layer_once_a_token(
    model, layer_reads, monkeypatch
) -> None:
    tokens = 5
    for module in (expand, models):
        monkeypatch.setattr(module, "EXPANSION_TOKENS", tokens)
    job, kept = job_with(model, TextPlan(DISK, DISK), expand=True), Models()
    expand_text(job, kept, EmbeddingCache(None))
    assert set(layer_reads.values()) == {tokens}
    assert copied_bytes(job) == tokens * layer_bytes(model)
    layer_reads.clear()
    encode_text(
        job, kept, EmbeddingCache(None)
    )  # with the same encoders, of which fewer is expected
    assert set(layer_reads.values()) == {job.plan.job.branches}
    kept.release()


def test_a_use_that_is_told_no_end_reads_on_for_the_next_pass(model, layer_reads) -> None:
    """What the tests above would see if nobody told."""
    files = dataclasses.replace(demo_files(), text_encoder=model / "text_encoder")
    made = encoders.text_tenant(files, DISK, device=CPU, dtype=torch.float32, home="disk")
    encoded(made)
    made.close()
    assert max(layer_reads.values()) == 2


@pytest.mark.parametrize("source", ["pinned", "disk"])
def test_slots_and_layers_in_main_memory_are_as_large_as_planned(
    model, monkeypatch, source
) -> None:
    streamers = []

    def noting(*arguments, **options) -> Streamer:
        streamers.append(Streamer(*arguments, **options))
        return streamers[-1]

    monkeypatch.setattr(encoders, "Streamer", noting)
    files = dataclasses.replace(demo_files(), text_encoder=model / "text_encoder")
    options = text_options(encoder_job(model), Budget.of_gb(8, 8))
    option = next(option for option in options if option.settings.encode.source == source)
    tenant = encoders.text_tenant(
        files, option.settings.encode, device=CPU, dtype=torch.float32, home="disk"
    )
    template = PROMPT_TEMPLATES["demo"]
    tenant.enter().encode("a red circle", "a red circle", template, max_tokens=64)
    (stage,) = option.stages
    planned = {part.name: part.size_bytes for part in (*stage.ram, *stage.vram)}
    assert tenant.host_bytes == planned["layers, pinned"]
    assert streamers[0].slot_bytes == planned["slots"]
    tenant.close()

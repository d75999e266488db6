"""NF4 for the text encoder as a job uses it: asked for, refused, streamed, and let go again."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky5.errors import OutOfMemory, UserError
from kandinsky5.events import ignore
from kandinsky5.memory import free, text_stages
from kandinsky5.memory.budget import Budget
from kandinsky5.memory.text_stages import EncoderUse, TextPlan
from kandinsky5.model import text_nf4
from kandinsky5.model.text_generation import Writer
from kandinsky5.model.text_nf4 import Nf4Linear
from kandinsky5.output.tensor_store import TensorStore
from kandinsky5.pipeline import trusted_text
from kandinsky5.pipeline.accept import accept
from kandinsky5.pipeline.embedding_cache import EmbeddingCache, encoding_key, expansion_key
from kandinsky5.pipeline.encoders import text_tenant
from kandinsky5.pipeline.job import Listeners, PaintingJob
from kandinsky5.pipeline.models import TEXT, WRITER, Models
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.pipeline.planning import changes, plan_of
from kandinsky5.pipeline.prompting import encode_text, expand_text
from tests.pipeline.test_encoders import demo_files, encoded
from tests.support.demo_runs import quick
from tests.support.tiny_image_model import T2I, diffusers_layout

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NF4 = EncoderUse("nf4", "resident")


@pytest.fixture(scope="module")
def library() -> None:
    pytest.importorskip("bitsandbytes")


def tenant(weights: str, source: str, home: str) -> Any:
    use = EncoderUse(weights, source, slots=1)
    return text_tenant(demo_files(), use, device=CPU, dtype=torch.float32, home=home)


def accepted(tmp_path: Path, **values: Any) -> PaintingJob:
    to = Listeners(ignore, lambda: False)
    return accept(quick(**values), to, out=tmp_path / "a.mp4", models_dirs=())


@pytest.mark.parametrize(("source", "home"), [("pinned", "disk"), ("pinned", "ram")])
def test_streamed_layers_in_nf4_give_what_resident_ones_give(
    library: None, source: str, home: str
) -> None:
    whole, other = tenant("nf4", "resident", "device"), tenant("nf4", source, home)
    wanted = encoded(whole)
    assert torch.equal(encoded(other), wanted)
    assert torch.equal(encoded(other), wanted)
    for made in (whole, other):
        made.close()


def test_nf4_changes_what_is_encoded_a_little(library: None) -> None:
    plain, nf4 = (encoded(tenant(weights, "resident", "disk")) for weights in ("bf16", "nf4"))
    assert not torch.equal(plain, nf4)
    assert torch.nn.functional.cosine_similarity(plain, nf4, dim=0) > 0.95


def test_a_job_asked_to_encode_in_nf4_does(library: None, tmp_path: Path) -> None:
    job = accepted(tmp_path, text_weights="nf4")
    assert job.plan.text.encode.weights == "nf4"
    models = Models()
    with models.text_encoders(job) as encoders:
        kinds = [type(module) for module in encoders.modules[0].modules()]
    assert kinds.count(Nf4Linear) == 7 * 2
    found = encode_text(job, models, EmbeddingCache(None)).positive
    plain = encode_text(accepted(tmp_path), Models(), EmbeddingCache(None)).positive
    assert found.text.shape == plain.text.shape
    assert not torch.equal(found.text, plain.text)


def test_what_is_kept_of_a_prompt_is_kept_for_one_format(library: None, tmp_path: Path) -> None:
    plain, nf4 = accepted(tmp_path), accepted(tmp_path, text_weights="nf4")
    texts = ("a", "b")
    assert encoding_key(plain, *texts, None) != encoding_key(nf4, *texts, None)
    writing = accepted(tmp_path)
    writing.plan = dataclasses.replace(plain.plan, text=TextPlan(plain.plan.text.encode, NF4))
    assert expansion_key(plain, None) != expansion_key(writing, None)


def test_without_the_library_nf4_is_refused_at_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for function in (text_nf4.nf4_problem, text_nf4._library):
        function.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(UserError) as refusal:
            accepted(tmp_path, text_weights="nf4")
        assert free.text_formats() == ("bf16",)
        assert accepted(tmp_path).plan.text.encode.weights == "fp32"
    for function in (text_nf4.nf4_problem, text_nf4._library):
        function.cache_clear()
    assert refusal.value.field == "text_weights"
    assert "pip install bitsandbytes" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_library_that_fails_its_test_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that bf16 does not fit whole, without a card."""
    from kandinsky5.pipeline import planning

    asked: list[torch.device] = []

    def wrong(device: torch.device) -> str:
        asked.append(device)
        return "bitsandbytes gives wrong numbers"

    monkeypatch.setattr(planning, "budget_for", lambda request: (Budget.of_gb(10, 64), ()))
    monkeypatch.setattr(planning, "text_formats", lambda: ("bf16", "nf4"))
    monkeypatch.setattr(trusted_text, "nf4_problem", lambda device: None)
    request = dataclasses.replace(
        quick(), preset="pro-t2v-5s-sd", width=768, height=512, seconds=5.0, expand=True
    )
    where = {"device": GPU, "dtype": torch.bfloat16}
    trusted = plan_of(request, None, "bf16", **where)
    assert trusted.text.expand == NF4
    monkeypatch.setattr(trusted_text, "nf4_problem", wrong)
    plan = plan_of(request, None, "bf16", **where)
    assert plan.text.expand is None
    assert "NF4 is not used: bitsandbytes gives wrong numbers" in plan.notices
    assert any("not expanded" in line for line in plan.notices)
    assert asked == [GPU]
    plan_of(dataclasses.replace(request, expand=False), None, "bf16", **where)
    assert asked == [GPU], "nothing is imported where NF4 would not be used"
    assert "the prompt as it is" in changes(trusted, plan)


def test_no_memory_for_the_test_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(device: torch.device) -> str | None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trusted_text, "nf4_problem", no_room)
    with pytest.raises(OutOfMemory, match="during the self-test of NF4"):
        accepted(tmp_path, text_weights="nf4")


def test_what_writes_is_let_go_and_what_encodes_waits(
    library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "answer", lambda self, *_, **__: iter(["A red circle rolls."]))
    job, models = accepted(tmp_path), Models()
    job.plan = dataclasses.replace(job.plan, text=TextPlan(job.plan.text.encode, NF4))
    with models.text_encoders(job):
        pass
    waiting = models._models.held(TEXT)
    expand_text(job, models, EmbeddingCache(TensorStore(tmp_path)))
    assert job.expanded_prompt == "A red circle rolls."
    assert models._models.held(WRITER) is None
    assert models._models.held(TEXT) is waiting is not None


@pytest.fixture
def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A model that could write, where no expansion is worth its time."""
    monkeypatch.setattr(text_stages, "MAX_EXPANSION_S", -1.0)
    model = diffusers_layout(tmp_path / "model", T2I)
    size = {"width": 64, "height": 64, "steps": 1, "guidance": 1.0, "seconds": None}
    return {"preset": "image-t2i", "model_dir": str(model), "dtype": "fp32", **size}


def test_a_prompt_that_would_take_too_long_to_expand_stays_and_that_is_said(
    tmp_path: Path, impatient: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "answer", lambda *_, **__: pytest.fail("it was asked to write"))
    to = Listeners(ignore, lambda: False)
    request = quick(**impatient)
    job = accept(request, to, out=tmp_path / "a.png", models_dirs=())
    assert job.plan.job.models.text_encoder.hidden == 128, "planned by the file's own dimensions"
    expand_text(job, Models(), EmbeddingCache(None))
    assert job.expanded_prompt is None
    assert [line for line in job.notices if "the prompt is not expanded" in line]
    with pytest.raises(UserError, match="not expanded") as refusal:
        Pipeline().expand(request, out=tmp_path / "a.png")
    assert refusal.value.field == "expand"

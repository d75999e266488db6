"""Which attention a job computes with: its preset's, the user's, or what this machine can do instead."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from demo_runs import keeper, quick, ran

from kandinsky5.errors import UserError
from kandinsky5.model import engines
from kandinsky5.model.attention import NablaParams, sdpa
from kandinsky5.output.run_state import load_run_state
from kandinsky5.output.state import load_latents
from kandinsky5.pipeline import attending
from kandinsky5.pipeline.attending import Attending, attending_of
from kandinsky5.pipeline.painting import Painted
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.request import GenerationRequest

CPU = torch.device("cpu")


def attending_to(
    *, before: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32, **values: Any
) -> Attending:
    request = GenerationRequest(**{"preset": "pro-t2v-5s-hd", "prompt": "x", **values})
    return attending_of(request, device=CPU, dtype=dtype, head_dim=64, before=before)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """flash_attn stands in this process as if the CPU were a card, its numbers a little other ones."""

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, v) * 1.005

    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)  # other libraries look for it, too
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(engines, "GPU", "cpu")
    engines.examine.cache_clear()
    yield
    engines.examine.cache_clear()


def test_a_presets_nabla_is_used_with_the_users_settings() -> None:
    assert attending_to().sparse == NablaParams(0.8, 11, 3, 3)
    assert attending_to(nabla_p=0.6, nabla_wt=3).sparse == NablaParams(0.6, 3, 3, 3)
    assert attending_to(attention="nabla", preset="demo-t2v").sparse == NablaParams(0.9, 11, 3, 3)
    assert attending_to().notices == attending_to(preset="lite-t2v-5s-sft").notices == ()
    assert attending_to(preset="lite-t2v-5s-sft") == Attending("sdpa", sdpa)


def test_full_attention_in_nablas_place_is_said() -> None:
    found = attending_to(attention="sdpa", nabla_p=0.5)
    assert found.sparse is None
    assert "made for sparse attention" in found.notices[0]
    assert "nabla_p: without effect" in found.notices[1]


def test_where_nabla_fails_a_preset_takes_full_attention_and_a_wish_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attending, "nabla_problem", lambda *_: "flex attention failed: no triton")
    found = attending_to()
    assert found.sparse is None
    assert "no triton" in found.notices[0] and "slower" in found.notices[0]
    request = GenerationRequest(preset="pro-t2v-5s-hd", prompt="x")
    assert found.planned(request).attention == "sdpa"
    assert Attending(sparse=NablaParams(0.8, 11, 3, 3)).planned(request) is request
    with pytest.raises(UserError, match="no triton; choose sdpa"):
        attending_to(attention="nabla")


def test_an_engine_that_is_not_here_ends_the_job_before_it_begins(tmp_path: Path) -> None:
    if engines.examine("flash2", torch.device("cpu")).installed:
        pytest.skip("flash_attn is installed here")
    request = GenerationRequest(prompt="a red circle", attention="flash2", device="cpu")
    with pytest.raises(UserError, match="pip install flash-attn") as caught:
        Pipeline().run(request, out=tmp_path / "a.mp4")
    assert caught.value.field == "attention"
    assert not list(tmp_path.iterdir())


def test_the_demo_runs_with_nabla_and_all_kept_is_full_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "_paint", lambda *_: Painted(5, 128, 128))
    everything = {"attention": "nabla", "nabla_p": 1.0}
    few = {"attention": "nabla", "nabla_p": 0.3, "nabla_wt": 1}
    pipeline, latents = Pipeline(), []
    for number, values in enumerate((everything, {"attention": "sdpa"}, few)):
        kept = tmp_path / f"{number}.safetensors"
        request = GenerationRequest(
            prompt="a red circle moves right on a dark background",
            width=128,
            height=128,
            seconds=1 / 6,
            steps=1,
            guidance=1.0,
            seed=3,
            device="cpu",
            save_latents=str(kept),
            **values,
        )
        result = pipeline.run(request, out=tmp_path / f"{number}.mp4")
        assert (result.width, result.height) == (128, 128)
        latents.append(load_latents(kept)[0])
    assert (latents[0] - latents[1]).abs().max() <= 1e-4
    assert (latents[2] - latents[1]).abs().max() > 1e-3


# Runs that are gone on with


@pytest.mark.usefixtures("flash")
def test_a_run_goes_on_with_the_engine_it_was_begun_with_not_a_better_one() -> None:
    lite = {"preset": "lite-t2v-5s-sft", "dtype": torch.bfloat16}
    begun = attending_to(**lite)
    assert begun.facts == {"engine": "flash2", "nabla": False}
    assert attending_to(**lite, before=begun.facts).name == "flash2"
    found = attending_to(**lite, before={"engine": "sdpa", "nabla": False})
    assert (found.name, found.notices) == ("sdpa", ())
    for nonsense in ({}, {"engine": "rm"}, {"engine": ["flash2"], "nabla": 3}):
        assert attending_to(**lite, before=nonsense).name == "flash2"


def test_an_engine_that_is_gone_is_said_when_a_run_goes_on() -> None:
    if engines.examine("flash2", CPU).installed:
        pytest.skip("flash_attn is installed here")
    found = attending_to(preset="lite-t2v-5s-sft", before={"engine": "flash2", "nabla": False})
    assert found.name == "sdpa"
    (notice,) = found.notices
    assert "begun with attention flash2 and goes on with sdpa" in notice
    assert "is not installed" in notice
    with pytest.raises(UserError, match="choose auto or sdpa"):
        attending_to(
            preset="lite-t2v-5s-sft",
            attention="flash2",
            before={"engine": "flash2", "nabla": False},
        )


def test_a_run_begun_with_full_attention_in_nablas_place_goes_on_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = attending_to(before={"engine": "sdpa", "nabla": False})
    assert found.sparse is None and "as this run was begun" in found.notices[0]
    assert attending_to(before={"engine": "sdpa", "nabla": True}) == attending_to()
    monkeypatch.setattr(attending, "nabla_problem", lambda *_: "flex attention failed: no triton")
    lost = attending_to(before={"engine": "sdpa", "nabla": True})
    assert lost.sparse is None and "not what this run was begun with" in lost.notices[0]


@pytest.mark.usefixtures("flash")
def test_a_saved_run_carries_its_engine_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "_paint", lambda *_: Painted(5, 64, 64))
    request = quick(dtype="bf16", device="cpu", steps=2)
    states = keeper(tmp_path / "states", every_steps=1)
    whole = ran(tmp_path / "whole", request, states=states)
    (path,) = (tmp_path / "states").glob("step-*1.safetensors")
    assert load_run_state(path).facts["attention"] == {"engine": "flash2", "nabla": False}
    begun = whole.latents
    (tmp_path / "whole" / "latents.safetensors").unlink()
    assert torch.equal(ran(tmp_path / "whole", resume=path).latents, begun)
    plain = ran(tmp_path / "plain", quick(dtype="bf16", device="cpu", steps=2, attention="sdpa"))
    assert not torch.equal(plain.latents, begun)
    monkeypatch.delitem(sys.modules, "flash_attn")
    engines.examine.cache_clear()
    resumed = ran(tmp_path / "resumed", resume=path)
    assert any("begun with attention flash2" in notice for notice in resumed.notices)

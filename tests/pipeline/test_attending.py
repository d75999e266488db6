"""Which attention a job computes with: its preset's, the user's, or what this machine can do instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky5.errors import UserError
from kandinsky5.model import engines
from kandinsky5.model.attention import NablaParams, sdpa
from kandinsky5.output.state import load_latents
from kandinsky5.pipeline import attending
from kandinsky5.pipeline.attending import Attending, attending_of
from kandinsky5.pipeline.painting import Painted
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.request import GenerationRequest


def attending_to(**values: Any) -> Attending:
    request = GenerationRequest(**{"preset": "pro-t2v-5s-hd", "prompt": "x", **values})
    return attending_of(request, device=torch.device("cpu"), dtype=torch.float32, head_dim=64)


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

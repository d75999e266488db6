"""A saved state behind its last step is decoded to the very result, by the VAE alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from demo_runs import keeper, picture_request, quick, ran, video_of

from kandinsky5.errors import UserError
from kandinsky5.output.state import load_latents
from kandinsky5.pipeline import accept
from kandinsky5.pipeline.decodable import read_decodable
from kandinsky5.pipeline.pipeline import Pipeline


@pytest.mark.parametrize("is_picture", [False, True], ids=["t2v", "i2v"])
def test_it_comes_to_the_latents_and_the_video_of_its_run(
    tmp_path: Path, is_picture: bool, monkeypatch
) -> None:
    request = picture_request(tmp_path, steps=2) if is_picture else quick(steps=2)
    states = keeper(tmp_path / "states", every_steps=1)
    pipeline = Pipeline()
    run = ran(tmp_path / "whole", request, pipeline=pipeline, states=states)
    state = states.newest()
    assert state is not None and state.name == "step-00002.safetensors"
    latents, values = read_decodable(state)
    assert latents.equal(run.latents) and values["prompt"] == request.prompt
    assert values["out"] is None and values["save_latents"] is None
    monkeypatch.setattr(accept, "find_model_files", None)
    pipeline.decode(state, out=tmp_path / "again.mp4")
    assert video_of(tmp_path / "again.mp4") == video_of(tmp_path / "whole" / "out.mp4")
    unfinished = state.with_name("step-00001.safetensors")
    with pytest.raises(UserError, match="1 of 2 steps left: resume it"):
        read_decodable(unfinished)


def test_latents_are_read_as_before_and_anything_else_is_refused_as_no_latents(tmp_path) -> None:
    run = ran(tmp_path, quick(steps=1))
    kept = tmp_path / "latents.safetensors"
    found, values = read_decodable(kept)
    assert found.equal(run.latents) and values == load_latents(kept)[1]
    kept.write_bytes(kept.read_bytes()[:-4])
    with pytest.raises(UserError, match="--save-latents wrote"):
        read_decodable(kept)

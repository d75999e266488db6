"""A prompt that is repeated loads no text encoder, and comes to the same bits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from kandinsky5.events import ignore
from kandinsky5.output.state import load_latents
from kandinsky5.output.tensor_store import TensorStore
from kandinsky5.pipeline.accept import accept
from kandinsky5.pipeline.embedding_cache import EmbeddingCache, default_folder
from kandinsky5.pipeline.job import Listeners
from kandinsky5.pipeline.models import Models
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.pipeline.prompting import encode_text
from kandinsky5.presets import DEMO_FOLDER
from tests.support.demo_runs import quick

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.uint8)}


@pytest.fixture
def store(tmp_path: Path) -> TensorStore:
    return TensorStore(tmp_path / "kept")


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows whenever a job takes the text encoders."""
    taken: list[str] = []
    text_encoders = Models.text_encoders

    def noting(self, job, use=None):
        taken.append("text encoders")
        return text_encoders(self, job, use)

    monkeypatch.setattr(Models, "text_encoders", noting)
    return taken


def run(store: TensorStore | None, out: Path, **values: object) -> tuple[torch.Tensor, list[str]]:
    """What a job's prompts come to, as one tensor, and what is said of them."""
    to = Listeners(ignore, lambda: False)
    job = accept(quick(**values), to, out=out, models_dirs=())
    guidance = encode_text(job, Models(), EmbeddingCache(store))
    parts = [part for c in guidance.conditionings for part in (c.text, c.pooled)]
    return torch.cat([part.flatten() for part in parts]), job.notices


def test_a_repeated_prompt_loads_no_encoder_and_gives_the_same_bits(tmp_path, store, lent) -> None:
    without, _ = run(None, tmp_path / "0.mp4", guidance=2.0)
    first, _ = run(store, tmp_path / "1.mp4", guidance=2.0)
    assert len(lent) == 2
    again, _ = run(store, tmp_path / "2.mp4", guidance=2.0)
    assert len(lent) == 2
    assert torch.equal(first, without)
    assert torch.equal(again, without)


def test_a_pipeline_with_a_cache_makes_the_same_video_without_its_encoders(
    tmp_path, store, lent
) -> None:
    latents, values = [], {"steps": 1, "seconds": 1 / 6, "guidance": 1.0}
    for name, embeddings in (
        ("0", None),
        ("1", EmbeddingCache(store)),
        ("2", EmbeddingCache(store)),
    ):
        file = tmp_path / f"{name}.safetensors"
        pipeline = Pipeline(embeddings=embeddings)
        pipeline.run(quick(save_latents=str(file), **values), out=tmp_path / f"{name}.mp4")
        latents.append(load_latents(file)[0])
    assert len(lent) == 2
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(latents[1], latents[2])


def test_another_seed_is_the_same_prompt(tmp_path, store, lent) -> None:
    run(store, tmp_path / "1.mp4", seed=1)
    run(store, tmp_path / "2.mp4", seed=2)
    assert len(lent) == 1


@pytest.mark.parametrize(
    "other",
    [{"prompt": "a blue square"}, {"clip_prompt": "blue"}, {"guidance": 2.0}],
)
def test_what_changes_the_conditioning_is_encoded_anew(tmp_path, store, lent, other) -> None:
    values = {"guidance": 1.0}
    run(store, tmp_path / "1.mp4", **values)
    run(store, tmp_path / "2.mp4", **{**values, **other})
    assert len(lent) == 2


def test_a_negative_prompt_counts_only_with_guidance(tmp_path, store, lent) -> None:
    for number, guidance in enumerate((1.0, 2.0)):
        for negative in ("", "grey"):
            name = f"{number}{negative}.mp4"
            run(store, tmp_path / name, guidance=guidance, negative_prompt=negative)
    assert len(lent) == 3


def test_encoders_that_were_replaced_on_disk_encode_anew(tmp_path, store, lent) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO_FOLDER, model)
    run(store, tmp_path / "1.mp4", model_dir=str(model))
    os.utime(model / "text_encoder" / "model.safetensors", (1, 1))
    run(store, tmp_path / "2.mp4", model_dir=str(model))
    assert len(lent) == 2


def test_a_prompt_that_is_cut_says_so_each_time(tmp_path, store, lent) -> None:
    said = [run(store, tmp_path / f"{n}.mp4", prompt="red circle " * 200)[1] for n in range(2)]
    assert len(lent) == 1
    assert said[0] == said[1]
    assert any("not read" in line for line in said[0])


def test_a_broken_file_is_made_anew(tmp_path, store, lent) -> None:
    wanted, _ = run(store, tmp_path / "1.mp4")
    (kept,) = store.folder.iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    again, _ = run(store, tmp_path / "2.mp4")
    run(store, tmp_path / "3.mp4")
    assert len(lent) == 2
    assert torch.equal(again, wanted)


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_cache(
    tmp_path, lent, caplog
) -> None:
    (tmp_path / "file").write_text("no folder")
    store = TensorStore(tmp_path / "file" / "kept")
    run(store, tmp_path / "1.mp4")
    run(store, tmp_path / "2.mp4")
    assert len(lent) == 2
    assert "nothing is kept" in caplog.text


def test_a_store_gives_back_what_it_was_given(store) -> None:
    assert store.load("k") is None
    store.save("k", TENSORS)
    found = store.load("k")
    assert found is not None
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert [path.name for path in store.folder.iterdir()] == ["k.safetensors"]


def broken(kept: bytes) -> dict[str, bytes]:
    flipped = bytearray(kept)
    flipped[-1] ^= 1
    return {
        "empty": b"",
        "cut": kept[:-1],
        "longer": kept + b"\0",
        "a bit flipped": bytes(flipped),
        "another key": kept.replace(b'"k"', b'"j"'),
        "another shape": kept.replace(b"[2,3]", b"[3,2]"),
        "a header of 10 GB": (10**10).to_bytes(8, "little") + kept[8:],
        "a pickle": b"\x80\x04." + bytes(64),
        "no JSON": kept[:8] + b"x" + kept[9:],
    }


@pytest.mark.parametrize("way", broken(b"\0" * 16))
def test_a_file_that_is_not_as_it_was_kept_counts_as_not_there(store, way) -> None:
    store.save("k", TENSORS)
    path = store.folder / "k.safetensors"
    wrong = broken(path.read_bytes())[way]
    assert wrong != path.read_bytes()
    path.write_bytes(wrong)
    assert store.load("k") is None
    store.save("k", TENSORS)
    assert store.load("k") is not None


def test_the_least_recently_used_go_when_it_is_full(tmp_path) -> None:
    size = 4000
    store = TensorStore(tmp_path, max_bytes=3 * size)
    for number, key in enumerate("abc"):
        store.save(key, {"t": torch.zeros(800)})
        os.utime(tmp_path / f"{key}.safetensors", (number, number))
    store.load("a")
    store.save("d", {"t": torch.zeros(800)})
    assert {path.stem for path in tmp_path.iterdir()} == {"c", "a", "d"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * size


def test_what_is_larger_than_the_store_is_not_kept(tmp_path) -> None:
    store = TensorStore(tmp_path / "kept", max_bytes=100)
    store.save("k", {"t": torch.zeros(100)})
    assert store.load("k") is None


def test_the_folder_follows_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/k1/embeddings")

"""A checkpoint becomes another format: whole, the same each time, or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_transformer import (
    CONFIG,
    LAYER,
    comfy_fp8,
    community_int8,
    save,
    sqnr_db,
    stored,
    unscaled_fp8,
    weights,
)

from kandinsky5.conversion.convert import convert
from kandinsky5.conversion.part import part_of
from kandinsky5.conversion.verify import verify
from kandinsky5.errors import CheckpointError, K1Error, UserError
from kandinsky5.model.dit import DiTConfig
from kandinsky5.model.inspect import inspect_file
from kandinsky5.model.loading import check_transformer
from kandinsky5.model.weights import is_quantised_layer
from kandinsky5.output.atomic import DiskFull


@pytest.fixture
def source(tmp_path):
    metadata = {"format": "pt", "trigger": "a kite", "config": json.dumps({"visual_cond": True})}
    return save(tmp_path / "dit.safetensors", weights(dtype=torch.bfloat16), metadata)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new" / "int8.safetensors"


def names_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_int8_holds_quantised_layers_and_the_rest_as_it_was(source, out):
    done = convert(source, out, "int8")
    assert (done.output, done.size_bytes) == (out, out.stat().st_size)
    assert (done.resumed_at, done.converted) == (0, 26)
    made, true = load_file(out), load_file(source)
    assert len(made) == done.tensors == len(true) + 26
    for name, tensor in true.items():
        if is_quantised_layer(name):
            assert made[name].dtype == torch.int8
            assert made[f"{name}_scales"].shape == (tensor.shape[0], 1)
        else:
            assert torch.equal(made[name], tensor) and made[name].dtype == tensor.dtype
    assert names_in(out.parent) == {out.name}


def test_inspect_and_the_reader_know_what_it_is(source, out):
    convert(source, out, "int8")
    before, after = inspect_file(source), inspect_file(out)
    assert (after.kind, after.quantization, after.problems) == ("dit", "int8", ())
    assert (after.parameters, after.config) == (before.parameters, before.config)
    assert check_transformer(out) == CONFIG


def test_the_header_says_where_it_comes_from_and_keeps_what_was_there(source, out):
    from kandinsky5.model.checkpoint import Checkpoint

    convert(source, out, "int8")
    with Checkpoint(source) as before, Checkpoint(out) as after:
        metadata = after.metadata
        assert metadata["k1_source_header_sha256"] == before.header_sha256
    assert (metadata["k1_format"], metadata["k1_version"]) == ("k1-int8", "1")
    assert json.loads(metadata["k1_scheme"])["group"] == 1024
    assert metadata["trigger"] == "a kite"
    assert str(source.parent) not in json.dumps(metadata)


def test_the_same_source_gives_the_same_bytes_under_any_name(source, out, tmp_path, monkeypatch):
    convert(source, out, "int8")
    moved = shutil.copy(source, tmp_path / "copy.safetensors")
    monkeypatch.setattr("kandinsky5.model.recipes.CHUNK_VALUES", 300)
    convert(tmp_path / moved, tmp_path / "again.safetensors", "int8")
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()


@pytest.mark.parametrize("store", [community_int8, comfy_fp8, unscaled_fp8])
def test_quantised_files_become_bf16(tmp_path, store):
    before = save(tmp_path / "before.safetensors", stored(store, weights(dtype=torch.bfloat16)))
    convert(before, tmp_path / "after.safetensors", "bf16")
    made = load_file(tmp_path / "after.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    assert made.keys() == weights().keys()
    assert sqnr_db(weights()[f"{LAYER}.weight"], made[f"{LAYER}.weight"].float()) > 28
    assert inspect_file(tmp_path / "after.safetensors").quantization == "bf16"


def test_own_int8_becomes_bf16_and_says_no_more_that_it_is_int8(source, out, tmp_path):
    convert(source, out, "int8")
    convert(out, tmp_path / "back.safetensors", "bf16")
    report = inspect_file(tmp_path / "back.safetensors")
    assert (report.quantization, report.problems) == ("bf16", ())
    assert min(verify(source, tmp_path / "back.safetensors").sqnr_db.values()) > 38


def test_float32_becomes_bf16_save_where_it_matters(tmp_path):
    before = save(tmp_path / "before.safetensors", weights())
    convert(before, tmp_path / "after.safetensors", "bf16")
    for name, tensor in load_file(tmp_path / "after.safetensors").items():
        kept = name.startswith("time_embeddings.") or "modulation." in name or "norm." in name
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name


def test_fp8_becomes_int8(tmp_path):
    before = save(tmp_path / "before.safetensors", stored(comfy_fp8, weights()))
    convert(before, tmp_path / "after.safetensors", "int8")
    assert inspect_file(tmp_path / "after.safetensors").quantization == "int8"
    assert min(verify(before, tmp_path / "after.safetensors").sqnr_db.values()) > 38


def test_shards_under_a_prefix_become_one_file_without_it(source, out, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    tensors = {f"diffusion_model.{n}": t for n, t in load_file(source).items()}
    where = {name: names[i % 2] for i, name in enumerate(tensors)}
    for shard in names:
        save(folder / shard, {n: t for n, t in tensors.items() if where[n] == shard})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    convert(source, out, "int8")
    convert(folder, tmp_path / "joined.safetensors", "int8")
    assert load_file(tmp_path / "joined.safetensors").keys() == load_file(out).keys()
    assert verify(source, tmp_path / "joined.safetensors").equal_tensors > 0


def test_numbers_of_odd_sizes_lie_straight_in_the_file(tmp_path):
    config = DiTConfig(
        in_visual_dim=3,
        out_visual_dim=3,
        in_text_dim=5,
        in_text_dim2=3,
        time_dim=7,
        model_dim=18,
        ff_dim=21,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(2, 2, 2),
    )
    before = tmp_path / "before.safetensors"
    header = {"config": json.dumps({"axes_dims": config.axes_dims})}
    save(before, weights(config, torch.bfloat16), header)
    convert(before, tmp_path / "after.safetensors", "int8")
    assert len(load_file(tmp_path / "after.safetensors")) > 0  # the library refuses numbers askew
    assert check_transformer(tmp_path / "after.safetensors") == config
    assert verify(before, tmp_path / "after.safetensors").lowest[1] > 38


def refuse(error: type[K1Error], source, out, to: str) -> str:
    before = names_in(source.parent)
    with pytest.raises(error) as caught:
        convert(source, out, to)
    assert "\n" not in str(caught.value)
    assert names_in(source.parent) == before
    return str(caught.value)


def test_what_is_done_already_is_refused(source, tmp_path):
    out = tmp_path / "x.safetensors"
    int8 = save(tmp_path / "community.safetensors", stored(community_int8, weights()))
    assert "is int8-community already" in refuse(UserError, int8, out, "int8")
    assert "is bf16 already" in refuse(UserError, source, out, "bf16")
    assert "one of int8, bf16" in refuse(UserError, source, out, "fp4")


def test_another_model_and_a_damaged_one_are_refused(tmp_path):
    out = tmp_path / "x.safetensors"
    wan = save(tmp_path / "wan.safetensors", {"patch_embedding.weight": torch.zeros(2, 2)})
    assert "not Kandinsky 5 (looks like Wan)" in refuse(CheckpointError, wan, out, "int8")
    tensors = weights()
    tensors[f"{LAYER}.weight"] = torch.zeros(64, 0)
    flat = save(tmp_path / "flat.safetensors", tensors)
    assert "of another shape" in refuse(CheckpointError, flat, out, "int8")  # K of 0
    tensors = stored(community_int8, weights())
    tensors[f"{LAYER}.weight_scales"] = torch.zeros(64, 3)
    misfit = save(tmp_path / "misfit.safetensors", tensors)
    assert "scales do not fit" in refuse(CheckpointError, misfit, out, "bf16")


def test_the_source_itself_is_not_overwritten(source, tmp_path):
    (tmp_path / "link.safetensors").symlink_to(source)
    before = source.read_bytes()
    for out in (source, tmp_path / "link.safetensors"):
        assert "the file to convert" in refuse(UserError, source, out, "int8")
    assert source.read_bytes() == before


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(source, out, monkeypatch):
    monkeypatch.setattr("kandinsky5.output.atomic.free_bytes", lambda folder: 1000)
    with pytest.raises(DiskFull, match="needs 0.* MB, 0.0 MB free"):
        convert(source, out, "int8")
    assert names_in(out.parent) == set()


@pytest.mark.parametrize("write", [0, 1, 7, 40])
def test_a_disk_that_fills_up_leaves_nothing_under_the_name_and_the_rest_to_go_on_from(
    source, out, tmp_path, monkeypatch, write
):
    real, calls = os.pwrite, iter(range(10_000))

    def pwrite(descriptor, data, place):
        if next(calls) >= write:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, place)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(K1Error, match=r"too little room .*the same command goes on") as caught:
        convert(source, out, "int8")
    assert "\n" not in str(caught.value)
    assert names_in(out.parent) == {part_of(out).name}
    monkeypatch.undo()
    convert(source, out, "int8")
    convert(source, tmp_path / "at_once.safetensors", "int8")
    assert out.read_bytes() == (tmp_path / "at_once.safetensors").read_bytes()
    assert names_in(out.parent) == {out.name}


def test_a_source_that_changes_meanwhile_gives_no_file(source, out):
    def spoil(event):
        os.utime(source, ns=(1, 1))

    with pytest.raises(CheckpointError, match="was changed while it was read"):
        convert(source, out, "int8", emit=spoil)
    assert not out.exists()


def test_a_tensor_that_was_not_copied_as_it_is_is_found(source, out):
    convert(source, out, "int8")
    tensors = load_file(out)
    tensors["time_embeddings.in_layer.bias"] += 1
    save(out, tensors, {k: v for k, v in _metadata(out).items()})
    with pytest.raises(CheckpointError, match=r"'time_embeddings\.in_layer\.bias' differs"):
        verify(source, out)


def test_verifying_finds_a_layer_that_is_less_exact(source, out):
    convert(source, out, "int8")
    good = verify(source, out)
    assert good.lowest is not None and 38 < good.lowest[1] < 60
    assert len(good.sqnr_db) == 26
    tensors = load_file(out)
    tensors[f"{LAYER}.weight"] += 3
    save(out, tensors, _metadata(out))
    name, db = verify(source, out).lowest
    assert (name, db < 38) == (f"{LAYER}.weight", True)


def _metadata(path) -> dict[str, str]:
    from kandinsky5.model.checkpoint import Checkpoint

    with Checkpoint(path) as checkpoint:
        return checkpoint.metadata

"""One file, shards or folders: the same tensors under the same names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from open_files import open_files
from safetensors.torch import save_file

from kandinsky5.errors import CheckpointError
from kandinsky5.model.checkpoint import Checkpoint, weights_of

TENSORS = {"a.weight": torch.randn(4, 3), "a.bias": torch.randn(4), "b.weight": torch.randn(2)}
SHARD = "model-0000{}-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def write_shards(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    names = list(TENSORS)
    save_file({n: TENSORS[n] for n in names[:2]}, folder / SHARD.format(1))
    save_file({names[2]: TENSORS[names[2]]}, folder / SHARD.format(2))
    usual = {names[0]: SHARD.format(1), names[1]: SHARD.format(1), names[2]: SHARD.format(2)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map or usual}))
    return folder / INDEX


def reason(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_holds_all(checkpoint: Checkpoint) -> None:
    assert checkpoint.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.read(name), tensor)


@pytest.mark.parametrize("given", ["", INDEX, SHARD.format(2)], ids=["folder", "index", "shard"])
def test_shards_are_one_model_by_folder_index_or_any_shard(tmp_path, given):
    write_shards(tmp_path)
    with Checkpoint(tmp_path / given) as checkpoint:
        assert_holds_all(checkpoint)
        assert len(checkpoint.files) == 2


def test_shards_that_are_links_into_a_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    write_shards(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / file.name)
    with Checkpoint(snapshot) as checkpoint:
        assert_holds_all(checkpoint)


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..\\x",
        "C:x",
        "..",
        "",
        "a\0b",
        7,
    ],
    ids=repr,
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, shard):
    save_file({"b.weight": torch.zeros(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    write_shards(folder, {"a.weight": SHARD.format(1), "b.weight": shard})
    assert "shards must lie in the index's own folder" in reason(folder)


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / SHARD.format(2)).unlink()
    assert f"{tmp_path / SHARD.format(2)}: missing" in reason(tmp_path)


def test_a_shard_that_is_a_pointer_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / SHARD.format(2)).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert f"{tmp_path / SHARD.format(2)}: a Git-LFS pointer" in reason(tmp_path)


def test_a_shard_without_a_tensor_the_index_promises_is_named(tmp_path):
    write_shards(tmp_path, {"a.weight": SHARD.format(2)})
    assert "has no tensor 'a.weight'" in reason(tmp_path)


def test_a_shard_without_its_index_says_so(tmp_path):
    write_shards(tmp_path)
    (tmp_path / INDEX).unlink()
    assert f"{INDEX} is not beside it" in reason(tmp_path / SHARD.format(1))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    assert INDEX in reason(tmp_path)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_a_prefix_before_every_name_is_taken_off(tmp_path, prefix):
    path = tmp_path / "model.safetensors"
    marker = {"scaled_fp8": torch.zeros(0)}
    save_file({**{prefix + name: tensor for name, tensor in TENSORS.items()}, **marker}, path)
    with Checkpoint(path) as checkpoint:
        assert checkpoint.prefix == prefix
        for name, tensor in TENSORS.items():
            assert torch.equal(checkpoint.read(name), tensor)


def test_a_prefix_before_some_names_only_stays(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"diffusion_model.a": torch.zeros(1), "b": torch.zeros(1)}, path)
    with Checkpoint(path) as checkpoint:
        assert checkpoint.prefix == ""
        assert set(checkpoint.tensors) == {"diffusion_model.a", "b"}


def test_names_come_in_the_order_of_the_disk(tmp_path):
    write_shards(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        places = [
            (checkpoint.tensors[n].begin, n)
            for n in checkpoint.names_in_file_order()
            if n.startswith("a.")
        ]
        assert places == sorted(places)
        assert list(checkpoint.names_in_file_order())[-1] == "b.weight"


def test_a_diffusers_folder_means_its_transformer(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        save_file({part: torch.zeros(1)}, tmp_path / part / "diffusion_pytorch_model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["transformer"]


def test_the_official_layout_means_the_file_in_its_model_folder(tmp_path):
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "kandinsky5lite_t2v_sft_5s.safetensors"
    save_file(TENSORS, file)
    assert weights_of(tmp_path) == file


def test_a_folder_with_several_models_asks_for_a_file(tmp_path):
    for name in ("a", "b"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    assert "holds 2 models (a.safetensors, b.safetensors" in reason(tmp_path)


def test_a_folder_with_only_a_pickle_says_why_it_is_not_used(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin is a pickle and can run code" in reason(tmp_path)


def test_dimensions_come_from_the_header_before_the_file_beside(tmp_path):
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    (tmp_path / "config.json").write_text('{"model_dim": 1}')
    save_file(TENSORS, path)
    with Checkpoint(path) as checkpoint:
        assert checkpoint.read_config() == {"model_dim": 1}
    save_file(TENSORS, path, metadata={"config": '{"model_dim": 2}'})
    with Checkpoint(path) as checkpoint:
        assert checkpoint.read_config() == {"model_dim": 2}


def test_a_config_beside_a_file_of_another_name_is_not_its_own(tmp_path):
    (tmp_path / "config.json").write_text('{"model_dim": 1}')
    save_file(TENSORS, tmp_path / "mine.safetensors")
    with Checkpoint(tmp_path / "mine.safetensors") as checkpoint:
        assert checkpoint.read_config() is None


def test_everything_is_closed_after_a_failure_and_after_use(tmp_path):
    write_shards(tmp_path)
    with Checkpoint(tmp_path):
        assert open_files(tmp_path)
    assert open_files(tmp_path) == []
    shutil.copy(tmp_path / SHARD.format(1), tmp_path / SHARD.format(2))
    reason(tmp_path)
    assert open_files(tmp_path) == []

"""Text encoders are read in every published layout, and broken folders are named in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky5.errors import CheckpointError
from kandinsky5.model.text import Conditioning, TextEncoders
from kandinsky5.templates import PROMPT_TEMPLATES

PROMPT = "a red circle moves right on a dark background"


def folders_under(parts: Path) -> Any:
    """The folders that TextEncoders.load asks for, in the layout of a -Diffusers folder."""
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return SimpleNamespace(**{name: parts / name for name in names})


def load(folders: Any) -> TextEncoders:
    return TextEncoders.load(folders, device=torch.device("cpu"), dtype=torch.float32)


def encode(encoders: TextEncoders) -> Conditioning:
    return encoders.encode(PROMPT, PROMPT, template=PROMPT_TEMPLATES["demo"], max_tokens=64)


@pytest.fixture(scope="module")
def expected(text_parts: Path) -> Conditioning:
    """The conditioning of PROMPT from the folder as it is."""
    return encode(load(folders_under(text_parts)))


@pytest.fixture
def copy(text_parts: Path, tmp_path: Path) -> Path:
    """The folder again, to be changed."""
    return Path(shutil.copytree(text_parts, tmp_path / "copy"))


# Layouts of the folders


def test_one_folder_may_hold_encoder_and_tokenizer(copy: Path, expected: Conditioning) -> None:
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        shutil.copytree(copy / tokenizer, copy / encoder, dirs_exist_ok=True)
    first, second = copy / "text_encoder", copy / "text_encoder_2"
    shared = SimpleNamespace(
        text_encoder=first, tokenizer=first, text_encoder_2=second, tokenizer_2=second
    )
    ours = encode(load(shared))
    torch.testing.assert_close(ours.text, expected.text, rtol=0, atol=0)


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    save_file(
        {rename(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"}
    )


def test_qwen_saved_under_its_later_names_is_read(copy: Path, expected: Conditioning) -> None:
    def later(name: str) -> str:
        return f"model.{name}" if name.startswith("visual.") else f"model.language_model.{name[6:]}"

    renamed(copy / "text_encoder", later)
    ours = encode(load(folders_under(copy)))
    torch.testing.assert_close(ours.text, expected.text, rtol=0, atol=0)


def test_qwens_flat_config_of_the_hub_is_read(copy: Path, expected: Conditioning) -> None:
    path = copy / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    text.pop("model_type")
    rope = text.pop("rope_parameters")
    flat = {
        **config,
        **text,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "torch_dtype": config.pop("dtype"),
    }
    path.write_text(json.dumps(flat))
    ours = encode(load(folders_under(copy)))
    torch.testing.assert_close(ours.text, expected.text, rtol=0, atol=0)


def test_qwen_in_shards_is_read(copy: Path, expected: Conditioning) -> None:
    folder = copy / "text_encoder"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file, {"format": "pt"})
    index = {name: file for file, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    ours = encode(load(folders_under(copy)))
    torch.testing.assert_close(ours.text, expected.text, rtol=0, atol=0)

    (folder / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing") as caught:
        load(folders_under(copy))
    assert caught.value.path == str(folder / "model-2.safetensors")


def test_the_whole_of_clip_is_read_for_its_text_part(copy: Path, expected: Conditioning) -> None:
    folder = copy / "text_encoder_2"
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"vision_model.post_layernorm.weight": torch.ones(8), "logit_scale": torch.ones(())}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    whole = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 64,
        "text_config": {**config, "eos_token_id": 2},  # wrong, as in the published file
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 48},
    }
    (folder / "config.json").write_text(json.dumps(whole))
    ours = encode(load(folders_under(copy)))
    torch.testing.assert_close(ours.pooled, expected.pooled, rtol=0, atol=0)


# Broken folders


def test_missing_files_are_named(copy: Path) -> None:
    folders = folders_under(copy)
    for path in (
        copy / "tokenizer_2" / "merges.txt",
        copy / "tokenizer" / "vocab.json",
        copy / "text_encoder_2" / "config.json",
    ):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(CheckpointError) as caught:
            load(folders)
        assert caught.value.path == str(path)
        path.write_bytes(content)
    for name in vars(folders):
        away = (copy / name).rename(copy / "away")
        with pytest.raises(CheckpointError, match="no such folder") as caught:
            load(folders)
        assert caught.value.path == str(copy / name)
        away.rename(copy / name)


def test_pickled_weights_are_refused_with_the_reason(copy: Path) -> None:
    weights = copy / "text_encoder_2" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(CheckpointError, match="pickle") as caught:
        load(folders_under(copy))
    assert caught.value.path == str(weights.parent)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_a_truncated_file_is_named_in_one_line(copy: Path, name: str) -> None:
    path = copy / name / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="download it again") as caught:
        load(folders_under(copy))
    assert caught.value.path == str(path)
    assert "\n" not in str(caught.value)


def test_an_lfs_pointer_in_place_of_weights_is_named_as_what_it_is(copy: Path) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="Git-LFS pointer") as caught:
        load(folders_under(copy))
    assert caught.value.path == str(path)


@pytest.mark.parametrize(
    "name", ["text_encoder/config.json", "tokenizer/vocab.json", "tokenizer_2/vocab.json"]
)
def test_broken_json_is_named(copy: Path, name: str) -> None:
    (copy / name).write_text('{"a": ')
    with pytest.raises(CheckpointError) as caught:
        load(folders_under(copy))
    assert caught.value.path == str(copy / name)


def test_a_config_that_contradicts_itself_is_named(copy: Path) -> None:
    path = copy / "text_encoder_2" / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 64', '"hidden_size": 65'))
    with pytest.raises(CheckpointError, match="65") as caught:
        load(folders_under(copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_a_missing_weight_is_an_error_not_a_random_one(copy: Path, name: str) -> None:
    path = copy / name / "model.safetensors"
    tensors = load_file(path)
    lost = next(key for key in sorted(tensors) if ".layers.1." in key)
    del tensors[lost]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 of \d+ weights missing, .*layers\.1\."):
        load(folders_under(copy))


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_a_weight_of_another_shape_is_an_error(copy: Path, name: str) -> None:
    path = copy / name / "model.safetensors"
    tensors = load_file(path)
    changed = next(key for key in sorted(tensors) if "q_proj.weight" in key)
    tensors[changed] = tensors[changed][:-8].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"q_proj.* has shape"):
        load(folders_under(copy))


def test_encoders_in_each_others_places_are_refused(text_parts: Path) -> None:
    folders = folders_under(text_parts)
    folders.text_encoder, folders.text_encoder_2 = folders.text_encoder_2, folders.text_encoder
    with pytest.raises(CheckpointError, match=r"'qwen2_5_vl', but clip"):
        load(folders)


def test_weights_of_a_quantised_encoder_are_refused(copy: Path) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    changed = next(key for key in sorted(tensors) if "q_proj.weight" in key)
    tensors[changed] = tensors[changed].to(torch.int8)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"q_proj.* has dtype I8"):
        load(folders_under(copy))


def test_a_tokenizer_too_large_for_its_encoder_is_refused(copy: Path) -> None:
    path = copy / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    start = len(json.loads((copy / "tokenizer" / "vocab.json").read_text())) + len(
        config["added_tokens_decoder"]
    )
    flags = next(iter(config["added_tokens_decoder"].values()))
    for index in range(start, start + 200):
        config["added_tokens_decoder"][str(index)] = {**flags, "content": f"<extra {index}>"}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="take both from the same model"):
        load(folders_under(copy))


def test_a_tokenizer_without_the_templates_marks_is_refused(copy: Path) -> None:
    path = copy / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"added_tokens_decoder": {}, "eos_token": None, "pad_token": None}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"<\|im_start\|>") as caught:
        load(folders_under(copy))
    assert caught.value.path == str(copy / "tokenizer")

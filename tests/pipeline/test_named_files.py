"""The model files of a form: told by their headers, refused with the reason, nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from loras import random_pairs, save_kohya, save_peft
from safetensors.torch import save_file
from tiny_image_model import I2I, T2I, diffusers_layout
from tiny_transformer import CONFIG, save, weights

from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.lora import layer_sizes
from kandinsky5.pipeline.named_files import NamedFiles, describe_files
from kandinsky5.presets import DEMO_FOLDER

DEMO_DIT = next((DEMO_FOLDER / "transformer").glob("*.safetensors"))


@pytest.fixture(scope="module")
def sizes() -> dict[str, tuple[int, int]]:
    """Layers of the tiny video transformer."""
    with torch.device("meta"):
        return dict(layer_sizes(DiffusionTransformer3D(CONFIG)))


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dit")
    return save(folder / "my kandinsky5_i2v.safetensors", weights())


def test_a_transformer_is_told_with_what_a_plan_needs(dit) -> None:
    told = describe_files(NamedFiles("lite-t2v-5s-sft", dit=f'"{dit}"'))["dit"]
    assert (told["name"], told["model"], told["weights"]) == (dit.name, "custom", "fp32")
    assert told["config"]["num_visual_blocks"] == CONFIG.num_visual_blocks
    assert "by its name for i2v" in told["notices"][0]


def test_a_file_for_another_mode_is_refused_with_the_modes_that_fit(dit, tmp_path) -> None:
    folder = diffusers_layout(tmp_path / "image", T2I)
    told = describe_files(NamedFiles("image-i2i", model_dir=str(folder)))
    assert "takes no picture" in told["model_dir"]["problem"]
    told = describe_files(NamedFiles("image-t2i", dit=str(DEMO_DIT)))
    assert "makes video" in told["dit"]["problem"]


def test_what_is_no_transformer_is_named_as_what_it_is(tmp_path, sizes) -> None:
    lora = save_kohya(tmp_path / "style.safetensors", random_pairs(sizes), alpha=1.0)
    (tmp_path / "page.safetensors").write_bytes(b"<!DOCTYPE html><html>")
    for name, said in (
        (lora.name, "is a lora"),
        ("page.safetensors", "HTML"),
        ("none", "nothing is"),
    ):
        told = describe_files(NamedFiles("demo-t2v", dit=str(tmp_path / name)))["dit"]
        assert said in told["problem"], told


def test_a_lora_is_matched_against_the_transformer_named_beside_it(tmp_path, dit, sizes) -> None:
    lora = save_peft(tmp_path / "a.safetensors", random_pairs(sizes), alpha=1.0, trigger="in oil ")
    (told,) = describe_files(NamedFiles("demo-t2v", dit=str(dit), loras=(str(lora),)))["loras"]
    assert told["matched"] == told["tensors"] == 2 * len(sizes)
    assert (told["variant"], told["trigger"], told["unmatched"]) == ("peft", "in oil", None)


def test_without_a_transformer_a_lora_is_known_to_be_one_and_no_more(tmp_path, sizes) -> None:
    lora = save_peft(tmp_path / "a.safetensors", random_pairs(sizes), alpha=1.0)
    told = describe_files(NamedFiles("pro-t2v-5s-sd", loras=(str(lora),)))
    assert told["loras"][0]["matched"] is None
    assert "transformer" in told["missing"]


def test_a_lora_of_another_model_is_refused(tmp_path, dit) -> None:
    alien = {"double_blocks.0.img_attn.qkv": (8, 8)}
    lora = save_kohya(tmp_path / "flux.safetensors", random_pairs(alien), alpha=1.0)
    (told,) = describe_files(NamedFiles("demo-t2v", dit=str(dit), loras=(str(lora),)))["loras"]
    assert "a LoRA of another model" in told["problem"]
    (told,) = describe_files(NamedFiles("demo-t2v", loras=(str(dit),)))["loras"]
    assert "not a LoRA" in told["problem"]


def test_a_lora_is_found_by_its_name_in_a_folder_for_models(tmp_path, dit, sizes) -> None:
    (tmp_path / "loras").mkdir()
    save_kohya(tmp_path / "loras" / "style.safetensors", random_pairs(sizes), alpha=1.0)
    named = NamedFiles("demo-t2v", dit=str(dit), loras=("style.safetensors",))
    (told,) = describe_files(named, [tmp_path])["loras"]
    assert told["matched"] == 3 * len(sizes)


def test_a_folder_that_lacks_a_part_says_which(tmp_path) -> None:
    folder = diffusers_layout(tmp_path / "model", I2I)
    assert describe_files(NamedFiles("image-i2i", model_dir=str(folder)))["model_dir"]["config"]
    shutil.rmtree(folder / "vae")
    told = describe_files(NamedFiles("image-i2i", model_dir=str(folder)))["model_dir"]
    assert "the VAE is missing" in told["problem"]


def test_beside_a_transformer_of_ones_own_a_folder_supplies_the_rest(tmp_path, dit) -> None:
    folder = diffusers_layout(tmp_path / "model", I2I)
    shutil.rmtree(folder / "transformer")
    save_file(weights(), tmp_path / "mine.safetensors")
    named = NamedFiles("lite-t2v-5s-sft", dit=str(dit), model_dir=str(folder))
    told = describe_files(named)
    assert "supplies" in told["model_dir"]
    assert "config" in told["dit"]


def test_nothing_is_written_by_looking(tmp_path, dit) -> None:
    copy = tmp_path / "model.safetensors"
    shutil.copyfile(dit, copy)
    tmp_path.chmod(0o500)
    before = (copy.stat().st_mtime_ns, copy.read_bytes(), sorted(tmp_path.iterdir()))
    describe_files(NamedFiles("demo-t2v", dit=str(copy), loras=(str(copy),)))
    assert (copy.stat().st_mtime_ns, copy.read_bytes(), sorted(tmp_path.iterdir())) == before
    tmp_path.chmod(0o700)

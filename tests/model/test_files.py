"""Where the parts of a model are looked for, and what is said when one is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kandinsky5.errors import CheckpointError, UserError
from kandinsky5.model import files as files_module
from kandinsky5.model.files import ModelFiles, hub_cache, locate_model, typed_path
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest

LITE = PRESETS["lite-t2v-5s-sft"]
HUNYUAN = '{"_class_name": "AutoencoderKLHunyuanVideo"}'
FLUX = '{"_class_name": "AutoencoderKL"}'


def put(folder: Path, *names: str, config: str = "{}") -> Path:
    """A folder with empty files of these names; nothing here opens them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(config if name == "config.json" else "")
    return folder


def put_encoders(root: Path, layout: str) -> None:
    weights, tokenizer = ("config.json", "model.safetensors"), "tokenizer.json"
    if layout == "diffusers":
        put(root / "text_encoder", *weights)
        put(root / "text_encoder_2", *weights)
        put(root / "tokenizer", tokenizer)
        put(root / "tokenizer_2", tokenizer)
    else:
        put(root / "text_encoder", *weights, tokenizer)
        put(root / "text_encoder2", *weights, "vocab.json", "merges.txt")


def put_diffusers(root: Path) -> Path:
    put(root, "model_index.json")
    put(root / "transformer", "config.json", "diffusion_pytorch_model.safetensors")
    put(root / "vae", "config.json", "diffusion_pytorch_model.safetensors", config=HUNYUAN)
    put_encoders(root, "diffusers")
    return root


def put_official(root: Path) -> Path:
    put(root / "model", LITE.weights_file)
    put(root / "vae", "config.json", "diffusion_pytorch_model.safetensors", config=HUNYUAN)
    put_encoders(root, "official")
    return root


def request(preset: str = LITE.name, **changes: object) -> GenerationRequest:
    return GenerationRequest(prompt="x", preset=preset, **changes)


@pytest.fixture(autouse=True)
def no_models_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(files_module, "LITE_CHECKPOINTS", tmp_path / "lite_checkpoints")


def in_diffusers_layout(root: Path) -> ModelFiles:
    return ModelFiles(
        transformer=root / "transformer" / "diffusion_pytorch_model.safetensors",
        vae=root / "vae",
        text_encoder=root / "text_encoder",
        tokenizer=root / "tokenizer",
        text_encoder_2=root / "text_encoder_2",
        tokenizer_2=root / "tokenizer_2",
    )


def in_official_layout(root: Path) -> ModelFiles:
    return ModelFiles(
        transformer=root / "model" / LITE.weights_file,
        vae=root / "vae",
        text_encoder=root / "text_encoder",
        tokenizer=root / "text_encoder",
        text_encoder_2=root / "text_encoder2",
        tokenizer_2=root / "text_encoder2",
    )


def test_model_dir_may_have_either_published_layout(tmp_path):
    diffusers = put_diffusers(tmp_path / "any name")
    assert locate_model(request(model_dir=str(diffusers))) == in_diffusers_layout(diffusers)
    official = put_official(tmp_path / "weights")
    assert locate_model(request(model_dir=f'"{official}"')) == in_official_layout(official)


def test_a_model_of_any_name_in_the_official_layout_is_taken_from_model_dir(tmp_path):
    root = put_official(tmp_path / "weights")
    (root / "model" / LITE.weights_file).rename(root / "model" / "mine.safetensors")
    found = locate_model(request(model_dir=str(root)))
    assert found.transformer == root / "model" / "mine.safetensors"


def test_the_demo_is_built_in(tmp_path, monkeypatch):
    root = put_diffusers(tmp_path / "demo")
    monkeypatch.setattr(files_module, "DEMO_FOLDER", root)
    assert locate_model(request("demo-t2v")) == in_diffusers_layout(root)
    assert locate_model(request("demo-i2v", image="x.png")) == in_diffusers_layout(root)


def test_model_dir_replaces_the_built_in_model(tmp_path):
    root = put_diffusers(tmp_path / "mine")
    found = locate_model(request("demo-t2v", model_dir=str(root)))
    assert found == in_diffusers_layout(root)


def test_dit_replaces_the_transformer_alone(tmp_path):
    root = put_diffusers(tmp_path / "model")
    own = put(tmp_path, "my model.safetensors") / "my model.safetensors"
    found = locate_model(request(model_dir=str(root), dit=f" '{own}' "))
    assert found.transformer == own
    assert found.vae == root / "vae"


def test_dit_serves_where_the_folder_has_no_transformer(tmp_path):
    root = put_diffusers(tmp_path / "model")
    own = put(tmp_path, "own.safetensors") / "own.safetensors"
    (root / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert locate_model(request(model_dir=str(root), dit=str(own))).transformer == own


def test_dit_may_be_a_folder_with_a_model(tmp_path):
    root = put_diffusers(tmp_path / "model")
    other = put_diffusers(tmp_path / "other")
    expected = other / "transformer" / "diffusion_pytorch_model.safetensors"
    for given in (other, other / "transformer"):
        found = locate_model(request(model_dir=str(root), dit=str(given)))
        assert found.transformer == expected


def test_a_home_folder_and_quotes_in_a_path_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = put(tmp_path / "my files", "a b.safetensors") / "a b.safetensors"
    for text in (
        "~/my files/a b.safetensors",
        f'"{file}"',
        "'~/my files/a b.safetensors'",
        f"\t“{file}”\n",
    ):
        assert typed_path("dit", text) == file


@pytest.mark.parametrize(
    "text",
    ["/nowhere/x.safetensors", '""', "/dev/zero", "a\0b", "~nobody-here/x", "x" * 10_000],
    ids=lambda text: repr(text)[:20],
)
def test_a_path_that_cannot_be_a_model_is_an_error_of_its_field(text):
    with pytest.raises(UserError) as caught:
        locate_model(request(dit=text))
    assert caught.value.field == "dit"
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_an_error_of_its_field(tmp_path):
    with pytest.raises(UserError, match=r"no \.safetensors model in this folder") as caught:
        locate_model(request(dit=str(put(tmp_path / "empty", "readme.txt"))))
    assert caught.value.field == "dit"


def test_a_model_dir_that_is_no_folder_is_an_error_of_its_field(tmp_path):
    for text in (str(tmp_path / "none"), str(put(tmp_path, "file") / "file")):
        with pytest.raises(UserError) as caught:
            locate_model(request(model_dir=text))
        assert caught.value.field == "model_dir"


def missing(**changes: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate_model(request(**changes))
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("lost", "looked_at", "title"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "transformer", "transformer"),
        ("vae/config.json", "vae/config.json", "VAE"),
        (
            "vae/diffusion_pytorch_model.safetensors",
            "vae/*.safetensors",
            "VAE",
        ),
        ("text_encoder/config.json", "text_encoder/config.json", "text encoder"),
        ("tokenizer/tokenizer.json", "tokenizer/tokenizer.json", "tokenizer"),
        ("text_encoder_2/model.safetensors", "text_encoder_2/*.safetensors", "CLIP text encoder"),
        ("tokenizer_2/tokenizer.json", "tokenizer_2/tokenizer.json", "CLIP tokenizer"),
    ],
)
def test_a_missing_part_is_named_with_its_path_and_the_command(tmp_path, lost, looked_at, title):
    root = put_diffusers(tmp_path / "model")
    (root / lost).unlink()
    message = missing(model_dir=str(root))
    assert message.startswith(f"{root / looked_at}: the {title} is missing")
    assert f"python k1.py download {LITE.name}" in message


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
@pytest.mark.parametrize(
    "lost", ["model-00002-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_weights_that_are_half_there_are_missing(tmp_path, part, lost):
    """In the folder that is named, and in one that is found."""
    root = put_diffusers(tmp_path / LITE.diffusers_repository.split("/")[1])
    for whole in (root / part).glob("*.safetensors"):
        whole.unlink()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    put(root / part, *shards)
    index = root / part / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    located = locate_model(request(model_dir=str(root)))
    assert located == locate_model(request(), [tmp_path])
    assert getattr(located, part) == (index if part == "transformer" else root / part)
    (root / part / lost).unlink()
    for choice, places in (({"model_dir": str(root)}, []), ({}, [tmp_path])):
        with pytest.raises(
            CheckpointError, match=f"the {part.replace('_', ' ')} is missing"
        ) as caught:
            locate_model(request(**choice), places)
        assert str(caught.value).startswith(str(root / part / lost))
        assert f"python k1.py download {LITE.name}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_of_two_files_needs_both(tmp_path):
    root = put_official(tmp_path / "model")
    (root / "text_encoder2" / "merges.txt").unlink()
    assert "the CLIP tokenizer is missing" in missing(model_dir=str(root))


def test_a_missing_part_of_the_demo_points_back_to_the_built_in_model(tmp_path):
    root = put_diffusers(tmp_path / "model")
    (root / "vae" / "config.json").unlink()
    message = missing(preset="demo-t2v", model_dir=str(root))
    assert message.startswith(f"{root / 'vae' / 'config.json'}: the VAE is missing")
    assert "leave out --model-dir" in message
    assert "python k1.py download" in message


def test_with_nothing_installed_every_part_and_place_is_named(tmp_path):
    message = missing()
    assert message.startswith(str(tmp_path / "lite_checkpoints" / LITE.weights_file))
    for text in (
        str(tmp_path / "hub"),
        "the VAE",
        "the text encoder",
        "the CLIP tokenizer",
        f"python k1.py download {LITE.name}",
    ):
        assert text in message


def put_shared(cache: Path) -> None:
    """The parts that all video presets share, as the hub's library caches them."""

    def snapshot(repository: str) -> Path:
        return cache / f"models--{repository.replace('/', '--')}" / "snapshots" / "abc"

    weights = ("config.json", "model.safetensors")
    vae = snapshot("hunyuanvideo-community/HunyuanVideo") / "vae"
    put(vae, *weights, config=HUNYUAN)
    put(snapshot("Qwen/Qwen2.5-VL-7B-Instruct"), *weights, "tokenizer.json")
    put(snapshot("openai/clip-vit-large-patch14"), *weights, "vocab.json", "merges.txt")


def test_parts_come_together_from_the_hubs_cache_and_lite_checkpoints(tmp_path):
    put_shared(tmp_path / "hub")
    file = put(tmp_path / "lite_checkpoints", LITE.weights_file) / LITE.weights_file
    found = locate_model(request())
    assert found.transformer == file
    assert found.vae.parts[-3:] == ("snapshots", "abc", "vae")
    assert found.tokenizer == found.text_encoder
    assert found.tokenizer_2 == found.text_encoder_2


def test_the_newest_known_snapshot_in_the_cache_comes_first(tmp_path):
    put_shared(tmp_path / "hub")
    repository = tmp_path / "hub" / f"models--{LITE.repository.replace('/', '--')}"
    for revision in ("aaa", "zzz"):
        put(repository / "snapshots" / revision / "model", LITE.weights_file)
    put(repository / "refs")
    (repository / "refs" / "main").write_text("zzz")
    assert locate_model(request()).transformer.parts[-3] == "zzz"
    (repository / "refs" / "main").write_text("../../../../etc")
    assert locate_model(request()).transformer.parts[-3] == "aaa"


def test_a_cached_diffusers_repository_is_enough_alone(tmp_path):
    name = f"models--{LITE.diffusers_repository.replace('/', '--')}"
    root = put_diffusers(tmp_path / "hub" / name / "snapshots" / "abc")
    assert locate_model(request()) == in_diffusers_layout(root)


@pytest.mark.parametrize("below", ["", "diffusion_models", "unet", "model"])
def test_models_dirs_come_before_every_other_place(tmp_path, below):
    put_shared(tmp_path / "hub")
    put(tmp_path / "lite_checkpoints", LITE.weights_file)
    file = put(tmp_path / "mine" / below, LITE.weights_file) / LITE.weights_file
    assert locate_model(request(), [tmp_path / "mine"]).transformer == file


def test_a_folder_of_the_repositorys_name_in_models_dirs_is_used(tmp_path):
    for place in ("", "kandinskylab"):
        root = put_diffusers(
            tmp_path / f"m{place}" / place / LITE.diffusers_repository.split("/")[1]
        )
        assert locate_model(request(), [tmp_path / f"m{place}"]) == in_diffusers_layout(root)


def test_models_dirs_may_name_the_models_own_folder(tmp_path):
    root = put_diffusers(tmp_path / LITE.diffusers_repository.split("/")[1])
    assert locate_model(request(), [root]) == in_diffusers_layout(root)


def test_another_presets_transformer_is_not_taken_for_this_one(tmp_path):
    """A -Diffusers folder says only by its name which checkpoint it holds."""
    put_diffusers(tmp_path / "Kandinsky-5.0-T2V-Lite-sft-10s-Diffusers")
    put_diffusers(tmp_path / "unnamed")
    with pytest.raises(CheckpointError, match="the transformer is missing"):
        locate_model(request(), [tmp_path, tmp_path / "unnamed"])


def test_a_vae_of_the_other_kind_is_passed_over(tmp_path):
    put_shared(tmp_path / "hub")
    mine = tmp_path / "mine"
    put(mine, LITE.weights_file)
    put(mine / "vae", "config.json", "diffusion_pytorch_model.safetensors", config=FLUX)
    assert locate_model(request(), [mine]).vae.is_relative_to(tmp_path / "hub")


def test_the_hubs_cache_is_found_as_its_own_library_finds_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    assert hub_cache({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}) == Path("/c")
    assert hub_cache({"HF_HOME": "~/h"}) == Path("/home/x/h/hub")
    assert hub_cache({"XDG_CACHE_HOME": "/xdg"}) == Path("/xdg/huggingface/hub")
    assert hub_cache({}) == Path("/home/x/.cache/huggingface/hub")

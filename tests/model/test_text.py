"""Prompts become the numbers that the published code makes of them."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky5.demo.scenes import describe, random_scene
from kandinsky5.errors import CheckpointError, UserError
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.text import Conditioning, TextEncoders
from kandinsky5.templates import PROMPT_TEMPLATES, PromptTemplate

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
TOKENS = SHARED / "data" / "conditioning_tokens.json"
DEMO, VIDEO = PROMPT_TEMPLATES["demo"], PROMPT_TEMPLATES["video"]
PROMPT = "a red circle moves right on a dark background"


@dataclass(frozen=True)
class Folders:
    """The four folders that TextEncoders.load asks for."""

    text_encoder: Path
    tokenizer: Path
    text_encoder_2: Path
    tokenizer_2: Path

    @classmethod
    def under(cls, folder: Path) -> Folders:
        return cls(*(folder / name for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")))


def load(folders: Folders, dtype: torch.dtype = torch.float32) -> TextEncoders:
    return TextEncoders.load(folders, device=torch.device("cpu"), dtype=dtype)


def encode(encoders: TextEncoders, prompt: str, clip_prompt: str | None = None) -> Conditioning:
    clip_prompt = prompt if clip_prompt is None else clip_prompt
    return encoders.encode(prompt, clip_prompt, template=DEMO, max_tokens=64, clip_tokens=77)


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    assert ours.shape == reference.shape
    return ((ours - reference).norm() / reference.norm()).item()


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_text", ROOT / "tools" / "demo_text.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def captions() -> Iterator[str]:
    rng = random.Random(0)
    return (describe(random_scene(rng), rng) for _ in range(1000))


@pytest.fixture(scope="module")
def parts(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small tokenizers and tiny random encoders."""
    folder = tmp_path_factory.mktemp("text parts")
    builder.build(folder, captions(), seed=3)
    return folder


@pytest.fixture(scope="module")
def encoders(parts: Path) -> TextEncoders:
    return load(Folders.under(parts))


@pytest.fixture
def copy(parts: Path, tmp_path: Path) -> Path:
    """The folder again, to be broken."""
    return Path(shutil.copytree(parts, tmp_path / "copy"))


# Token ids


@pytest.fixture(scope="module")
def published(builder: ModuleType) -> TextEncoders:
    """The real tokenizers, without encoders."""
    qwen, clip = SHARED / "tokenizers" / "qwen", SHARED / "tokenizers" / "clip"
    if not (TOKENS.is_file() and qwen.is_dir() and clip.is_dir()):
        pytest.skip("the real tokenizers are not here")
    from transformers import CLIPTokenizer, Qwen2Tokenizer

    return TextEncoders(
        None,
        Qwen2Tokenizer.from_pretrained(qwen, local_files_only=True),
        None,
        CLIPTokenizer.from_pretrained(clip, local_files_only=True),
    )


def rows(kind: str) -> list[dict[str, Any]]:
    if not TOKENS.is_file():
        return []
    found = json.loads(TOKENS.read_text(encoding="utf-8"))[kind]
    return [row for row in found if row.get("template", "video") in PROMPT_TEMPLATES]


@pytest.mark.parametrize("row", rows("rows"), ids=lambda row: f"{row['template']}-{row['prompt'][:12]!a}")
def test_qwen_ids_are_the_published_ones(published: TextEncoders, row: dict[str, Any]) -> None:
    template = PROMPT_TEMPLATES[row["template"]]
    ids = published.qwen_ids(row["prompt"], template, max_tokens=256)
    assert ids == row["qwen_ids"]
    assert template.crop_start == row["crop_start"]
    assert len(ids) - template.crop_start == row["after_crop"]
    count = published.token_count(row["prompt"], template, max_tokens=256)
    assert (count.tokens, count.kept) == (row["prompt_tokens"], row["prompt_tokens"])


@pytest.mark.parametrize("row", rows("clip"), ids=lambda row: f"{row['prompt'][:12]!a}")
def test_clip_ids_are_the_published_ones(published: TextEncoders, row: dict[str, Any]) -> None:
    assert published.clip_ids(row["prompt"])["input_ids"] == row["ids"]


@pytest.mark.parametrize("words", [3, 254, 255, 256, 257, 4000])
def test_qwen_ids_are_a_padded_run_without_its_padding(published: TextEncoders, words: int) -> None:
    prompt = "word" + " word" * (words - 1)
    padded = published._qwen_tokenizer(
        VIDEO.text.format(prompt), max_length=256 + 129, truncation=True, padding="max_length"
    )
    kept = [i for i, real in zip(padded["input_ids"], padded["attention_mask"], strict=True) if real]
    assert published.qwen_ids(prompt, VIDEO, max_tokens=256) == kept
    end = published._qwen_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (kept[-1] == end) == (words < 256), "the template's end goes first when the prompt is too long"
    count = published.token_count(prompt, VIDEO, max_tokens=256)
    assert (count.tokens, count.kept) == (words, min(words, 256))


def test_braces_in_a_prompt_mean_nothing(encoders: TextEncoders) -> None:
    ids = encoders.qwen_ids("{} {0} {name}", DEMO, max_tokens=64)
    assert encoders._qwen_tokenizer.decode(ids) == "<|im_start|>{} {0} {name}<|im_end|>"


def test_half_a_surrogate_pair_is_read_as_an_unknown_character(encoders: TextEncoders) -> None:
    assert encoders.qwen_ids("\ud83c\udfb8", DEMO, 64) == encoders.qwen_ids("🎸", DEMO, 64)
    assert encoders.qwen_ids("a \ud800", DEMO, 64) == encoders.qwen_ids("a \ufffd", DEMO, 64)
    assert encoders.clip_ids("a \ud800") == encoders.clip_ids("a \ufffd")
    assert encoders.token_count("a \ud800", DEMO, 64) == encoders.token_count("a \ufffd", DEMO, 64)


# Embeddings


def padded_run(parts: Path, prompt: str, template: PromptTemplate, max_tokens: int) -> tuple[Any, Any]:
    """What the published code computes: padded embeddings [max_tokens, D] and their mask [max_tokens]."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(parts / "text_encoder", dtype=torch.float32)
    tokenizer = Qwen2Tokenizer.from_pretrained(parts / "tokenizer")
    inputs = tokenizer(
        [template.text.format(prompt)],
        max_length=max_tokens + template.crop_start,
        truncation=True,
        return_tensors="pt",
        padding="max_length",
    )
    with torch.no_grad():
        states = model(input_ids=inputs["input_ids"], output_hidden_states=True).hidden_states
    return states[-1][0, template.crop_start :], inputs["attention_mask"][0, template.crop_start :].bool()


@pytest.mark.parametrize(
    ("prompt", "template"),
    [
        (PROMPT, DEMO),
        (PROMPT, VIDEO),
        ("", DEMO),
        ("🎸 Кот играет", DEMO),
        ("red blue " * 300, DEMO),
        ("red blue " * 300, VIDEO),
    ],
    ids=["demo", "video", "empty", "emoji", "long-demo", "long-video"],
)
def test_embeddings_are_those_of_a_padded_and_masked_run(
    parts: Path, encoders: TextEncoders, prompt: str, template: PromptTemplate
) -> None:
    limit = 1024 - template.crop_start if template is VIDEO else 64
    reference, mask = padded_run(parts, prompt, template, limit)
    ours = encoders.encode(prompt, prompt, template=template, max_tokens=limit, clip_tokens=77)
    assert ours.text.dtype == torch.float32
    assert ours.text.shape[0] == int(mask.sum()) >= 1
    assert relative_error(ours.text, reference[mask]) <= 1e-5


def test_the_transformer_cannot_tell_padded_and_masked_text_from_ours(
    parts: Path, encoders: TextEncoders
) -> None:
    reference, mask = padded_run(parts, PROMPT, DEMO, 64)

    def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        bias = mask[None, :] if key.shape[-3] == len(mask) else None
        q, k, v = (t.unsqueeze(0).transpose(1, 2) for t in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return out.transpose(1, 2)[0]

    config = DiTConfig(
        in_text_dim=128, in_text_dim2=64, time_dim=32, model_dim=64, ff_dim=96, num_text_blocks=2,
        num_visual_blocks=2, axes_dims=(8, 12, 12),
    )  # fmt: skip
    torch.manual_seed(0)
    ours, published = DiffusionTransformer3D(config), DiffusionTransformer3D(config, attention=masked)
    weights = {name: torch.randn_like(w) * 0.1 for name, w in ours.state_dict().items()}
    ours.load_state_dict(weights)
    published.load_state_dict(weights)
    x = torch.randn(3, 6, 10, 33)
    conditioning = encode(encoders, PROMPT)
    assert len(conditioning.text) < len(mask) and x.shape[0] * 15 != len(mask)
    with torch.inference_mode():
        out = ours(x, conditioning.text, conditioning.pooled, 0.7)
        padded = published(x, reference, conditioning.pooled, 0.7)
        unmasked = ours(x, reference, conditioning.pooled, 0.7)
    assert relative_error(out, padded) <= 1e-5
    assert relative_error(out, unmasked) > 1e-3, "the mask must matter, or this test says nothing"


@pytest.mark.parametrize("prompt", [PROMPT, "", "A LOUD 🎸 prompt", "red blue " * 300])
def test_the_pooled_vector_is_clips_own(parts: Path, encoders: TextEncoders, prompt: str) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer_2")
    model = CLIPTextModel.from_pretrained(parts / "text_encoder_2", dtype=torch.float32)
    inputs = tokenizer(
        [prompt],
        max_length=77,
        truncation=True,
        add_special_tokens=True,
        padding="max_length",
        return_tensors="pt",
    )
    assert inputs["input_ids"].shape == (1, 77)
    with torch.no_grad():
        reference = model(**inputs)["pooler_output"][0]
    pooled = encode(encoders, prompt).pooled
    assert pooled.dtype == torch.float32
    assert relative_error(pooled, reference) <= 1e-6


def test_a_clip_prompt_of_its_own_reaches_clip_alone(encoders: TextEncoders) -> None:
    both = encode(encoders, PROMPT)
    own = encode(encoders, PROMPT, "a blue square stands still")
    torch.testing.assert_close(own.text, both.text, rtol=0, atol=0)
    torch.testing.assert_close(own.pooled, encode(encoders, "a blue square stands still").pooled)
    assert relative_error(own.pooled, both.pooled) > 0.1


def test_a_long_prompt_fills_the_limit_and_no_more(encoders: TextEncoders) -> None:
    assert encode(encoders, "red " * 50_000).text.shape[0] == 64


def test_bfloat16_weights_give_nearly_the_same_numbers_in_float32(parts: Path, encoders: TextEncoders) -> None:
    half = encode(load(Folders.under(parts), torch.bfloat16), PROMPT)
    full = encode(encoders, PROMPT)
    assert half.text.dtype == half.pooled.dtype == torch.float32
    assert 0 < relative_error(half.text, full.text) < 0.05
    torch.testing.assert_close(half.pooled, full.pooled, rtol=0, atol=0)


def test_a_prompt_that_the_template_swallows_whole_is_refused(encoders: TextEncoders) -> None:
    swallowing = PromptTemplate("<|im_start|>{}", crop_start=3)
    with pytest.raises(UserError, match="too short"):
        encoders.encode("", "", template=swallowing, max_tokens=64, clip_tokens=77)


# Layouts of the folders


def test_one_folder_may_hold_encoder_and_tokenizer(copy: Path, encoders: TextEncoders) -> None:
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        shutil.copytree(copy / tokenizer, copy / encoder, dirs_exist_ok=True)
    first, second = copy / "text_encoder", copy / "text_encoder_2"
    ours = encode(load(Folders(first, first, second, second)), PROMPT)
    torch.testing.assert_close(ours.text, encode(encoders, PROMPT).text, rtol=0, atol=0)


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def test_qwen_saved_under_its_later_names_is_read(copy: Path, encoders: TextEncoders) -> None:
    def later(name: str) -> str:
        return f"model.{name}" if name.startswith("visual.") else f"model.language_model.{name[6:]}"

    renamed(copy / "text_encoder", later)
    ours = encode(load(Folders.under(copy)), PROMPT)
    torch.testing.assert_close(ours.text, encode(encoders, PROMPT).text, rtol=0, atol=0)


def test_qwens_flat_config_of_the_hub_is_read(copy: Path, encoders: TextEncoders) -> None:
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
    ours = encode(load(Folders.under(copy)), PROMPT)
    torch.testing.assert_close(ours.text, encode(encoders, PROMPT).text, rtol=0, atol=0)


def test_qwen_in_shards_is_read(copy: Path, encoders: TextEncoders) -> None:
    folder = copy / "text_encoder"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file, {"format": "pt"})
    index = {name: file for file, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    ours = encode(load(Folders.under(copy)), PROMPT)
    torch.testing.assert_close(ours.text, encode(encoders, PROMPT).text, rtol=0, atol=0)

    (folder / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"text_encoder: .*model-2\.safetensors"):
        load(Folders.under(copy))


def test_the_whole_of_clip_is_read_for_its_text_part(copy: Path, encoders: TextEncoders) -> None:
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
    ours = encode(load(Folders.under(copy)), PROMPT)
    torch.testing.assert_close(ours.pooled, encode(encoders, PROMPT).pooled, rtol=0, atol=0)


# Broken folders


def test_missing_files_are_named(copy: Path) -> None:
    folders = Folders.under(copy)
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
    for name in ("tokenizer_2", "tokenizer", "text_encoder_2", "text_encoder"):
        shutil.rmtree(copy / name)
        with pytest.raises(CheckpointError, match="no such folder") as caught:
            load(folders)
        assert caught.value.path == str(copy / name)


def test_pickled_weights_are_refused_with_the_reason(copy: Path) -> None:
    weights = copy / "text_encoder_2" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(CheckpointError, match="pickled weights only") as caught:
        load(Folders.under(copy))
    assert caught.value.path == str(weights.parent)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_a_truncated_file_is_named_in_one_line(copy: Path, name: str) -> None:
    path = copy / name / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="download it again") as caught:
        load(Folders.under(copy))
    assert caught.value.path == str(path.parent)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["text_encoder/config.json", "tokenizer/vocab.json", "tokenizer_2/vocab.json"])
def test_broken_json_is_named(copy: Path, name: str) -> None:
    (copy / name).write_text('{"a": ')
    with pytest.raises(CheckpointError) as caught:
        load(Folders.under(copy))
    assert caught.value.path == str(copy / name)


def test_a_config_that_contradicts_itself_is_named(copy: Path) -> None:
    path = copy / "text_encoder_2" / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 64', '"hidden_size": 65'))
    with pytest.raises(CheckpointError, match="65") as caught:
        load(Folders.under(copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_a_missing_weight_is_an_error_not_a_random_one(copy: Path, name: str) -> None:
    path = copy / name / "model.safetensors"
    tensors = load_file(path)
    lost = next(key for key in sorted(tensors) if ".layers.1." in key)
    del tensors[lost]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights? missing, .*layers\.1\."):
        load(Folders.under(copy))


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_a_weight_of_another_shape_is_an_error(copy: Path, name: str) -> None:
    path = copy / name / "model.safetensors"
    tensors = load_file(path)
    changed = next(key for key in sorted(tensors) if "q_proj.weight" in key)
    tensors[changed] = tensors[changed][:-8].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="shape of .*q_proj"):
        load(Folders.under(copy))


def test_encoders_in_each_others_places_are_refused(parts: Path) -> None:
    folders = Folders.under(parts)
    swapped = Folders(
        folders.text_encoder_2, folders.tokenizer, folders.text_encoder, folders.tokenizer_2
    )
    with pytest.raises(CheckpointError, match="clip_text_model.*qwen2_5_vl"):
        load(swapped)


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
        load(Folders.under(copy))


def test_a_tokenizer_without_the_templates_marks_is_refused(copy: Path) -> None:
    path = copy / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"added_tokens_decoder": {}, "eos_token": None, "pad_token": None}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"<\|im_start\|>") as caught:
        load(Folders.under(copy))
    assert caught.value.path == str(copy / "tokenizer")


# Manners


def test_loading_prints_nothing_and_asks_no_other_machine(
    parts: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    def refuse(*args: object) -> None:
        raise AssertionError(f"a connection was attempted: {args[1:]}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    encode(load(Folders.under(parts)), "red " * 5000)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_importing_the_module_leaves_transformers_alone() -> None:
    code = "import sys, kandinsky5.model.text; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# The demo's own parts


def test_the_demos_parts_are_the_same_bytes_each_time(
    builder: ModuleType, parts: Path, tmp_path: Path
) -> None:
    builder.build(tmp_path, captions(), seed=3)
    files = sorted(path.relative_to(parts) for path in parts.rglob("*") if path.is_file())
    assert len(files) == 10
    assert [f for f in files if (parts / f).read_bytes() != (tmp_path / f).read_bytes()] == []
    assert sum((parts / f).stat().st_size for f in files) <= 5_000_000


@pytest.mark.parametrize("text", ["Zwölf Boxkämpfer", "Кот 🎸 \u200d\u202e", "a\n\tb  c", "\x01\x7f~|<>", "漢字"])
def test_the_demos_tokenizers_take_any_text(encoders: TextEncoders, text: str) -> None:
    qwen, clip = encoders._qwen_tokenizer, encoders._clip_tokenizer
    ids = encoders.qwen_ids(text, DEMO, max_tokens=64)
    assert qwen.decode(ids[1:-1]) == text
    letters = "".join(text.lower().split())
    assert "".join(clip.decode(clip(text)["input_ids"][1:-1]).split()) == letters


def test_a_words_colour_can_be_told_from_its_own_vector(encoders: TextEncoders) -> None:
    red, blue = (encode(encoders, f"a {colour} circle moves right") for colour in ("red", "blue"))
    assert red.text.shape == blue.text.shape, "colours are single tokens"
    alike = torch.cosine_similarity(red.text, blue.text, dim=-1)
    assert alike[0] > 0.999 and alike[1] < 0.6
    assert alike[2:].max() < 0.999, "what follows knows of it too"


def test_the_pooled_vector_tells_scenes_apart(encoders: TextEncoders) -> None:
    """A linear read-out learnt on 600 captions names colour and direction of 200 others."""
    rng = random.Random(5)
    scenes = [random_scene(rng) for _ in range(800)]
    pooled = torch.stack([encode(encoders, describe(scene, rng)).pooled for scene in scenes])
    inputs = torch.cat([pooled, torch.ones(800, 1)], dim=1)
    for field in ("colour", "direction"):
        names = sorted({getattr(scene, field) for scene in scenes})
        truth = torch.tensor([names.index(getattr(scene, field)) for scene in scenes])
        targets = torch.nn.functional.one_hot(truth).float()
        readout = torch.linalg.lstsq(inputs[:600], targets[:600]).solution
        right = (inputs[600:] @ readout).argmax(dim=1) == truth[600:]
        assert right.float().mean() > 0.9

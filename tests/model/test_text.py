"""Prompts become the numbers that the published code makes of them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kandinsky5.errors import UserError
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.text import Conditioning, TextEncoders
from kandinsky5.templates import PROMPT_TEMPLATES, PromptTemplate

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
TOKENS = SHARED / "data" / "conditioning_tokens.json"
DEMO, VIDEO = PROMPT_TEMPLATES["demo"], PROMPT_TEMPLATES["video"]
PROMPT = "a red circle moves right on a dark background"


def folders_under(parts: Path) -> Any:
    """The folders that TextEncoders.load asks for, in the layout of a -Diffusers folder."""
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return SimpleNamespace(**{name: parts / name for name in names})


def load(folders: Any, dtype: torch.dtype = torch.float32) -> TextEncoders:
    return TextEncoders.load(folders, device=torch.device("cpu"), dtype=dtype)


def encode(encoders: TextEncoders, prompt: str, clip_prompt: str | None = None) -> Conditioning:
    clip_prompt = prompt if clip_prompt is None else clip_prompt
    return encoders.encode(prompt, clip_prompt, template=DEMO, max_tokens=64, clip_tokens=77)


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    assert ours.shape == reference.shape
    return ((ours - reference).norm() / reference.norm()).item()


@pytest.fixture(scope="module")
def encoders(text_parts: Path) -> TextEncoders:
    return load(folders_under(text_parts))


# Token ids


@pytest.fixture(scope="module")
def published() -> TextEncoders:
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


@pytest.mark.parametrize(
    "row", rows("rows"), ids=lambda row: f"{row['template']}-{row['prompt'][:12]!a}"
)
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
    kept = [
        i for i, real in zip(padded["input_ids"], padded["attention_mask"], strict=True) if real
    ]
    assert published.qwen_ids(prompt, VIDEO, max_tokens=256) == kept
    end = published._qwen_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (kept[-1] == end) == (words < 256), (
        "the template's end goes first when the prompt is too long"
    )
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


def padded_run(
    text_parts: Path, prompt: str, template: PromptTemplate, max_tokens: int
) -> tuple[Any, Any]:
    """What the published code computes: padded embeddings [max_tokens, D] and their mask [max_tokens]."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        text_parts / "text_encoder", dtype=torch.float32
    )
    tokenizer = Qwen2Tokenizer.from_pretrained(text_parts / "tokenizer")
    inputs = tokenizer(
        [template.text.format(prompt)],
        max_length=max_tokens + template.crop_start,
        truncation=True,
        return_tensors="pt",
        padding="max_length",
    )
    with torch.no_grad():
        states = model(input_ids=inputs["input_ids"], output_hidden_states=True).hidden_states
    return states[-1][0, template.crop_start :], inputs["attention_mask"][
        0, template.crop_start :
    ].bool()


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
    text_parts: Path, encoders: TextEncoders, prompt: str, template: PromptTemplate
) -> None:
    limit = 1024 - template.crop_start if template is VIDEO else 64
    reference, mask = padded_run(text_parts, prompt, template, limit)
    ours = encoders.encode(prompt, prompt, template=template, max_tokens=limit, clip_tokens=77)
    assert ours.text.dtype == torch.float32
    assert ours.text.shape[0] == int(mask.sum()) >= 1
    assert relative_error(ours.text, reference[mask]) <= 1e-5


def test_the_transformer_cannot_tell_padded_and_masked_text_from_ours(
    text_parts: Path, encoders: TextEncoders
) -> None:
    reference, mask = padded_run(text_parts, PROMPT, DEMO, 64)

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
    ours, published = (
        DiffusionTransformer3D(config),
        DiffusionTransformer3D(config, attention=masked),
    )
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
def test_the_pooled_vector_is_clips_own(
    text_parts: Path, encoders: TextEncoders, prompt: str
) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(text_parts / "tokenizer_2")
    model = CLIPTextModel.from_pretrained(text_parts / "text_encoder_2", dtype=torch.float32)
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


def test_bfloat16_weights_give_nearly_the_same_numbers_in_float32(
    text_parts: Path, encoders: TextEncoders
) -> None:
    half = encode(load(folders_under(text_parts), torch.bfloat16), PROMPT)
    full = encode(encoders, PROMPT)
    assert half.text.dtype == half.pooled.dtype == torch.float32
    assert 0 < relative_error(half.text, full.text) < 0.05
    torch.testing.assert_close(half.pooled, full.pooled, rtol=0, atol=0)


def test_a_prompt_that_the_template_swallows_whole_is_refused(encoders: TextEncoders) -> None:
    swallowing = PromptTemplate("<|im_start|>{}", crop_start=3)
    with pytest.raises(UserError, match="too short"):
        encoders.encode("", "", template=swallowing, max_tokens=64, clip_tokens=77)


# Manners


def test_loading_prints_nothing_and_asks_no_other_machine(
    text_parts: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    def refuse(*args: object) -> None:
        raise AssertionError(f"a connection was attempted: {args[1:]}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    encode(load(folders_under(text_parts)), "red " * 5000)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_importing_the_module_leaves_transformers_alone() -> None:
    code = "import sys, kandinsky5.model.text; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

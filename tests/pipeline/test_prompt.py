"""A prompt longer than the model reads: told with its count, the limit and the part that is cut."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kandinsky5.model.files import locate_model
from kandinsky5.model.text import TextEncoders, TokenCount
from kandinsky5.pipeline.prompt import SHOWN_CHARACTERS, cut_notice, prompt_notices
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest, settle
from kandinsky5.templates import PROMPT_TEMPLATES

PRESET = PRESETS["demo-t2v"]
TEMPLATE = PROMPT_TEMPLATES[PRESET.template]
LIMIT = PRESET.text_tokens


@pytest.fixture(scope="module")
def encoders() -> TextEncoders:
    """The demo's own."""
    files = locate_model(GenerationRequest(prompt="x"))
    return TextEncoders.load(files, device=torch.device("cpu"), dtype=torch.float32)


def notices(encoders: TextEncoders, **values: object) -> list[str]:
    request, _ = settle(GenerationRequest(**{"prompt": "a red circle", **values}))
    return list(prompt_notices(encoders, request, PRESET))


def read_part(encoders: TextEncoders, prompt: str) -> str:
    """What of a prompt the encoder gets, from its token ids."""
    ids = encoders.qwen_ids(prompt, TEMPLATE, LIMIT)
    return encoders._qwen_tokenizer.decode(ids, skip_special_tokens=True)


def test_a_prompt_that_fits_is_no_news(encoders) -> None:
    assert notices(encoders) == []
    assert encoders.token_count("a red circle", TEMPLATE, LIMIT).cut == ""


def test_ten_thousand_tokens_are_counted_and_the_cut_part_is_shown(encoders) -> None:  # fault 22
    prompt = "a red circle " * 3500
    (notice,) = notices(encoders, prompt=prompt)
    count = encoders.token_count(prompt, TEMPLATE, LIMIT)
    assert count.tokens >= 10_000
    assert f"prompt: {count.tokens} tokens, the model reads {LIMIT}; not read: “" in notice
    assert len(notice) < SHOWN_CHARACTERS + 100


@pytest.mark.parametrize("sign", ["word ", "red ", "🟥", "é\u0301", "漢字", "\ud800 "])
def test_what_is_read_and_what_is_cut_are_the_whole_prompt(encoders, sign) -> None:
    prompt = sign * 100
    count = encoders.token_count(prompt, TEMPLATE, LIMIT)
    assert count.tokens > count.kept == LIMIT
    shown = prompt.replace("\ud800", "\ufffd")
    read = shown.removesuffix(count.cut)
    assert count.cut and len(read) + len(count.cut) == len(shown)
    # at most one letter was read in part
    beyond = read_part(encoders, prompt).rstrip("\ufffd")
    assert beyond.startswith(read.rstrip("\ufffd")) and len(beyond) <= len(read) + 1


def test_one_word_too_many_is_the_one_that_is_shown(encoders) -> None:
    counts = [
        encoders.token_count("red" + " red" * more, TEMPLATE, LIMIT) for more in range(LIMIT + 1)
    ]
    first = next(index for index, count in enumerate(counts) if count.tokens > count.kept)
    assert all(count.cut == "" and count.tokens == count.kept for count in counts[:first])
    assert counts[first].cut and " red".endswith(counts[first].cut)


def test_every_prompt_that_takes_part_is_looked_at(encoders) -> None:
    long = "word " * 300
    said = notices(encoders, negative_prompt=long, clip_prompt=long, guidance=2.0)
    assert [notice.split(":")[0] for notice in said] == ["negative prompt", "CLIP prompt"]
    assert "the model reads 75" in said[1]
    assert notices(encoders, negative_prompt=long, guidance=1.0) == []


def test_clip_s_own_ids_end_where_the_cut_begins(encoders) -> None:
    prompt = " ".join(f"word{number}" for number in range(200))
    count = encoders.clip_token_count(prompt)
    ids = encoders.clip_ids(prompt)["input_ids"]
    read = encoders._clip_tokenizer.decode(ids, skip_special_tokens=True)
    assert read.replace(" ", "") == prompt.removesuffix(count.cut).replace(" ", "")
    assert encoders.clip_token_count("a red circle").cut == ""


def test_a_notice_is_one_line_and_says_no_more_than_there_is() -> None:
    count = TokenCount(tokens=600, kept=512, cut=" the\n  end ")
    expected = "prompt: 600 tokens, the model reads 512; not read: “the end”"
    assert cut_notice("prompt", count) == expected
    long = cut_notice("prompt", dataclasses.replace(count, cut="x" * 10_000))
    assert long.endswith("x…”") and len(long) < SHOWN_CHARACTERS + 80

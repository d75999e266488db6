"""The tokenizers read without transformers give the tokens that the encoders get."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kandinsky5.errors import CheckpointError
from kandinsky5.model.text_loading import load_clip_tokenizer, load_qwen_tokenizer
from kandinsky5.model.token_count import Tokenize
from kandinsky5.model.tokenizer_files import clip_tokenize, qwen_tokenize
from kandinsky5.presets import DEMO_FOLDER

KINDS: dict[str, tuple[Callable[[Path], Tokenize], Callable[[Path], Any]]] = {
    "tokenizer": (qwen_tokenize, load_qwen_tokenizer),
    "tokenizer_2": (clip_tokenize, load_clip_tokenizer),
}
PUBLISHED = {"tokenizer": "qwen", "tokenizer_2": "clip"}
TEXTS = [
    "",
    "a red circle moves right",
    "  Кот играет 🎸\n\n  it's LOUD, we'LL see 12345",
    "<|im_start|>user\nx<|im_end|> y <|endoftext|><|startoftext|>",
    "漢字e\u0301 \t\t x\r\n\r\n a\u00a0b   c   ",
]


def noise(seed: int) -> str:
    """Letters of many scripts, signs and blanks."""
    rng = random.Random(seed)
    ranges = ((32, 127), (160, 0x2000), (0x4E00, 0x4F00), (0x1F300, 0x1F600), (9, 14))
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(300))


def check_same_tokens(part: str, folder: Path) -> None:
    read, load = KINDS[part]
    tokenize, reference = read(folder), load(folder)
    for text in (*TEXTS, *map(noise, range(10))):
        expected = reference(text, return_offsets_mapping=True)["offset_mapping"]
        assert list(tokenize(text)) == expected, text


@pytest.mark.parametrize("part", KINDS)
def test_the_demos_tokens_are_the_encoders(part: str) -> None:
    check_same_tokens(part, DEMO_FOLDER / part)


@pytest.mark.parametrize("part", KINDS)
def test_the_published_tokens_are_the_encoders(shared: Path, part: str) -> None:
    check_same_tokens(part, shared / "tokenizers" / PUBLISHED[part])


@pytest.mark.parametrize("part", KINDS)
def test_a_tokenizer_in_one_file_gives_the_same(part: str, tmp_path: Path) -> None:
    _, load = KINDS[part]
    load(DEMO_FOLDER / part).save_pretrained(str(tmp_path))
    assert (tmp_path / "tokenizer.json").is_file() and not (tmp_path / "vocab.json").exists()
    check_same_tokens(part, tmp_path)


@pytest.mark.parametrize("part", KINDS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", '{"a": 0}'),
        ("merges.txt", None),
        ("tokenizer_config.json", "[]"),
        ("tokenizer.json", '{"version": "1.0"}'),
    ],
)
def test_a_broken_folder_is_refused_in_one_line(
    part: str, name: str, content: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(DEMO_FOLDER / part, folder)
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        KINDS[part][0](folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

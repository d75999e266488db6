"""Both tokenizers from their folders by the ``tokenizers`` library alone: no torch, no transformers.

What the encoders get their ids from is built by transformers (:mod:`kandinsky5.model.text_loading`); this
is for who only counts. A test holds both to the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kandinsky5.errors import CheckpointError
from kandinsky5.model.checkpoint import read_json
from kandinsky5.model.token_count import Offsets, Tokenize

MAX_MERGES_BYTES = 100_000_000

_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
"""Where Qwen2 cuts a text before it looks for tokens (Qwen2Tokenizer)."""
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
"""The same for CLIP (CLIPTokenizer)."""
_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"


def qwen_tokenize(folder: Path) -> Tokenize:
    """Qwen's tokens of a text, its marks in the text included.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers

    with _said_in_one_line(folder):
        tokenizer = _tokenizer(folder, unk_token=None, end_of_word_suffix="")
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        _add_marks(tokenizer, folder)
    return _offsets_by(tokenizer)


def clip_tokenize(folder: Path) -> Tokenize:
    """CLIP's tokens of a text, between its marks of start and end.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers, processors

    with _said_in_one_line(folder):
        tokenizer = _tokenizer(folder, unk_token=_CLIP_END, end_of_word_suffix="</w>")
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        _add_marks(tokenizer, folder, _CLIP_START, _CLIP_END)
        tokenizer.post_processor = processors.RobertaProcessing(
            (_CLIP_END, tokenizer.token_to_id(_CLIP_END)),
            (_CLIP_START, tokenizer.token_to_id(_CLIP_START)),
            trim_offsets=False,
            add_prefix_space=False,
        )
    return _offsets_by(tokenizer)


def _tokenizer(folder: Path, *, unk_token: str | None, end_of_word_suffix: str) -> Any:
    """The vocabulary and its merges, from ``tokenizer.json`` or ``vocab.json`` and ``merges.txt``."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    whole, vocabulary, merges = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    if whole.is_file():
        read_json(whole)  # the library's own error on a broken one names no file
        tokenizer = Tokenizer.from_file(str(whole))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    read_json(vocabulary)
    if not merges.is_file() or merges.stat().st_size > MAX_MERGES_BYTES:
        raise CheckpointError(merges, "missing or too large; download the tokenizer's folder again")
    model = BPE.from_file(
        str(vocabulary),
        str(merges),
        unk_token=unk_token,
        end_of_word_suffix=end_of_word_suffix,
    )
    return Tokenizer(model)


def _add_marks(tokenizer: Any, folder: Path, *known: str) -> None:
    """The marks that the folder names beside its vocabulary, in the order of their ids."""
    from tokenizers import AddedToken

    config = folder / "tokenizer_config.json"
    named = read_json(config).get("added_tokens_decoder", {}) if config.is_file() else {}
    marks = [row["content"] for _, row in sorted(named.items(), key=lambda item: int(item[0]))]
    have = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = [mark for mark in dict.fromkeys((*marks, *known)) if mark not in have]
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in missing])


def _offsets_by(tokenizer: Any) -> Tokenize:
    def tokenize(text: str) -> Offsets:
        return tokenizer.encode(text).offsets

    return tokenize


@contextmanager
def _said_in_one_line(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(folder, f"a tokenizer that cannot be read ({reason})") from error

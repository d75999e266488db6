"""Prompt expansion: the text encoder rewrites the user's prompt before it is encoded.

The published models were trained on long descriptions. What is written is streamed as text and used only if
it is of use; else the user's own prompt is, with a notice.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kandinsky5.errors import Stopped
from kandinsky5.events import EventSink, PromptExpanded
from kandinsky5.memory.text_stages import EXPANSION_TOKENS
from kandinsky5.model.text_generation import Writer
from kandinsky5.presets import Preset
from kandinsky5.request import GenerationRequest
from kandinsky5.templates import EXPANSION_INSTRUCTIONS

MAX_CHARACTERS = 3000
"""Of an answer; 256 tokens of prose have about half as many."""
MAX_COMPRESSION = 3.0
REPETITIVE_FROM_BYTES = 100
"""Text of that length that a packer makes so many times smaller says one thing over and over; prose is
packed about 1.6 times."""

_QUOTES = {'"': '"', "“": "”", "«": "»", "'": "'"}
_SENTENCE_END = re.compile(r"[.!?…。！？](?=[\s\"”»')]|$)")


@dataclass(frozen=True)
class Expansion:
    """What is encoded in the prompt's place.

    Attributes:
        text: the rewritten prompt, or the user's own.
        fault: why the answer was of no use; empty where it is used.
    """

    text: str
    fault: str = ""

    @property
    def notice(self) -> str:
        """For the user where the answer was of no use."""
        return f"the prompt is used as it is: the text encoder's expansion {self.fault}"


def expand_prompt(
    writer: Writer,
    request: GenerationRequest,
    preset: Preset,
    picture: NDArray[np.uint8] | None,
    *,
    emit: EventSink,
    should_stop: Callable[[], bool],
) -> Expansion:
    """Have a prompt rewritten, telling the text as it grows.

    Args:
        request: settled; its seed draws the words.
        picture: uint8 [H, W, 3] that belongs to the prompt.
        emit: gets a :class:`PromptExpanded` after each token, and a last one with what is used.
        should_stop: asked before each token.

    Raises:
        Stopped: ``should_stop`` said so.
    """
    assert request.seed is not None
    growing = writer.answer(
        EXPANSION_INSTRUCTIONS[preset.mode],
        request.prompt,
        generator=torch.Generator().manual_seed(request.seed),
        max_new_tokens=EXPANSION_TOKENS,
        max_prompt_tokens=preset.text_tokens,
        picture=picture,
    )
    written, tokens = "", 0
    for text in growing:
        tokens += 1
        if text != written:
            written = text
            emit(PromptExpanded(written))
        if should_stop():
            raise Stopped("stopped while expanding the prompt")
    answer = tidied(written, cut_short=tokens >= EXPANSION_TOKENS)
    fault = fault_of(answer)
    found = Expansion(request.prompt, fault) if fault else Expansion(answer)
    emit(PromptExpanded(found.text, done=True))
    return found


def tidied(answer: str, *, cut_short: bool = False) -> str:
    """An answer without quotes around it, control characters, and a sentence that was cut off.

    Args:
        cut_short: it ended at the limit; a sentence begun there goes.
    """
    text = "".join(c if c.isprintable() else " " for c in answer.replace("\ufffd", ""))
    text = " ".join(text.split())
    if cut_short and (ends := list(_SENTENCE_END.finditer(text))):
        text = text[: ends[-1].end()]
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    return text


def fault_of(answer: str) -> str:
    """What is wrong with a rewritten prompt, as the end of a sentence; empty where nothing is."""
    if not answer:
        return "was blank"
    if not any(character.isalpha() for character in answer):
        return "had no words"
    if len(answer) > MAX_CHARACTERS:
        return f"was {len(answer)} characters long"
    packed = answer.encode("utf-8", "replace")
    if len(packed) >= REPETITIVE_FROM_BYTES:
        if len(packed) > MAX_COMPRESSION * len(zlib.compress(packed, 9)):
            return "repeated itself"
    elif re.search(r"(\S+)(?:\s+\1){4}|(\S)\2{9}", answer):
        return "repeated itself"
    return ""

"""How long a prompt is in tokens, and which end of it the model does not read.

Arithmetic on what a tokenizer answers, for the encoders and for the page, which counts without them.
No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kandinsky5.templates import PromptTemplate

CLIP_MARKS = 2
"""CLIP's tokens of start and end."""

Offsets = Sequence[tuple[int, int]]
"""(first, end) characters of each token of a text, marks included."""
Tokenize = Callable[[str], Offsets]


@dataclass(frozen=True)
class TokenCount:
    """How long a prompt is, and how much of it the model will read.

    Attributes:
        tokens: of the prompt itself, without template and marks.
        kept: how many of them are read.
        cut: the end of the prompt that is not read; empty when all is.
    """

    tokens: int
    kept: int
    cut: str = ""


def well_formed(prompt: str) -> str:
    """The prompt with halves of UTF-16 pairs joined, or replaced when alone; tokenizers need it."""
    return prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def qwen_room(tokenize: Tokenize, template: PromptTemplate, max_tokens: int) -> int:
    """Most tokens of a prompt that are read.

    Args:
        max_tokens: limit after the template's first ``crop_start`` positions.
    """
    return template.crop_start + max_tokens - len(tokenize(template.text.split("{}")[0]))


def qwen_count(
    tokenize: Tokenize, prompt: str, template: PromptTemplate, max_tokens: int
) -> TokenCount:
    """Qwen's tokens of the prompt itself, and how many of them come before the limit."""
    prompt = well_formed(prompt)
    offsets = tokenize(template.fill(prompt))
    tokens = len(offsets) - len(tokenize(template.fill("")))
    start = len(template.text.split("{}")[0])
    cut = _not_read(prompt, offsets, template.crop_start + max_tokens, start=start)
    return TokenCount(tokens, min(tokens, qwen_room(tokenize, template, max_tokens)), cut)


def clip_count(tokenize: Tokenize, prompt: str, clip_tokens: int = 77) -> TokenCount:
    """The same for CLIP, which reads ``clip_tokens`` with its marks of start and end."""
    prompt = well_formed(prompt)
    offsets = tokenize(prompt)
    tokens = len(offsets) - CLIP_MARKS
    # the mark of the end takes the last place of a prompt that is cut
    cut = _not_read(prompt, offsets[:-1], clip_tokens - 1, start=0)
    return TokenCount(tokens, min(tokens, clip_tokens - CLIP_MARKS), cut)


def _not_read(prompt: str, offsets: Offsets, limit: int, *, start: int) -> str:
    """The end of a prompt behind the first ``limit`` tokens; a letter read in part counts as not read.

    Args:
        offsets: of the text in which the prompt begins at ``start``.
    """
    return prompt[max(offsets[limit][0] - start, 0) :] if len(offsets) > limit else ""

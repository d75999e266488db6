"""What to tell of prompts that are longer than the model reads."""

from __future__ import annotations

from collections.abc import Iterator

from kandinsky5.model.text import TextEncoders, TokenCount
from kandinsky5.presets import Preset
from kandinsky5.request import GenerationRequest
from kandinsky5.templates import PROMPT_TEMPLATES

SHOWN_CHARACTERS = 200


def prompt_notices(
    encoders: TextEncoders, request: GenerationRequest, preset: Preset
) -> Iterator[str]:
    """A notice for each prompt that takes part and does not fit; a job runs with what fits.

    A prompt that CLIP shares with Qwen is cut for CLIP alone without a word: nearly every prompt is longer
    than CLIP's 77 tokens, and its vector is meant as a summary.
    """
    template = PROMPT_TEMPLATES[preset.template]
    counts = {"prompt": encoders.token_count(request.prompt, template, preset.text_tokens)}
    if request.negative_prompt and request.guidance != 1.0:
        counts["negative prompt"] = encoders.token_count(
            request.negative_prompt, template, preset.text_tokens
        )
    if request.clip_prompt:
        counts["CLIP prompt"] = encoders.clip_token_count(request.clip_prompt, preset.clip_tokens)
    for name, count in counts.items():
        if count.tokens > count.kept:
            yield cut_notice(name, count)


def cut_notice(name: str, count: TokenCount) -> str:
    """One line: real count, limit, and the part that is not read (its beginning, if it is long)."""
    cut = " ".join(count.cut.split())
    shown = cut if len(cut) <= SHOWN_CHARACTERS else f"{cut[:SHOWN_CHARACTERS]}…"
    return f"{name}: {count.tokens} tokens, the model reads {count.kept}; not read: “{shown}”"

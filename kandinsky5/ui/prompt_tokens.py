"""How many tokens the prompts are, and what of them the model will not read, in a line under each box.

Counted with the tokenizer of the chosen model, as its encoders count. It is read here, by a library without
torch, the first time it is asked for; where it is not on this machine nothing is counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky5.errors import CheckpointError, UserError
from kandinsky5.model.files import locate_part
from kandinsky5.model.token_count import (
    CLIP_MARKS,
    TokenCount,
    Tokenize,
    clip_count,
    qwen_count,
    qwen_room,
    well_formed,
)
from kandinsky5.model.tokenizer_files import clip_tokenize, qwen_tokenize
from kandinsky5.presets import PRESETS, Preset
from kandinsky5.request import MAX_PROMPT_CHARACTERS
from kandinsky5.templates import PROMPT_TEMPLATES
from kandinsky5.ui.batches import lines_of
from kandinsky5.ui.model_files import FILE_FIELDS, LORA_NAMES, files_told
from kandinsky5.ui.typed import cleaned
from kandinsky5.ui.views import safe
from kandinsky5.worker.client import FileNames

if TYPE_CHECKING:
    from kandinsky5.worker.client import WorkerClient

BOXES = ("prompt", "expanded_prompt", "negative_prompt", "clip_prompt")
"""Prompts that are counted, in the order in which they are told."""
STRENGTHS = tuple(f"{name}_strength" for name in LORA_NAMES)
TOKEN_FIELDS = (*FILE_FIELDS, *STRENGTHS, *BOXES, "per_line", "expand", "guidance")
"""Fields on which the counts depend."""
KEPT_TOKENIZERS = 4
SHOWN_READ, SHOWN_CUT = 60, 400
"""Characters that are shown before and behind the place where a prompt is cut."""
TOLD_TRIGGER = 80
"""From that length on the worker tells a trigger in part."""
NOT_HERE = "Tokens are not counted: this model's tokenizer is not here yet."
REPLACED = "Not read: the expanded prompt below takes its place."
NO_GUIDANCE = "Not used: without guidance (1) there is nothing to keep away from."

READERS: dict[str, Callable[[Path], Tokenize]] = {
    "tokenizer": qwen_tokenize,
    "tokenizer_2": clip_tokenize,
}


class Tokenizers:
    """The tokenizers of models on this machine, each read once.

    Args:
        models_dirs: gives the folders in which models are looked for.
    """

    def __init__(self, models_dirs: Callable[[], Sequence[Path]] = tuple) -> None:
        self._models_dirs = models_dirs
        self._read: dict[tuple[Any, ...], Tokenize | CheckpointError] = {}
        self._reading = threading.Lock()

    def of(self, part: str, preset: Preset, model_dir: str) -> Tokenize | None:
        """A tokenizer as the worker will find it; None where it is not on this machine.

        Args:
            part: ``tokenizer`` (Qwen's) or ``tokenizer_2`` (CLIP's).
            model_dir: as typed; empty for the preset's own.

        Raises:
            UserError: the folder cannot be used.
            CheckpointError: the tokenizer cannot be read.
        """
        names = FileNames(preset.name, model_dir=cleaned(model_dir) or None)
        try:
            folder = locate_part(part, names, self._models_dirs())
        except CheckpointError:
            return None
        key = (part, folder, *(_stamp(folder / name) for name in ("tokenizer.json", "vocab.json")))
        with self._reading:
            found = self._read.get(key) or self._kept(key, part, folder)
        if isinstance(found, CheckpointError):
            raise found
        return found

    def _kept(self, key: tuple[Any, ...], part: str, folder: Path) -> Tokenize | CheckpointError:
        try:
            found: Tokenize | CheckpointError = READERS[part](folder)
        except CheckpointError as error:
            found = error
        while len(self._read) >= KEPT_TOKENIZERS:
            del self._read[next(iter(self._read))]
        self._read[key] = found
        return found


class PromptTokens:
    """The handler behind the lines.

    Args:
        client: of the worker, which knows the LoRAs' triggers.
        tokenizers: to count with.
    """

    def __init__(self, client: WorkerClient, tokenizers: Tokenizers) -> None:
        self._client = client
        self._tokenizers = tokenizers

    def told(self, *values: Any) -> tuple[str, ...]:
        """A line for each of :data:`BOXES`.

        Args:
            values: of the controls of :data:`TOKEN_FIELDS`.
        """
        named = dict(zip(TOKEN_FIELDS, values, strict=True))
        preset = PRESETS.get(named["preset"])
        if preset is None:
            return ("",) * len(BOXES)
        texts = {
            name: well_formed(str(named[name] or "")[:MAX_PROMPT_CHARACTERS]) for name in BOXES
        }
        expands = bool(named["expand"]) and not preset.is_builtin
        if not (expands and texts["expanded_prompt"].strip()):
            texts["expanded_prompt"] = ""
        lines = dict.fromkeys(BOXES, "")
        for name, text in texts.items():
            if text.strip() or name == "prompt":
                lines[name] = self._line(name, text, preset, named)
        if texts["expanded_prompt"]:
            lines["prompt"] = _said(REPLACED)
        if lines["negative_prompt"] and named["guidance"] == 1:
            lines["negative_prompt"] = _said(NO_GUIDANCE)
        return tuple(lines.values())

    def _line(self, name: str, text: str, preset: Preset, named: Mapping[str, Any]) -> str:
        is_clip = name == "clip_prompt"
        part = "tokenizer_2" if is_clip else "tokenizer"
        try:
            tokenize = self._tokenizers.of(part, preset, named["model_dir"])
        except UserError:
            return ""  # the folder's own line says what is wrong with it
        except CheckpointError as error:
            return _said(f"Tokens are not counted: {error}.")
        if tokenize is None:
            return _said(NOT_HERE)
        if is_clip:
            count = clip_count(tokenize, text, preset.clip_tokens)
            return _counted(text, count, CLIP_MARKS, preset.clip_tokens)
        template = PROMPT_TEMPLATES[preset.template]
        texts = [text]
        if name == "prompt" and named["per_line"]:
            texts = list(lines_of(text)) or [text]
        if name != "negative_prompt" and text.strip():
            texts = [self._with_triggers(text, named) for text in texts]
        counts = [qwen_count(tokenize, text, template, preset.text_tokens) for text in texts]
        longest = max(range(len(texts)), key=lambda index: counts[index].tokens)
        which = f"Longest of {len(texts)} lines: " if len(texts) > 1 else ""
        room = qwen_room(tokenize, template, preset.text_tokens)
        return _counted(texts[longest], counts[longest], 0, room, which)

    def _with_triggers(self, prompt: str, named: Mapping[str, Any]) -> str:
        """The prompt behind its LoRAs' triggers, as a job encodes it."""
        if not any(named[name] for name in LORA_NAMES):
            return prompt
        said = files_told(self._client, {name: named[name] for name in FILE_FIELDS}).said
        rows = zip(LORA_NAMES, STRENGTHS, strict=True)
        for name, strength in reversed(tuple(rows)):
            trigger = str(said.get(name, {}).get("trigger") or "")
            acts = str(named[strength] or "1").strip().replace(",", ".") not in ("0", "0.0")
            if acts and trigger and len(trigger) < TOLD_TRIGGER and trigger not in prompt:
                prompt = f"{trigger} {prompt}"
        return prompt


def _counted(text: str, count: TokenCount, marks: int, room: int, which: str = "") -> str:
    """“n of 256 tokens”, and where the prompt is cut."""
    told = f"{which}{count.tokens + marks} of {room} tokens"
    if count.tokens <= count.kept:
        return _said(told)
    read, cut = text[: len(text) - len(count.cut)], count.cut
    before = read if len(read) <= SHOWN_READ else f"…{read[-SHOWN_READ:]}"
    behind = cut if len(cut) <= SHOWN_CUT else f"{cut[:SHOWN_CUT]}…"
    return (
        f'<p class="k1-tokens" data-over="yes">{told}: what is marked is not read</p>'
        f'<p class="k1-cut">{safe(before)}<mark>{safe(behind)}</mark></p>'
    )


def _said(text: str) -> str:
    return f'<p class="k1-tokens">{safe(text)}</p>'


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size

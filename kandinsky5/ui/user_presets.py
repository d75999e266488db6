"""The user's own presets: the form under a name, kept as ``presets.json`` in the state folder.

``{"version": 1, "presets": [{"name": …, "request": {…}}, …]}``; an exported file looks the same. A request
here holds what the form shows, without the picture. It never names a file to be written. One without prompts
leaves those that stand in the form.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kandinsky5.errors import UserError
from kandinsky5.request import REQUEST_VERSION, GenerationRequest
from kandinsky5.ui.fields import FIELDS, LORA_ROWS
from kandinsky5.ui.settings_file import KeptFile, decoded, encoded

VERSION = 1
FILE_NAME = "presets.json"
MAX_NAME_CHARACTERS = 60
MAX_PRESETS = 500
MAX_FOREIGN_BYTES = 4_000_000
"""Of a file that is imported: ten times the longest prompts that a request may hold."""
PROMPTS = ("prompt", "negative_prompt", "clip_prompt", "expanded_prompt")
KEPT = tuple(dict.fromkeys(item.request_field for item in FIELDS if item.kind != "picture"))
LEFT_OUT = ("image", "init_latents", "save_latents", "out", "device")
"""Fields of a request that no preset holds: files of one job, or matters of one machine."""
_NO_PROMPT = "…"


class NameTaken(UserError):
    """A preset has this name already; it may be replaced."""


@dataclass(frozen=True)
class UserPreset:
    """A preset, read and checked.

    Attributes:
        request: what it stands for; its prompt means nothing where it is among those left.
        leaves: fields of the request of which it says nothing.
    """

    request: GenerationRequest
    leaves: tuple[str, ...]


def request_kept(
    request: GenerationRequest, *, with_prompts: bool, leave: tuple[str, ...] = ()
) -> dict[str, Any]:
    """What is kept of a request, JSON-ready.

    Args:
        with_prompts: whether its prompts are.
        leave: other fields that the preset is to say nothing of.
    """
    values = request.to_dict()
    names = [name for name in KEPT if name in values and name not in leave]
    if not with_prompts:
        names = [name for name in names if name not in PROMPTS]
    return {"version": REQUEST_VERSION, **{name: values[name] for name in names}}


def draft_prompt(prompt: Any) -> str:
    """A prompt with which a form can be read that has none yet."""
    return str(prompt or "").strip() or _NO_PROMPT


def read_preset(kept: Mapping[str, Any]) -> UserPreset:
    """Check what is kept of a request, wherever it comes from.

    Raises:
        UserError: unknown keys and values that cannot be used, each named.
    """
    if not isinstance(kept, Mapping):
        raise UserError("request", kept, "a JSON object")
    values = {name: value for name, value in kept.items() if name not in LEFT_OUT}
    leaves = tuple(name for name in (*PROMPTS, "crf") if name not in values)
    if not str(values.get("prompt") or "").strip():
        leaves = tuple(dict.fromkeys(("prompt", *leaves)))
        values["prompt"] = _NO_PROMPT
    request = GenerationRequest.from_dict(values)
    if len(request.loras) > LORA_ROWS:
        raise UserError("loras", len(request.loras), f"at most {LORA_ROWS} in the form")
    return UserPreset(request, leaves)


def checked_name(name: Any) -> str:
    """A name as it is kept: one line, its blanks joined.

    Raises:
        UserError: empty, too long, or with characters that cannot be printed.
    """
    joined = " ".join(str(name or "").split())
    if not joined:
        raise UserError("name", "", "give it a name first")
    if len(joined) > MAX_NAME_CHARACTERS:
        raise UserError("name", joined, f"at most {MAX_NAME_CHARACTERS} characters")
    if not joined.isprintable():
        raise UserError("name", joined, "characters that can be printed")
    return joined


@dataclass(frozen=True)
class Imported:
    """What became of a file with presets.

    Attributes:
        names: under which presets were added.
        refused: (name, reason) of the others.
        left_out: fields that were not taken over.
    """

    names: tuple[str, ...]
    refused: tuple[tuple[str, str], ...] = ()
    left_out: tuple[str, ...] = ()


class UserPresets:
    """The presets of a state folder; every method may be called from any thread.

    Attributes:
        notice: what is wrong with the file, one line; empty when nothing is.
    """

    def __init__(self, state_dir: Path) -> None:
        self._lock = threading.Lock()
        self._file = KeptFile(state_dir.expanduser().absolute() / FILE_NAME, VERSION)
        self._others = self._file.read()
        self._kept, unnamed = _named(self._others.pop("presets", []))
        lost = f"{FILE_NAME}: {unnamed} without a name of its own cannot be used" if unnamed else ""
        self.notice = self._file.notice or lost

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of the alphabet."""
        return tuple(sorted(self._kept, key=str.casefold))

    def get(self, name: str) -> UserPreset:
        """A preset by its name.

        Raises:
            UserError: there is none, or it cannot be used.
        """
        return read_preset(self._known(name))

    def save(self, name: str, kept: Mapping[str, Any], *, replace: bool = False) -> bool:
        """Keep a request under a name; whether one of that name was replaced.

        Raises:
            NameTaken: there is one, and it is not to be replaced.
            UserError: the name or the request cannot be used.
            K1Error: the file could not be written; all is then as it was.
        """
        read_preset(kept)
        with self._lock:
            is_there = name in self._kept
            if is_there and not replace:
                raise NameTaken("name", name, "there is one of this name")
            self._write({**self._kept, name: dict(kept)})
            return is_there

    def delete(self, name: str) -> None:
        """Forget a preset.

        Raises:
            UserError: there is none of this name.
            K1Error: the file could not be written; it is then still there.
        """
        with self._lock:
            self._known(name)
            self._write({other: kept for other, kept in self._kept.items() if other != name})

    def exported(self, name: str) -> bytes:
        """The content of a file that holds this preset.

        Raises:
            UserError: there is none of this name.
        """
        presets = [{"name": name, "request": self._known(name)}]
        return encoded({"version": VERSION, "presets": presets})

    def take_in(self, content: bytes, *, file_name: str) -> Imported:
        """Add the presets of a file from anywhere; none of one's own is replaced.

        Args:
            content: of a file that :meth:`exported` gave, or one request as ``generate --request`` takes it.
            file_name: names the latter.

        Raises:
            UserError: the file holds no presets.
            K1Error: what was added could not be written; nothing is added then.
        """
        entries = _foreign_entries(content, file_name)
        added: dict[str, Any] = {}
        refused: list[tuple[str, str]] = []
        left_out: dict[str, None] = {}
        with self._lock:
            for entry in entries:
                name = (
                    str(entry.get("name") or "without a name") if isinstance(entry, dict) else "?"
                )
                try:
                    free = _free_name(checked_name(name), {**self._kept, **added})
                    added[free] = _foreign_request(entry)
                except UserError as error:
                    refused.append((name[:MAX_NAME_CHARACTERS], f"{error.field}: {error.allowed}"))
                else:
                    given = entry["request"]
                    left_out |= dict.fromkeys(key for key in LEFT_OUT if given.get(key))
            if added:
                self._write({**self._kept, **added})
        return Imported(tuple(added), tuple(refused), tuple(left_out))

    def _known(self, name: str) -> Any:
        if name not in self._kept:
            raise UserError("name", name, "it is no longer there")
        return self._kept[name]

    def _write(self, presets: dict[str, Any]) -> None:
        if len(presets) > max(MAX_PRESETS, len(self._kept)):
            raise UserError("presets", len(presets), f"at most {MAX_PRESETS}: delete some first")
        entries = [{"name": name, "request": kept} for name, kept in presets.items()]
        self._file.write({**self._others, "presets": entries})
        self._kept = presets


def _named(entries: Any) -> tuple[dict[str, Any], int]:
    """What is kept under each name, not yet checked, and how many entries have no name."""
    if not isinstance(entries, list):
        return {}, 1
    named: dict[str, Any] = {}
    for entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and "request" in entry:
            named.setdefault(entry["name"], entry["request"])
    return named, len(entries) - len(named)


def _foreign_entries(content: bytes, file_name: str) -> list[Any]:
    if len(content) > MAX_FOREIGN_BYTES:
        raise UserError("file", f"{len(content)} bytes", f"at most {MAX_FOREIGN_BYTES} bytes")
    try:
        values = decoded(content)
    except ValueError as error:
        raise UserError("file", file_name, f"a file with presets ({error})") from error
    if "presets" not in values:
        return [{"name": Path(file_name).stem[:MAX_NAME_CHARACTERS], "request": values}]
    version, entries = values.get("version"), values["presets"]
    if version != VERSION or isinstance(version, bool):
        raise UserError("version", version, f"version {VERSION}; update K1")
    if not isinstance(entries, list):
        raise UserError("presets", entries, "a list")
    if len(entries) > MAX_PRESETS:
        raise UserError("presets", len(entries), f"at most {MAX_PRESETS}")
    return entries


def _foreign_request(entry: Any) -> dict[str, Any]:
    """What is kept of a request from elsewhere; nothing of it but what the form shows."""
    if not isinstance(entry, dict) or "request" not in entry:
        raise UserError("request", entry, "an object with a name and a request")
    try:
        json.dumps(entry, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError("request", "text", "text in whole characters") from error
    preset = read_preset(entry["request"])
    return request_kept(preset.request, with_prompts=True, leave=preset.leaves)


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        end = f" ({number})"
        free = name[: MAX_NAME_CHARACTERS - len(end)] + end
    return free

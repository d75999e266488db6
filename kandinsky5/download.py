"""``k1.py download PRESET``: what a preset needs and this machine lacks, from the hub into its cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kandinsky5.errors import UserError
from kandinsky5.hub import fetch, listed
from kandinsky5.model.files import hub_cache, parts_at_hand
from kandinsky5.model.parts import QWEN_REPOSITORY, repositories_of
from kandinsky5.presets import PRESETS, Preset

ROOM_LEFT_BYTES = 1_000_000_000
"""What a download leaves free on the disk."""

_CONFIG_AND_WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
)

Tell = Callable[[str], None]


def download(
    name: str, *, models_dirs: Sequence[Path] = (), dry_run: bool = False, tell: Tell
) -> dict[str, Any]:
    """Fetch what a preset lacks.

    Args:
        name: of the preset.
        models_dirs: looked through before the places K1 knows; what is there is not fetched.
        dry_run: only say what would be fetched.
        tell: gets a line for each file.

    Returns:
        JSON-ready: ``preset``, ``files`` [{repository, path, size_bytes, is_here, begun_bytes}],
        ``to_fetch_bytes``, ``folder`` (the hub's cache), ``fetched``.

    Raises:
        UserError: no such preset, nothing to fetch for it, or too little room on the disk.
        CheckpointError: the hub cannot be reached, or does not give a file (gated, renamed).
    """
    preset = PRESETS.get(name)
    if preset is None:
        raise UserError("preset", name, f"one of {', '.join(PRESETS)}")
    if preset.is_builtin:
        raise UserError("preset", name, "a published model; the demo is built in")
    files = [
        file
        for repository, patterns in wanted(preset, models_dirs)
        for file in listed(repository, patterns)
    ]
    missing = [file for file in files if not file.is_here]
    to_fetch = sum(file.to_fetch_bytes for file in missing)
    for file in files:
        state = "here" if file.is_here else f"{file.to_fetch_bytes / 1e6:,.0f} MB"
        tell(f"{state:>12}  {file.repository}/{file.path}")
    if not dry_run:
        if to_fetch:
            _check_room(to_fetch)
        for file in missing:
            fetch(file)
    return {
        "preset": name,
        "files": [vars(file) for file in files],
        "to_fetch_bytes": to_fetch,
        "folder": str(hub_cache()),
        "fetched": 0 if dry_run else len(missing),
    }


def wanted(
    preset: Preset, models_dirs: Sequence[Path] = ()
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(repository, patterns of paths) for each part that is not on this machine."""
    here = parts_at_hand(preset, models_dirs)
    repositories = repositories_of(preset)
    if "transformer" not in here:
        yield preset.repository, ("model/*.safetensors",)  # one file, whatever its name
    if "vae" not in here:
        yield repositories["vae"], tuple(f"vae/{name}" for name in _CONFIG_AND_WEIGHTS)
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        patterns: tuple[str, ...] = ()
        if encoder not in here:
            weights = (
                _CONFIG_AND_WEIGHTS[1:]
                if repositories[encoder] == QWEN_REPOSITORY
                else ("model.safetensors",)
            )
            patterns += (_CONFIG_AND_WEIGHTS[0], *weights)
        if tokenizer not in here:
            patterns += _TOKENIZER
        if patterns:
            yield repositories[encoder], patterns


def _check_room(needed_bytes: int) -> None:
    folder = hub_cache()
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed_bytes + ROOM_LEFT_BYTES > free:
        raise UserError(
            "preset",
            f"{needed_bytes / 1e9:.1f} GB",
            f"at most {max(0, free - ROOM_LEFT_BYTES) / 1e9:.1f} GB are free in {place};"
            " set HF_HOME to a folder on a larger disk",
        )

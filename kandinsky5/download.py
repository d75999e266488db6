"""``k1.py download PRESET``: what a preset needs and this machine lacks, from the hub into its cache.

The hub's library does the fetching: it goes on with files that were cut off, checks them, shares them with
other programs and honours ``HF_HOME``, ``HF_HUB_CACHE``, ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from kandinsky5.errors import CheckpointError, UserError
from kandinsky5.model.files import QWEN_REPOSITORY, hub_cache, parts_at_hand, repositories_of
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


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub that is wanted.

    Attributes:
        repository: ``owner/name``.
        path: inside it.
        size_bytes: 0 where the hub does not tell.
        is_here: whether the cache has it whole.
    """

    repository: str
    path: str
    size_bytes: int
    is_here: bool


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
        JSON-ready: ``preset``, ``files`` [{repository, path, size_bytes, is_here}], ``to_fetch_bytes``,
        ``folder`` (the hub's cache), ``fetched``.

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
        for file in _listed(repository, patterns)
    ]
    missing = [file for file in files if not file.is_here]
    to_fetch = sum(file.size_bytes for file in missing)
    for file in files:
        state = "here" if file.is_here else f"{file.size_bytes / 1e6:,.0f} MB"
        tell(f"{state:>12}  {file.repository}/{file.path}")
    if not dry_run:
        _check_room(to_fetch)
        for file in missing:
            _fetch(file)
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
        yield preset.repository, (f"model/{preset.weights_file}",)
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


def _listed(repository: str, patterns: tuple[str, ...]) -> list[RemoteFile]:
    """The repository's files that fit a pattern; from the cache alone when offline."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            hub_cache(),
            f"parts of {repository} are missing and HF_HUB_OFFLINE forbids fetching them",
        )
    with _said_in_one_line(repository):
        info = HfApi().model_info(repository, files_metadata=True)
    found = [
        RemoteFile(
            repository,
            sibling.rfilename,
            sibling.size or 0,
            isinstance(
                try_to_load_from_cache(repository, sibling.rfilename, revision=info.sha), str
            ),
        )
        for sibling in info.siblings or []
        if any(fnmatch(sibling.rfilename, pattern) for pattern in patterns)
    ]
    if not found:
        raise CheckpointError(
            hub_cache(), f"{repository} on the hub has none of {', '.join(patterns)}"
        )
    return found


def _fetch(file: RemoteFile) -> None:
    from huggingface_hub import hf_hub_download

    with _said_in_one_line(f"{file.repository}/{file.path}"):
        hf_hub_download(file.repository, file.path)


@contextmanager
def _said_in_one_line(what: str) -> Iterator[None]:
    """What goes wrong on the way to the hub, with the next thing to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    # Newer versions of the hub's library speak HTTP with httpx2.
    http = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            hub_cache(),
            f"{what} is gated: accept its terms on the hub's page, then log in with: hf auth login",
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise CheckpointError(hub_cache(), f"the hub answers {status} for {what}") from error
    except (LocalEntryNotFoundError, http.HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            hub_cache(),
            f"{what} could not be fetched ({reason}); the same command goes on where this stopped",
        ) from error


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

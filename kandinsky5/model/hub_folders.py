"""Where repositories of the hub lie on this machine: in its library's cache, or as plain folders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from kandinsky5.presets import Preset


def hub_cache(environment: Mapping[str, str] | None = None) -> Path:
    """The hub's cache on this machine, as its own library finds it (``HF_HUB_CACHE``, ``HF_HOME``)."""
    env = os.environ if environment is None else environment
    if direct := env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE"):
        return Path(direct).expanduser()
    if home := env.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    cache = env.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(cache)) / "huggingface" / "hub"


def own_folders(roots: Sequence[Path], preset: Preset) -> list[Path]:
    """Folders that by their names are copies of the preset's own repositories."""
    repositories = (preset.diffusers_repository, preset.repository)
    names = {repository.split("/")[1] for repository in repositories}
    found = [root for root in roots if root.name in names]
    for root in roots:
        for repository in repositories:
            found += copies_of(root, repository)
    return found


def cached_repository(root: Path, repository: str) -> Path:
    """The repository's folder in a cache of the hub's library."""
    return root / f"models--{repository.replace('/', '--')}"


def copies_of(root: Path, repository: str) -> list[Path]:
    """Copies of a hub repository below a root: plain folders of its name, and snapshots of a cache."""
    copies = [root / repository.split("/")[1], root / repository]
    cached = cached_repository(root, repository)
    try:
        revisions = sorted(entry.name for entry in (cached / "snapshots").iterdir())
    except OSError:
        return copies
    try:
        main = (cached / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    revisions.sort(key=lambda revision: revision != main)
    return copies + [cached / "snapshots" / revision for revision in revisions]

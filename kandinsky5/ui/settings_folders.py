"""What a folder named in the settings is: looked at when it is entered. Nothing is opened or made here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from kandinsky5.ui.typed import cleaned

COMFYUI_KINDS = {
    "diffusion_models": "diffusion models",
    "unet": "diffusion models",
    "text_encoders": "text encoders",
    "clip": "text encoders",
    "vae": "VAEs",
    "loras": "LoRAs",
}
"""Folders of ComfyUI's ``models`` that Kandinsky's files lie in, and what they hold."""
COMFYUI_LEAST = 2
"""So many of them side by side make a folder ComfyUI's."""
HUB_PREFIX = "models--"
LOOKED_AT = 2000
"""Entries of a folder that are looked at."""


@dataclass(frozen=True)
class FolderTold:
    """What is known of a folder.

    Attributes:
        typed: what was entered, without quotes around it.
        state: ``known``, ``doubtful`` (it can be used) or ``refused``.
        text: in a few words.
        taken: the folder that is used, absolute; None when refused.
    """

    typed: str
    state: str
    text: str
    taken: Path | None = None


def models_folders(text: str | None) -> tuple[FolderTold, ...]:
    """What the folders of a text are, one a line."""
    lines = (cleaned(line) for line in str(text or "").splitlines())
    return tuple(models_folder(line) for line in lines if line)


def models_folder(typed: str) -> FolderTold:
    """What a folder for models is."""
    try:
        folder = Path(typed).expanduser().absolute()
        if not folder.exists():
            return FolderTold(typed, "refused", "nothing is there")
        if not folder.is_dir():
            return FolderTold(typed, "refused", "that is not a folder")
        return _told(typed, folder)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        return FolderTold(typed, "refused", f"it cannot be read ({reason})")


def _told(typed: str, folder: Path) -> FolderTold:
    if _is_comfyui_models(folder):
        return FolderTold(
            typed, "known", f"ComfyUI’s models folder: {_comfyui_text(folder)}", folder
        )
    inner = folder / "models"
    if _is_comfyui_models(inner):
        text = f"ComfyUI: its folder “models” is taken, with {_comfyui_text(inner)}"
        return FolderTold(typed, "known", text, inner)
    if folder.name in COMFYUI_KINDS and _is_comfyui_models(folder.parent):
        text = f"one folder of ComfyUI’s: name {folder.parent} to have the others too"
        return FolderTold(typed, "doubtful", text, folder)
    names = tuple(islice(os.scandir(folder), LOOKED_AT))
    cached = sum(entry.name.startswith(HUB_PREFIX) for entry in names)
    if cached:
        return FolderTold(
            typed, "known", f"a cache of the hub: {_counted(cached, 'model')}", folder
        )
    files = sum(1 for _ in islice(_weights_within(folder), LOOKED_AT))
    if files:
        return FolderTold(typed, "known", f"{_counted(files, '.safetensors file')}", folder)
    return FolderTold(typed, "doubtful", "no .safetensors file in it or in its folders", folder)


def _is_comfyui_models(folder: Path) -> bool:
    return sum((folder / name).is_dir() for name in COMFYUI_KINDS) >= COMFYUI_LEAST


def _comfyui_text(folder: Path) -> str:
    """``2 diffusion models, 1 VAE``; ComfyUI's folders may have folders of their own."""
    counts = dict.fromkeys(COMFYUI_KINDS.values(), 0)
    for name, kind in COMFYUI_KINDS.items():
        counts[kind] += sum(1 for _ in islice(_weights_within(folder / name), LOOKED_AT))
    told = [_counted(count, kind.removesuffix("s")) for kind, count in counts.items() if count]
    return ", ".join(told) or "no .safetensors file yet"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _weights_within(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Weights in a folder and in its folders, links followed, but no deeper."""
    for entry in _entries(folder):
        if entry.is_dir():
            yield from (inner for inner in _entries(Path(entry)) if _is_weights(inner))
        elif _is_weights(entry):
            yield entry


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from islice(entries, LOOKED_AT)
    except OSError:  # a folder that may not be read counts as empty
        return


def _is_weights(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(".safetensors") and entry.is_file()


def outputs_folder(text: str | None) -> FolderTold:
    """What a folder for results is; nothing typed is :data:`kandinsky5.ui.settings.DEFAULT_OUT_DIR`."""
    typed = cleaned(text)
    if not typed:
        return FolderTold("", "known", "")
    try:
        if "\0" in typed:  # no name holds it; Path.exists would say that nothing is there
            raise ValueError
        folder = Path(typed).expanduser().absolute()
        nearest = next(place for place in (folder, *folder.parents) if place.exists())
    except (OSError, RuntimeError, ValueError, StopIteration):
        return FolderTold(typed, "refused", "give the path of a folder on this machine")
    if not nearest.is_dir():
        return FolderTold(typed, "refused", f"{nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        return FolderTold(typed, "refused", f"nothing can be written in {nearest}")
    if nearest != folder:
        return FolderTold(typed, "known", "it will be made", folder)
    return FolderTold(typed, "known", "it can be written", folder)

"""VAEs and text encoders as single files, found by what is in them, in ComfyUI's folders and in any other.

Names of files only order what fits. Of a file nothing but its header is read, once as long as it stays the
same; of a folder a bounded number of files. No torch: the page asks as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kandinsky5.errors import CheckpointError
from kandinsky5.model.checkpoint import STANDARD_STEMS, Checkpoint
from kandinsky5.model.part_kinds import TEXT_ENCODER, VAE, PartKind, part_kind
from kandinsky5.presets import Preset

SUFFIXES = (".safetensors", ".sft")
MAX_FILES = 200
"""Looked at in one folder and the folders in it."""
TEXT_WIDTHS = (3584, 768)
"""Of the text vectors that published transformers take: Qwen2.5-VL 7B's and CLIP-L's."""

_COMFYUI_FOLDERS = {
    "vae": ("vae",),
    "text_encoder": ("text_encoders", "clip"),
    "text_encoder_2": ("text_encoders", "clip"),
}
_USUAL_NAMES = {
    "hunyuan": re.compile(r"hunyuan"),
    "flux": re.compile(r"flux|(^|[^a-z])ae([^a-z]|$)"),
    "qwen2.5-vl": re.compile(r"qwen[_.-]?2[_.-]?5[_.-]?vl[_.-]?7b"),
    "clip": re.compile(r"clip[_.-]?l([^a-z]|$)"),
}
"""Which of several files with the same shapes is most likely the published one."""
_FOREIGN_NAMES = {"flux": re.compile(r"sd[_.-]?3")}
"""Of files with the very shapes of what is wanted, and other weights."""
_BITS = {"F64": 32, "F32": 32, "I64": 32, "BF16": 16, "F16": 16}


@dataclass(frozen=True)
class SingleFile:
    """What the header of a file tells of it: what it is, and the bits of its least exact matrices."""

    kind: PartKind
    bits: int


@dataclass(frozen=True)
class Wanted:
    """A part of a model that may be a single file.

    Attributes:
        part: by the names of :class:`kandinsky5.model.files.ModelFiles`.
        model: as :attr:`PartKind.model` names it.
        width: of the text vectors, or None for a VAE.
    """

    part: str
    model: str
    width: int | None = None

    def fits(self, file: SingleFile) -> bool:
        """Whether a file is this part."""
        kind = VAE if self.part == "vae" else TEXT_ENCODER
        is_it = (file.kind.kind, file.kind.model) == (kind, self.model)
        return is_it and self.width in (None, file.kind.width)


def wanted_file(part: str, preset: Preset, transformer: Path | None) -> Wanted | None:
    """What a single file must be to serve as a part; None for a part that is no such file.

    Args:
        part: by the names of :class:`kandinsky5.model.files.ModelFiles`.
        preset: whose model.
        transformer: that takes the text vectors; None takes the published ones' widths.
    """
    if part == "vae":
        return Wanted(part, preset.vae)
    if part not in ("text_encoder", "text_encoder_2"):
        return None
    qwen, clip = TEXT_WIDTHS if transformer is None else _text_widths(transformer)
    return (
        Wanted(part, "qwen2.5-vl", qwen) if part == "text_encoder" else Wanted(part, "clip", clip)
    )


def find_single_file(root: Path, wanted: Wanted) -> Path | None:
    """The best file of a kind below a root: ComfyUI's folder, its ``models``, or any folder with files.

    Of several that fit, one of the published name comes first, then the one of the most exact weights.
    """
    for folder, is_deep in _folders(root, wanted.part):
        found = [(path, file) for path in _files(folder, is_deep) if (file := single_file(path))]
        fitting = [(path, file) for path, file in found if wanted.fits(file)]
        foreign = _FOREIGN_NAMES.get(wanted.model)
        fitting = [(p, f) for p, f in fitting if not (foreign and foreign.search(p.name.lower()))]
        if fitting:
            return min(fitting, key=lambda item: _rank(*item))[0]
    return None


def broken_file(root: Path, wanted: Wanted) -> CheckpointError | None:
    """What is wrong with a file that by its name would be the one, and cannot be read."""
    for folder, is_deep in _folders(root, wanted.part):
        for path in _files(folder, is_deep):
            if not _USUAL_NAMES[wanted.model].search(path.name.lower()):
                continue
            try:
                Checkpoint(path).close()
            except CheckpointError as error:
                return error
    return None


def holds_files(folder: Path) -> bool:
    """Whether a folder is not a part of a model, but one for files of a kind, as ComfyUI's ``vae``."""
    weights = (folder / f"{stem}{suffix}" for stem in STANDARD_STEMS for suffix in SUFFIXES)
    is_named = folder.name in _COMFYUI_FOLDERS["vae"]
    return is_named and not any(path.exists() for path in (folder / "config.json", *weights))


def single_file(path: Path) -> SingleFile | None:
    """What a file is; None where it is nothing known, cannot be read, or is the weights of its folder."""
    if path.stem in STANDARD_STEMS and (path.parent / "config.json").exists():
        return None
    try:
        found = path.stat()
    except OSError:
        return None
    return _single_file(path, (found.st_mtime_ns, found.st_size, found.st_ino))


def notices_of(vae: Path, text_encoder: Path) -> tuple[str, ...]:
    """What the user should know of single files that serve; nothing that keeps them from running."""
    said = []
    image = single_file(vae) if vae.is_file() else None
    is_usual = _USUAL_NAMES["flux"].search(vae.name.lower()) is not None
    if image is not None and image.kind.model == "flux" and not is_usual:
        said.append(
            f"{vae.name} is taken for FLUX.1's VAE by its shapes, which Stable Diffusion 3's has too:"
            " with that one colours would be wrong"
        )
    encoder = single_file(text_encoder) if text_encoder.is_file() else None
    if encoder is not None and encoder.bits < 16:
        said.append(
            f"{text_encoder.name} has its weights in fp8: prompts are read less exactly than in bf16"
        )
    return tuple(said)


def _folders(root: Path, part: str) -> Iterator[tuple[Path, bool]]:
    """Where a part may lie, and whether folders inside are looked into as well."""
    for base in (root, root / "models"):
        for inner in _COMFYUI_FOLDERS[part]:
            yield base / inner, True
    yield root, False


def _files(folder: Path, is_deep: bool) -> list[Path]:
    """Files by their suffix, those of the folder itself first."""
    found: list[Path] = []
    folders = [folder]
    while folders and len(found) < MAX_FILES:
        here = folders.pop(0)
        try:
            entries = sorted(here.iterdir())
        except OSError:
            continue
        found += [path for path in entries if path.suffix in SUFFIXES and path.is_file()]
        if is_deep and here == folder:
            folders += [path for path in entries if path.is_dir()]
    return found[:MAX_FILES]


def _rank(path: Path, file: SingleFile) -> tuple[bool, int, str]:
    is_usual = _USUAL_NAMES[file.kind.model].search(path.name.lower()) is not None
    return (not is_usual, -file.bits, os.fspath(path))


@lru_cache(maxsize=1024)
def _single_file(path: Path, stamp: tuple[int, int, int]) -> SingleFile | None:
    try:
        with Checkpoint(path) as checkpoint:
            kind, tensors = part_kind(checkpoint.shapes), checkpoint.tensors.values()
    except CheckpointError:
        return None
    least = min((_BITS.get(info.dtype, 8) for info in tensors if len(info.shape) > 1), default=0)
    return None if kind is None else SingleFile(kind, least)


def _text_widths(transformer: Path) -> tuple[int, int]:
    """Of the vectors that a transformer takes; what is unusable is named by whoever loads it."""
    names = ("text_embeddings.in_layer.weight", "pooled_text_embeddings.in_layer.weight")
    try:
        with Checkpoint(transformer) as checkpoint:
            qwen, clip = (checkpoint.shapes.get(name, ()) for name in names)
    except CheckpointError:
        return TEXT_WIDTHS
    return (qwen[1], clip[1]) if len(qwen) == len(clip) == 2 else TEXT_WIDTHS

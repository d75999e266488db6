"""Where the parts of a model lie: in the folder the user names, among the built-in files, or on this machine.

Nothing is fetched here. Looking follows the layouts in which Kandinsky 5 is published: a ``-Diffusers``
folder (transformer, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2) and the official one
(model/<file>, vae, text_encoder, text_encoder2, tokenizers inside the encoders' folders). A VAE or a text
encoder may be a single file as well, told by what is in it (:mod:`kandinsky5.model.single_files`).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kandinsky5.errors import CheckpointError, UserError, shown_path
from kandinsky5.model.checkpoint import WEIGHTS_SUFFIX, lacking_weights, weights_of
from kandinsky5.model.hub_folders import cached_repository, copies_of, hub_cache, own_folders
from kandinsky5.model.parts import PARTS, is_vae_of, repository_of
from kandinsky5.model.single_files import (
    Wanted,
    broken_file,
    find_single_file,
    holds_files,
    wanted_file,
)
from kandinsky5.presets import DEMO_FOLDER, PRESETS, Preset

LITE_CHECKPOINTS = Path(__file__).resolve().parents[2] / "lite_checkpoints"
COMFYUI_FOLDERS = ("diffusion_models", "unet", "models/diffusion_models", "models/unet")
"""Where ComfyUI keeps transformers, seen from its ``models`` folder or from its own."""
_ENCODER_OF = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}

_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»"}


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of one model are.

    Attributes:
        transformer: a .safetensors file, an index of shards, or a folder with either.
        vae: folder with config.json and weights, or a single file.
        text_encoder, text_encoder_2: folders of Qwen2.5-VL and of CLIP, or single files.
        tokenizer, tokenizer_2: folders of their tokenizers; may be the encoders' own.
        notices: what the user should know about them, one line each; nothing that keeps them from running.
    """

    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    text_encoder_2: Path
    tokenizer_2: Path
    notices: tuple[str, ...] = ()


class ModelChoice(Protocol):
    """What of a :class:`~kandinsky5.request.GenerationRequest` says which model is meant."""

    @property
    def preset(self) -> str: ...
    @property
    def dit(self) -> str | None: ...
    @property
    def model_dir(self) -> str | None: ...


def typed_path(field: str, text: str) -> Path:
    """The path a person typed or pasted: blanks and quotes around it taken off, ``~`` expanded.

    Raises:
        UserError: empty, impossible, or nothing is there.
    """
    path = text.strip()
    if len(path) > 1 and _QUOTES.get(path[0]) == path[-1]:
        path = path[1:-1].strip()
    if not path or "\0" in path:
        raise UserError(field, text, "the path of an existing file or folder")
    try:
        expanded = Path(path).expanduser()
        exists = expanded.exists()
    except (OSError, RuntimeError) as error:
        cause = getattr(error, "strerror", None) or error
        raise UserError(field, text, f"a path that can be looked at ({cause})") from error
    if not exists:
        raise UserError(
            field, text, f"nothing is at {shown_path(expanded)}; give an existing file or folder"
        )
    return expanded


def typed_transformer(request: ModelChoice) -> Path | None:
    """The user's own transformer, or None where none is named.

    Raises:
        UserError: field ``dit``: missing, neither file nor folder, or a folder without a model.
    """
    if request.dit is None or not request.dit.strip():
        return None
    path = typed_path("dit", request.dit)
    if not path.is_file() and not path.is_dir():
        raise UserError("dit", request.dit, f"a {WEIGHTS_SUFFIX} file or a folder with one")
    try:
        return weights_of(path)
    except CheckpointError as error:
        raise UserError(
            "dit", request.dit, f"{error.reason}; give a {WEIGHTS_SUFFIX} file"
        ) from error


def locate_model(request: ModelChoice, models_dirs: Sequence[Path] = ()) -> ModelFiles:
    """Find every part of the model a request means.

    ``dit`` decides about the transformer alone. Everything else comes from ``model_dir`` when it is given,
    from the built-in folder for the demo, else from the first place that has it: ``models_dirs``,
    lite_checkpoints, the hub's cache. Single files bring no tokenizer: where ``model_dir`` has an encoder as
    such, its tokenizer is looked for in the other places too.

    Raises:
        UserError: ``dit`` or ``model_dir`` cannot be used.
        CheckpointError: a part is missing; names the path looked at and the command that fetches it.
    """
    given = typed_transformer(request)
    search = _search_for(request, models_dirs)
    transformer = search.chosen(given) if given else search.transformer()
    parts = {name: search.part(name) for name in PARTS}
    if search.missing:
        raise search.complaint()
    return ModelFiles(
        transformer=weights_of(transformer),
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        text_encoder_2=parts["text_encoder_2"],
        tokenizer_2=parts["tokenizer_2"],
    )


def locate_vae(request: ModelChoice, models_dirs: Sequence[Path] = ()) -> Path:
    """The VAE's folder or file alone; see :func:`locate_part`."""
    return locate_part("vae", request, models_dirs)


def locate_part(name: str, request: ModelChoice, models_dirs: Sequence[Path] = ()) -> Path:
    """The folder, or single file, of one part, as :func:`locate_model` finds it; nothing else need be there.

    Args:
        name: of :data:`~kandinsky5.model.parts.PARTS`.

    Raises:
        UserError, CheckpointError: as :func:`locate_model`.
    """
    search = _search_for(request, models_dirs)
    found = search.part(name)
    if search.missing:
        raise search.complaint()
    return found


def parts_at_hand(preset: Preset, models_dirs: Sequence[Path] = ()) -> dict[str, Path]:
    """The parts of a preset's model that are on this machine, by the names of :class:`ModelFiles`."""
    roots = [*models_dirs, LITE_CHECKPOINTS, hub_cache()]
    found = {}
    for name in ("transformer", *PARTS):
        search = _Search(preset, own_folders(roots, preset), roots)
        path = search.transformer() if name == "transformer" else search.part(name)
        if not search.missing:
            found[name] = path
    return found


def _search_for(request: ModelChoice, models_dirs: Sequence[Path]) -> _Search:
    preset = PRESETS[request.preset]
    roots = [*models_dirs, LITE_CHECKPOINTS, hub_cache()]
    if request.model_dir is not None and request.model_dir.strip():
        return _Search(preset, [_typed_folder(request.model_dir)], [], elsewhere=roots)
    if preset.is_builtin:
        return _Search(preset, [DEMO_FOLDER], [])
    return _Search(preset, own_folders(roots, preset), roots)


class _Search:
    """One search for the parts of a preset's model.

    Args:
        preset: whose model.
        folders: folders that hold this very model in either layout, the preferred first.
        roots: folders in which models of all kinds lie; empty when only ``folders`` count.
        elsewhere: roots for the tokenizers of encoders that are single files.
    """

    def __init__(
        self,
        preset: Preset,
        folders: Sequence[Path],
        roots: Sequence[Path],
        *,
        elsewhere: Sequence[Path] = (),
    ) -> None:
        self._preset, self._folders, self._roots = preset, folders, roots
        self._elsewhere = elsewhere
        self._transformer: Path | None = None
        self._single: dict[str, Path] = {}
        """Part → the root in which it was found as a single file."""
        self._wanted: dict[str, Wanted | None] = {}
        self.missing: list[tuple[str, Path, str]] = []
        """(title, path looked at, what is wrong)."""

    def chosen(self, transformer: Path) -> Path:
        """The transformer that was given; the other parts shall fit it."""
        self._transformer = transformer
        return transformer

    def transformer(self) -> Path:
        """The transformer's file or folder; below a root only a file of the preset's own name counts."""
        file = self._preset.weights_file
        looked_at = []
        for folder in self._folders:
            looked_at.append(folder / "transformer")
            looked_at += [folder / "model" / file] if file else []
            looked_at.append(folder / "model")
        for root in self._roots:
            looked_at += [root / inner / file for inner in ("", "model", *COMFYUI_FOLDERS)]
        for folder in () if self._roots or not file else self._folders:
            looked_at += [folder / inner / file for inner in COMFYUI_FOLDERS]
        folders = [path for path in looked_at if path.is_dir()]
        for path in looked_at:
            if path.is_file() or (path in folders and lacking_weights(path) is None):
                return self.chosen(path)
        begun = [path for path in folders if any(path.glob(f"*{WEIGHTS_SUFFIX}"))]
        if begun:
            return self._miss("transformer", lacking_weights(begun[0]) or begun[0])
        places = ("model", *COMFYUI_FOLDERS)
        official = [p for p in looked_at if p.parent.name in places and p.parent.is_dir()]
        usual = LITE_CHECKPOINTS / file if self._roots else (official or looked_at)[0]
        return self._miss("transformer", usual)

    def part(self, name: str) -> Path:
        """The folder of one of the other parts, or the single file."""
        part = PARTS[name]
        looked_at: list[Path] = []
        for folders, root in self._places(name):
            looked_at += folders
            for folder in folders:
                if part.lacks(folder) is None and self._is_wanted(name, folder):
                    return folder
            if root is not None and (file := self._file_in(root, name)):
                return file
        if broken := self._broken_file(name):
            return self._miss(part.title, Path(broken.path), f"cannot be used ({broken.reason})")
        folders = [folder for folder in looked_at if folder.is_dir() and not holds_files(folder)]
        begun = [lost for folder in folders if (lost := part.lacks(folder))]
        is_elsewhere = self._roots or self._looks_elsewhere(name)
        cached = cached_repository(hub_cache(), repository_of(name, self._preset))
        return self._miss(
            part.title, begun[0] if begun else cached if is_elsewhere else looked_at[0]
        )

    def _places(self, name: str) -> Iterator[tuple[list[Path], Path | None]]:
        """Folders that may be the part, and where it may lie as a single file; the preferred first."""
        part, repository = PARTS[name], repository_of(name, self._preset)
        yield [folder / inner for folder in self._folders for inner in part.folders], None
        for folder in () if self._roots else self._folders:
            yield [], folder
        roots = self._roots
        if self._looks_elsewhere(name):
            roots = self._elsewhere
            own = own_folders(roots, self._preset)
            yield [folder / inner for folder in own for inner in part.folders], None
        for root in roots:
            copies = [copy / part.inner for copy in copies_of(root, repository)]
            yield [*copies, *(root / inner for inner in part.folders)], root

    def _looks_elsewhere(self, name: str) -> bool:
        encoder = _ENCODER_OF.get(name)
        if encoder is None or not self._elsewhere:
            return False
        return any(self._file_in(folder, encoder) for folder in self._folders)

    def _file_in(self, root: Path, name: str) -> Path | None:
        wanted = self._wanted_file(name)
        file = find_single_file(root, wanted) if wanted else None
        if file is not None:
            self._single[name] = root
        return file

    def _broken_file(self, name: str) -> CheckpointError | None:
        wanted = self._wanted_file(name)
        roots = (self._roots or self._folders) if wanted else ()
        found = (broken_file(root, wanted) for root in roots if wanted)
        return next((error for error in found if error), None)

    def _wanted_file(self, name: str) -> Wanted | None:
        if name not in self._wanted:
            self._wanted[name] = wanted_file(name, self._preset, self._transformer)
        return self._wanted[name]

    def complaint(self) -> CheckpointError:
        """The error that names the first missing part with its path, and the other parts."""
        (title, path, lack), *others = self.missing
        also = "; ".join(f"also the {name} ({place})" for name, place, _ in others)
        also = f" ({also})" if also else ""
        searched = [str(root) for root in self._roots if root not in path.parents]
        elsewhere = f", and nothing in {', '.join(searched)}" if searched else ""
        command = "python k1.py download"
        if self._preset.is_builtin:
            way = (
                "leave out --model-dir to use the built-in model, or install K1 again;"
                f" published models are fetched with: {command} PRESET"
            )
        else:
            kept = dict.fromkeys(root for root in self._single.values() if root != LITE_CHECKPOINTS)
            options = [f" --models-dir {shlex.quote(str(root))}" for root in kept]
            way = f"fetch it with: {command} {self._preset.name}{''.join(options)}"
        return CheckpointError(path, f"the {title} {lack}{elsewhere}{also}; {way}")

    def _miss(self, title: str, path: Path, lack: str = "is missing") -> Path:
        self.missing.append((title, path, lack))
        return path

    def _is_wanted(self, name: str, folder: Path) -> bool:
        """Among models of several kinds a VAE is taken only if it is of the preset's kind."""
        if name != "vae" or not self._roots:
            return True
        return is_vae_of(self._preset, folder)


def _typed_folder(text: str) -> Path:
    folder = typed_path("model_dir", text)
    if not folder.is_dir():
        raise UserError("model_dir", text, "a folder that holds the whole model")
    return folder

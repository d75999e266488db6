"""Where the parts of a model lie: in the folder the user names, among the built-in files, or on this machine.

Nothing is fetched here. Looking follows the layouts in which Kandinsky 5 is published: a ``-Diffusers``
folder (transformer, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2) and the official one
(model/<file>, vae, text_encoder, text_encoder2, tokenizers inside the encoders' folders).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kandinsky5.errors import CheckpointError, UserError
from kandinsky5.model.checkpoint import WEIGHTS_SUFFIX, lacking_weights, read_json, weights_of
from kandinsky5.model.parts import PARTS, repository_of, vae_class_of
from kandinsky5.presets import DEMO_FOLDER, PRESETS, Preset

LITE_CHECKPOINTS = Path(__file__).resolve().parents[2] / "lite_checkpoints"
COMFYUI_FOLDERS = ("diffusion_models", "unet")
"""Where ComfyUI's ``models`` folder keeps transformers."""

_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»"}


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of one model are.

    Attributes:
        transformer: a .safetensors file, an index of shards, or a folder with either.
        vae: folder with config.json and weights.
        text_encoder, text_encoder_2: folders of Qwen2.5-VL and of CLIP.
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
        raise UserError(field, text, f"a path that can be looked at ({error})") from error
    if not exists:
        raise UserError(field, text, f"nothing is at {expanded}; give an existing file or folder")
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
    lite_checkpoints, the hub's cache.

    Raises:
        UserError: ``dit`` or ``model_dir`` cannot be used.
        CheckpointError: a part is missing; names the path looked at and the command that fetches it.
    """
    given = typed_transformer(request)
    search = _search_for(request, models_dirs)
    transformer = given or search.transformer()
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
    """The VAE's folder alone, found as :func:`locate_model` finds it; nothing else need be there.

    Raises:
        UserError, CheckpointError: as :func:`locate_model`.
    """
    search = _search_for(request, models_dirs)
    folder = search.part("vae")
    if search.missing:
        raise search.complaint()
    return folder


def parts_at_hand(preset: Preset, models_dirs: Sequence[Path] = ()) -> dict[str, Path]:
    """The parts of a preset's model that are on this machine, by the names of :class:`ModelFiles`."""
    roots = [*models_dirs, LITE_CHECKPOINTS, hub_cache()]
    found = {}
    for name in ("transformer", *PARTS):
        search = _Search(preset, _own_folders(roots, preset), roots)
        path = search.transformer() if name == "transformer" else search.part(name)
        if not search.missing:
            found[name] = path
    return found


def _search_for(request: ModelChoice, models_dirs: Sequence[Path]) -> _Search:
    preset = PRESETS[request.preset]
    if request.model_dir is not None and request.model_dir.strip():
        return _Search(preset, [_typed_folder(request.model_dir)], [])
    if preset.is_builtin:
        return _Search(preset, [DEMO_FOLDER], [])
    roots = [*models_dirs, LITE_CHECKPOINTS, hub_cache()]
    return _Search(preset, _own_folders(roots, preset), roots)


class _Search:
    """One search for the parts of a preset's model.

    Args:
        preset: whose model.
        folders: folders that hold this very model in either layout, the preferred first.
        roots: folders in which models of all kinds lie; empty when only ``folders`` count.
    """

    def __init__(self, preset: Preset, folders: Sequence[Path], roots: Sequence[Path]) -> None:
        self._preset, self._folders, self._roots = preset, folders, roots
        self.missing: list[tuple[str, Path]] = []

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
        folders = [path for path in looked_at if path.is_dir()]
        for path in looked_at:
            if path.is_file() or (path in folders and lacking_weights(path) is None):
                return path
        begun = [path for path in folders if any(path.glob(f"*{WEIGHTS_SUFFIX}"))]
        if begun:
            return self._miss("transformer", lacking_weights(begun[0]) or begun[0])
        official = [
            path for path in looked_at if path.parent.name == "model" and path.parent.is_dir()
        ]
        usual = LITE_CHECKPOINTS / file if self._roots else (official or looked_at)[0]
        return self._miss("transformer", usual)

    def part(self, name: str) -> Path:
        """The folder of one of the other parts."""
        part, repository = PARTS[name], repository_of(name, self._preset)
        looked_at = [folder / inner for folder in self._folders for inner in part.folders]
        for root in self._roots:
            looked_at += [copy / part.inner for copy in _copies(root, repository)]
            looked_at += [root / inner for inner in part.folders]
        for folder in looked_at:
            if part.lacks(folder) is None and self._is_wanted(name, folder):
                return folder
        begun = [lost for folder in looked_at if folder.is_dir() and (lost := part.lacks(folder))]
        usual = cached_repository(hub_cache(), repository) if self._roots else looked_at[0]
        return self._miss(part.title, begun[0] if begun else usual)

    def complaint(self) -> CheckpointError:
        """The error that names the first missing part with its path, and the other parts."""
        (title, path), *others = self.missing
        also = "; ".join(f"also the {name} ({place})" for name, place in others)
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
            way = f"fetch it with: {command} {self._preset.name}"
        return CheckpointError(path, f"the {title} is missing{elsewhere}{also}; {way}")

    def _miss(self, title: str, path: Path) -> Path:
        self.missing.append((title, path))
        return path

    def _is_wanted(self, name: str, folder: Path) -> bool:
        """Among models of several kinds a VAE is taken only if it is of the preset's kind."""
        if name != "vae" or not self._roots:
            return True
        wanted = vae_class_of(self._preset)
        try:
            found = read_json(folder / "config.json").get("_class_name", wanted)
        except CheckpointError:
            return False
        return bool(found == wanted)


def hub_cache(environment: Mapping[str, str] | None = None) -> Path:
    """The hub's cache on this machine, as its own library finds it (``HF_HUB_CACHE``, ``HF_HOME``)."""
    env = os.environ if environment is None else environment
    if direct := env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE"):
        return Path(direct).expanduser()
    if home := env.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    cache = env.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(cache)) / "huggingface" / "hub"


def _typed_folder(text: str) -> Path:
    folder = typed_path("model_dir", text)
    if not folder.is_dir():
        raise UserError("model_dir", text, "a folder that holds the whole model")
    return folder


def _own_folders(roots: Sequence[Path], preset: Preset) -> list[Path]:
    """Folders that by their names are copies of the preset's own repositories."""
    repositories = (preset.diffusers_repository, preset.repository)
    names = {repository.split("/")[1] for repository in repositories}
    found = [root for root in roots if root.name in names]
    for root in roots:
        for repository in repositories:
            found += _copies(root, repository)
    return found


def cached_repository(root: Path, repository: str) -> Path:
    """The repository's folder in a cache of the hub's library."""
    return root / f"models--{repository.replace('/', '--')}"


def _copies(root: Path, repository: str) -> list[Path]:
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

"""A model's tensors, wherever they lie: one file, several shards with an index, or a folder with either."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky5.errors import CheckpointError
from kandinsky5.model.safetensors_file import SafetensorsFile, TensorInfo, shown

if TYPE_CHECKING:
    import torch

WEIGHTS_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".index.json"
STANDARD_STEMS = ("diffusion_pytorch_model", "model")
"""How the hub's libraries name the weights of a folder; beside such a file its config.json lies."""
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What some programs put before every name."""
MARKERS = frozenset({"scaled_fp8"})
"""Tensors without content that some programs add, outside the prefix."""
MAX_JSON_BYTES = 100_000_000
MAX_NAME_BYTES = 255

_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")


class Checkpoint:
    """Tensors of one model under the model's own names, open for reading. Close it, or use ``with``.

    Args:
        path: a .safetensors file, an ``*.index.json``, or a folder that holds a model: a ``-Diffusers``
            folder (its transformer is meant), any folder of one model, or the published ``model/``.

    Attributes:
        path: the file, or the index, that was found.
        files: the opened file or shards.
        tensors: name without prefix → :class:`TensorInfo`.
        metadata: header metadata of all files together.
        prefix: what was taken off every name.

    Raises:
        CheckpointError: nothing usable there; the message names what is wrong and what to do.
    """

    def __init__(self, path: Path) -> None:
        self.path = weights_of(path)
        self.files: list[SafetensorsFile] = []
        try:
            self._places = self._open()
        except BaseException:
            self.close()
            raise
        self.metadata = {key: text for file in self.files for key, text in file.metadata.items()}
        self.prefix = _prefix_of(list(self._places))
        self._places = {
            name.removeprefix(self.prefix): place for name, place in self._places.items()
        }
        self.tensors: dict[str, TensorInfo] = {
            name: file.tensors[name_in_file] for name, (file, name_in_file) in self._places.items()
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape."""
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(file.size_bytes for file in self.files)

    def names_in_file_order(self) -> Iterator[str]:
        """Names in the order in which a disk reads them fastest."""
        order = {id(file): i for i, file in enumerate(self.files)}
        places = self._places
        return iter(
            sorted(places, key=lambda n: (order[id(places[n][0])], self.tensors[n].begin, n))
        )

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its own dtype, in fresh CPU memory. Raises as :meth:`SafetensorsFile.read`."""
        file, name_in_file = self._places[name]
        return file.read(name_in_file)

    def read_into(self, name: str, target: memoryview, offset_bytes: int = 0) -> None:
        """Fill bytes from within a tensor. Arguments and errors as :meth:`SafetensorsFile.read_into`."""
        file, name_in_file = self._places[name]
        file.read_into(name_in_file, target, offset_bytes)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file was removed, replaced or written to since it was opened."""
        for file in self.files:
            file.check_unchanged()

    @property
    def header_sha256(self) -> str:
        """Of the header's JSON, in hex; with several files, of their hashes one after the other."""
        if len(self.files) == 1:
            return self.files[0].header_sha256
        together = "".join(file.header_sha256 for file in self.files)
        return hashlib.sha256(together.encode("ascii")).hexdigest()

    def read_config(self) -> dict[str, Any] | None:
        """The model's dimensions: the header metadata entry ``config``, else config.json beside the weights.

        Returns:
            None where there is neither.

        Raises:
            CheckpointError: it is there and cannot be read.
        """
        if text := self.metadata.get("config"):
            return _json_object(self.path, text, "the config in its header")
        beside = self.path.parent / "config.json"
        standard = self.path.name.split(".")[0] in STANDARD_STEMS
        return read_json(beside) if standard and beside.exists() else None

    def close(self) -> None:
        """Let go of the files."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> dict[str, tuple[SafetensorsFile, str]]:
        """Open all files; name in the file → where it is."""
        if not self.path.name.endswith(INDEX_SUFFIX):
            file = SafetensorsFile(self.path)
            self.files.append(file)
            return {name: (file, name) for name in file.tensors}
        weight_map = _weight_map(self.path)
        shards: dict[str, SafetensorsFile] = {}
        for shard in sorted(set(weight_map.values())):
            if not (self.path.parent / shard).exists():
                raise CheckpointError(
                    self.path.parent / shard,
                    f"missing, {self.path.name} names it: download the model again",
                )
            shards[shard] = SafetensorsFile(self.path.parent / shard)
            self.files.append(shards[shard])
        for name, shard in weight_map.items():
            if name not in shards[shard].tensors:
                raise CheckpointError(
                    shards[shard].path,
                    f"has no tensor {shown(name)}, though {self.path.name} says so: download it again",
                )
        return {name: (shards[shard], name) for name, shard in weight_map.items()}


def weights_of(path: Path) -> Path:
    """The .safetensors file or index that a path means; see :class:`Checkpoint`.

    Raises:
        CheckpointError: no such path, a folder without a model, or one with several to choose from.
    """
    try:
        if path.is_dir():
            return _weights_in(path)
        if not path.exists():
            raise CheckpointError(path, "no such file or folder")
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CheckpointError(path, f"cannot be looked at ({error.strerror})") from error
    if index := _index_of(path):
        if not index.exists():
            raise CheckpointError(path, f"one part of a model whose {index.name} is not beside it")
        return index
    return path


def _weights_in(folder: Path) -> Path:
    for inner in ("transformer", "model"):
        is_model = inner == "model" or (folder / "model_index.json").exists()
        if is_model and (folder / inner).is_dir():
            folder = folder / inner
            break
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise CheckpointError(folder, f"cannot be listed ({error.strerror})") from error
    for stem in STANDARD_STEMS:
        for standard in (stem + WEIGHTS_SUFFIX, stem + WEIGHTS_SUFFIX + INDEX_SUFFIX):
            if standard in names:
                return folder / standard
    indices = [name for name in names if name.endswith(WEIGHTS_SUFFIX + INDEX_SUFFIX)]
    whole = [n for n in names if n.endswith(WEIGHTS_SUFFIX) and not _SHARD.fullmatch(n)]
    found = indices or whole
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise CheckpointError(
            folder, f"holds {len(found)} models ({found[0]}, {found[1]}, …): give one of the files"
        )
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    hint = f"; {pickles[0]} is a pickle and can run code" if pickles else ""
    raise CheckpointError(folder, f"no {WEIGHTS_SUFFIX} model in this folder{hint}")


def lacking_weights(folder: Path) -> Path | None:
    """The first file of a folder's weights that is not there, such as a shard not yet fetched; else None.

    Of files that are there and cannot be used nothing is said: whoever opens them names what is wrong.
    """
    try:
        found = weights_of(folder)
    except CheckpointError:
        weights = sorted(folder.glob(f"*{WEIGHTS_SUFFIX}"))
        index = _index_of(weights[0]) if weights else folder / f"*{WEIGHTS_SUFFIX}"
        return None if index is None or index.exists() else index
    if not found.name.endswith(INDEX_SUFFIX):
        return None
    try:
        places = [found.parent / shard for shard in shards_of(found)]
    except CheckpointError:
        return None
    return next((place for place in places if not place.exists()), None)


def _index_of(shard: Path) -> Path | None:
    """The index to which a file belongs by its name."""
    match = _SHARD.fullmatch(shard.name)
    return shard.with_name(match[1] + WEIGHTS_SUFFIX + INDEX_SUFFIX) if match else None


def shards_of(index: Path) -> tuple[str, ...]:
    """Names of the files in an index's own folder that hold its tensors.

    Raises:
        CheckpointError: it cannot be read, or names files elsewhere.
    """
    return tuple(sorted(set(_weight_map(index).values())))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, unreadable, over 100 MB, or not a JSON object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(path, f"larger than {MAX_JSON_BYTES} bytes: not a configuration")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(path, "no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(path, f"cannot be read ({error})") from error
    return _json_object(path, text, "it")


def _json_object(path: Path, text: str, what: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        cause = str(error) or type(error).__name__
        raise CheckpointError(path, f"{what} is not valid JSON ({cause})") from error
    if not isinstance(values, dict):
        raise CheckpointError(path, f"{what} is not a JSON object")
    return values


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name → name of a file in the index's own folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index, "not an index of shards: it has no weight_map")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise CheckpointError(
                index,
                f"names the shard {shown(str(shard))}: shards must lie in the index's own folder",
            )
    return weight_map


def _is_plain_name(name: str) -> bool:
    """Whether a name can be a file's and cannot lead out of its folder, on any system."""
    is_short = len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES
    return is_short and name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def _prefix_of(names: list[str]) -> str:
    """The prefix that every name begins with, or nothing."""
    for prefix in PREFIXES:
        bare = [name for name in names if not name.startswith(prefix)]
        if len(bare) < len(names) and MARKERS.issuperset(bare):
            return prefix
    return ""

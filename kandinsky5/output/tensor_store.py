"""Small sets of tensors kept on disk under a key, bounded in bytes; the least recently used go first.

A file is read without trust: one that is cut short, edited or of another key counts as not there. Where the
folder cannot be written nothing is kept, and nothing fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from kandinsky5.errors import K1Error, UserError
from kandinsky5.output.atomic import replacing
from kandinsky5.output.run_state_parts import DTYPE_NAMES, DTYPES
from kandinsky5.output.tensor_file import (
    METADATA,
    Refused,
    TensorEntry,
    header_bytes,
    opened,
    read_header,
    tensor_table,
)

log = logging.getLogger(__name__)

MAX_BYTES = 200 * 10**6
MAX_ENTRY_BYTES = 64 * 2**20
"""Far above the longest prompts' conditioning with an edited picture."""
SUFFIX = ".safetensors"

_KEY, _HASH = "k1_key", "sha256"


class TensorStore:
    """Sets of tensors by key.

    Args:
        folder: made when something is first kept.
        max_bytes: of all files together.
    """

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        """What is kept under a key, in main memory; None where nothing is or the file is broken."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            tensors = _read(path, key)
        except UserError as error:
            log.warning("a kept file is not used: %s", error)
            return None
        with contextlib.suppress(
            OSError
        ):  # a folder that can only be read: it is not the youngest then
            os.utime(path)
        return tensors

    def save(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors under a key, and let the oldest go; where that cannot be done, a line in the log."""
        stored = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        size = sum(tensor.nbytes for tensor in stored.values())
        if size > min(self.max_bytes, MAX_ENTRY_BYTES):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._path(key), needed_bytes=size) as temporary:
                temporary.write_bytes(_file_of(key, stored))
            self._let_old_ones_go()
        except (OSError, K1Error) as error:
            log.warning("%s: nothing is kept there (%s)", self.folder, error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _let_old_ones_go(self) -> None:
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # another process has let it go
                about = path.stat()
                found.append((about.st_mtime_ns, about.st_size, path))
        held = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if held <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            held -= size


def _file_of(key: str, tensors: Mapping[str, torch.Tensor]) -> bytes:
    table, at, parts = {}, 0, []
    for name, tensor in tensors.items():
        part = bytes(tensor.reshape(-1).view(torch.uint8).numpy())
        entry = TensorEntry(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), at, at + len(part))
        table[name], at = entry, entry.end
        parts.append(part)
    data = b"".join(parts)
    return header_bytes(table, {_KEY: key, _HASH: _digest(table, data)}) + data


def _read(path: Path, key: str) -> dict[str, torch.Tensor]:
    """The tensors of a file.

    Raises:
        UserError: it is broken, too long, or was kept under another key.
    """
    with opened(path, field="cache", what="a kept file", advice="it is made anew") as stream:
        header, data_bytes = read_header(stream)
        metadata = header.get(METADATA)
        if not isinstance(metadata, dict) or metadata.get(_KEY) != key:
            raise Refused("it was kept under another key")
        if data_bytes > MAX_ENTRY_BYTES:
            raise Refused(f"it holds {data_bytes} bytes")
        table = tensor_table(header, data_bytes)
        data = bytearray(stream.read(data_bytes))
        if _digest(table, data) != metadata.get(_HASH):
            raise Refused("its tensors are not those that were kept")
    return {
        name: torch.frombuffer(data[entry.start : entry.end], dtype=torch.uint8)
        .view(DTYPES[entry.dtype])
        .reshape(entry.shape)
        for name, entry in table.items()
    }


def _digest(table: Mapping[str, TensorEntry], data: bytes | bytearray) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    names = repr([(name, entry.dtype, entry.shape) for name, entry in table.items()])
    return hashlib.sha256(names.encode() + b"\0" + data).hexdigest()

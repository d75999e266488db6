"""Reading .safetensors files without trusting them.

Everything about a file is learnt and checked from its first bytes and its header; tensors are read by
``pread`` one at a time. Nothing is memory-mapped: a file that is cut short while it is open gives an error
instead of killing the process. Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky5.errors import CheckpointError
from kandinsky5.model.file_kinds import PICKLE_REASON, PICKLE_SUFFIXES, kind_of

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000
MAX_ELEMENTS = 2**63 - 1
MAX_DIMENSIONS = 8
MAX_TENSORS = 50_000
"""In one file; the largest published models have 1,500, and a quarter more with scales beside them."""
MAX_HEADER_VALUES = 1_000_000
"""Commas and opening brackets, a bound for the objects a header becomes: above what so many tensors take."""

_LENGTH_BYTES = 8
_SNIFFED_BYTES = 512
_READ_BYTES = 1 << 30
_METADATA_KEY = "__metadata__"
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})

_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor.

    Attributes:
        dtype: the format's name, such as ``BF16``.
        shape: its sizes; empty for a scalar.
        begin, end: bytes from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin


class SafetensorsFile:
    """A checked .safetensors file, open for reading. Close it, or use it as a context manager.

    Args:
        path: a regular file.

    Attributes:
        path: the file.
        tensors: name → :class:`TensorInfo`, in the order of the header.
        metadata: the header's free text entries.
        size_bytes: of the file.
        modified_ns: when it was last written to, as the system tells.
        header_sha256: of the header's JSON, in hex; tells files apart by names, shapes and metadata.

    Raises:
        CheckpointError: missing, unreadable, another kind of file (named as what it is), cut short, or
            with a header that does not fit the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = _open_regular(path)
        try:
            opened = os.fstat(self._descriptor)
            self._identity = _identity_of(opened)
            self.size_bytes, self.modified_ns = opened.st_size, opened.st_mtime_ns
            header_bytes = self._header_length()
            self._data_start = _LENGTH_BYTES + header_bytes
            text = self._pread(header_bytes, _LENGTH_BYTES)
            self.header_sha256 = hashlib.sha256(text).hexdigest()
            header = self._parsed(text)
            self.metadata = self._metadata(header.pop(_METADATA_KEY, {}))
            self.tensors = {name: self._tensor(name, entry) for name, entry in header.items()}
            self._check_layout()
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its own dtype and shape, in fresh CPU memory.

        Raises:
            KeyError: no such tensor.
            CheckpointError: the file has become shorter or cannot be read, or torch lacks the dtype.
        """
        import torch  # whoever reads headers alone, as the page does, need not have it

        from kandinsky5.model.torch_dtypes import TORCH_DTYPES

        info = self.tensors[name]
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(self.path, f"{shown(name)} has dtype {info.dtype}, not supported")
        raw = torch.empty(info.size_bytes, dtype=torch.uint8)
        self.read_into(name, raw.numpy().data)
        return raw.view(TORCH_DTYPES[info.dtype]).view(info.shape)

    def read_into(self, name: str, target: memoryview, offset_bytes: int = 0) -> None:
        """Fill ``target`` with bytes of a tensor, from ``offset_bytes`` into it on. Threads may share a file.

        Args:
            name: of the tensor.
            target: writable bytes, contiguous; they must lie within the tensor.
            offset_bytes: where in the tensor they begin.

        Raises:
            KeyError: no such tensor.
            CheckpointError: the file has become shorter or cannot be read.
        """
        info = self.tensors[name]
        assert offset_bytes >= 0 and offset_bytes + len(target) <= info.size_bytes
        start, done = self._data_start + info.begin + offset_bytes, 0
        while done < len(target):
            part = target[done : done + _READ_BYTES]
            try:
                count = os.preadv(self._descriptor, [part], start + done)
            except OSError as error:
                raise CheckpointError(self.path, f"cannot be read ({error.strerror})") from error
            if count == 0:
                raise CheckpointError(
                    self.path,
                    f"became shorter while it was read ({shown(name)} is cut off): download it again",
                )
            done += count

    def check_unchanged(self) -> None:
        """Make sure that what was read came from the very file that now has the name.

        Raises:
            CheckpointError: it was removed, replaced or written to since it was opened.
        """
        try:
            now = _identity_of(os.stat(self.path))
        except OSError as error:
            raise CheckpointError(
                self.path, f"vanished while it was read ({error.strerror})"
            ) from error
        if now == self._identity:
            return
        what = "was replaced by another file"
        if now[:2] == self._identity[:2]:
            what = "became shorter" if now[2] < self.size_bytes else "was changed"
        raise CheckpointError(self.path, f"{what} while it was read: start again")

    def close(self) -> None:
        """Let go of the file; further reads fail."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pread(self, count: int, offset: int) -> bytes:
        try:
            return os.pread(self._descriptor, count, offset)
        except OSError as error:
            raise CheckpointError(self.path, f"cannot be read ({error.strerror})") from error

    def _header_length(self) -> int:
        """Length of the header in bytes, after what is no .safetensors file has been told apart."""
        first = self._pread(_SNIFFED_BYTES, 0)
        length = int.from_bytes(first[:_LENGTH_BYTES], "little")
        opens_like_header = first[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{"
        if not (opens_like_header and length <= MAX_HEADER_BYTES) and (kind := kind_of(first)):
            raise CheckpointError(self.path, kind)
        if self.path.suffix.lower() in PICKLE_SUFFIXES:
            raise CheckpointError(self.path, f"a {self.path.suffix} file: {PICKLE_REASON}")
        if self.size_bytes == 0:
            raise CheckpointError(self.path, "the file is empty: download it again")
        if len(first) <= _LENGTH_BYTES:
            raise CheckpointError(
                self.path, f"cut short after {len(first)} bytes: download it again"
            )
        if not opens_like_header or length < 2:
            raise CheckpointError(self.path, "not a .safetensors file")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                self.path,
                f"claims a header of {length} bytes, at most {MAX_HEADER_BYTES} are read:"
                " damaged or tampered with; download it again",
            )
        if _LENGTH_BYTES + length > self.size_bytes:
            raise self._wrong_size(_LENGTH_BYTES + length)
        return length

    def _parsed(self, text: bytes) -> dict[str, Any]:
        self._refuse_endless(text.count(b'"data_offsets"'), text)
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            cause = str(error) or type(error).__name__
            raise CheckpointError(
                self.path, f"its header is not valid JSON ({cause}): download it again"
            ) from error
        if not isinstance(header, dict):
            raise CheckpointError(self.path, "its header is not a JSON object: download it again")
        self._refuse_endless(len(header) - (_METADATA_KEY in header))
        return header

    def _refuse_endless(self, tensors: int, text: bytes = b"") -> None:
        """Refuse what would take long: before it becomes objects, told by counting bytes."""
        fault = ""
        if tensors > MAX_TENSORS:
            fault = f"names {tensors} tensors, at most {MAX_TENSORS} are read"
        elif sum(map(text.count, (b",", b"[", b"{"))) > MAX_HEADER_VALUES:
            fault = f"has a header of more than {MAX_HEADER_VALUES} values"
        if fault:
            raise CheckpointError(self.path, f"{fault}: no model's file, or tampered with")

    def _metadata(self, entry: object) -> dict[str, str]:
        if isinstance(entry, dict) and all(isinstance(value, str) for value in entry.values()):
            return entry
        raise CheckpointError(self.path, f"{_METADATA_KEY} in its header is not text by name")

    def _tensor(self, name: str, entry: object) -> TensorInfo:
        try:
            info = _tensor_info(entry)
        except ValueError as error:
            raise CheckpointError(
                self.path,
                f"its header describes {shown(name)} wrongly ({error}): download it again",
            ) from error
        return info

    def _check_layout(self) -> None:
        """Every byte behind the header belongs to exactly one tensor."""
        end, before = 0, "the header"
        by_place = sorted(self.tensors.items(), key=lambda item: (item[1].begin, item[1].end))
        for name, info in by_place:
            if info.begin != end:
                fault = "overlap" if info.begin < end else "leave a gap"
                raise CheckpointError(
                    self.path, f"{before} and {shown(name)} {fault}: damaged or tampered with"
                )
            end, before = info.end, shown(name)
        if self._data_start + end != self.size_bytes:
            raise self._wrong_size(self._data_start + end)

    def _wrong_size(self, expected_bytes: int) -> CheckpointError:
        return CheckpointError(
            self.path,
            f"header says {expected_bytes} bytes, the file has {self.size_bytes}: download it again",
        )


def shown(name: str) -> str:
    """A tensor's name fit for one line of a message: quoted, control characters escaped, not too long."""
    text = repr(name)
    return text if len(text) <= 100 else text[:97] + "…" + text[-1]


def _open_regular(path: Path) -> int:
    """A descriptor of a regular file; others are refused before opening, which on a pipe would block."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            what = "a folder" if path.is_dir() else "not a regular file"
            raise CheckpointError(path, f"{what}; a .safetensors file is needed")
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError as error:
        raise CheckpointError(path, "no such file") from error
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise CheckpointError(path, f"cannot be opened ({cause})") from error


def _identity_of(status: os.stat_result) -> tuple[int, int, int, int]:
    """What stays as long as a file is the same one with the same content: device, inode, size, time."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _tensor_info(entry: object) -> TensorInfo:
    """Raises ValueError saying what does not fit."""
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise ValueError("needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"unknown dtype {str(dtype)[:20]!r}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError("sizes and offsets must be whole numbers")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions, at most {MAX_DIMENSIONS}")
    elements = math.prod(shape)
    if (elements or math.prod(size or 1 for size in shape)) > MAX_ELEMENTS:
        raise ValueError("more elements than can be counted")
    begin, end = offsets
    if elements * _BITS[dtype] != (end - begin) * 8:
        raise ValueError(f"{end - begin} bytes for shape {shape} in {dtype}")
    return TensorInfo(dtype, tuple(shape), begin, end)


def _sizes(value: object) -> bool:
    # Without a generator, which takes three times as long: a header has many of them.
    return (
        isinstance(value, list)
        and {int}.issuperset(map(type, value))
        and min(value, default=0) >= 0
    )

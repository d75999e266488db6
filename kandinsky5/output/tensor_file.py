"""Safetensors files read without trusting them, and written deterministically. Only the standard library.

What a header claims is checked against the size of the file before anything is allocated.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kandinsky5.errors import UserError

MAX_HEADER_BYTES = 32 * 2**20
"""Far above the longest prompts."""
METADATA = "__metadata__"
ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}

_ALIGNMENT_BYTES = 8
_OTHER_KINDS = (
    (b"version https://git-lfs", "a Git-LFS pointer: fetch the file itself"),
    (b"GGUF", "a GGUF file"),
    (b"PK\x03\x04", "a zip or pickle: a pickle can run code; use .safetensors"),
    (b"\x80", "a pickle: a pickle can run code; use .safetensors"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"<", "a web page or XML: download the file itself"),
)


class Refused(ValueError):
    """What is wrong with a file, as the middle of a sentence."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header describes it; ``start`` and ``end`` in bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@contextmanager
def opened(path: str | Path, *, field: str, what: str, advice: str) -> Iterator[BinaryIO]:
    """The file, open for reading; whatever is wrong with it or in the block is a :class:`UserError`.

    Args:
        path: ``~`` is expanded.
        field: the option it was given by.
        what: the kind of file that is wanted ("a latents file").
        advice: what to give instead of a file that was :class:`Refused`.
    """
    try:
        file = Path(path).expanduser()
        if file.exists() and not file.is_file():
            raise UserError(field, str(path), f"{what}, not a folder or device")
        with file.open("rb") as stream:
            yield stream
    except Refused as error:
        raise UserError(field, str(path), f"{error}; {advice}") from error
    # RuntimeError: "~" where there is no home; ValueError: a NUL character.
    except (OSError, RuntimeError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(field, str(path), f"cannot be read ({reason})") from error


def read_header(stream: BinaryIO) -> tuple[dict[str, Any], int]:
    """(header, bytes of tensor data behind it); the stream then stands at the data.

    Raises:
        Refused: another kind of file, cut short, or a header that is too long or no JSON object.
    """
    file_bytes = os.fstat(stream.fileno()).st_size
    start = stream.read(64)
    for signature, kind in _OTHER_KINDS:
        # A header's length begins with any byte; that "{" follows it tells a safetensors file.
        if start.startswith(signature) and start[8:9] != b"{":
            raise Refused(f"this is {kind}")
    if len(start) < 8:
        raise Refused(f"cut short: {len(start)} bytes")
    (length,) = struct.unpack("<Q", start[:8])
    if length > file_bytes - 8:
        raise Refused(f"its header claims {length} bytes, the file has {file_bytes}")
    if length > MAX_HEADER_BYTES:
        raise Refused(f"its header claims {length} bytes, at most {MAX_HEADER_BYTES} are read")
    stream.seek(8)
    try:
        header = json.loads(stream.read(length))
    except (ValueError, RecursionError) as error:
        raise Refused("its header is no JSON") from error
    if not isinstance(header, dict):
        raise Refused("its header is no JSON object")
    return header, file_bytes - 8 - length


def tensor_table(header: Mapping[str, Any], data_bytes: int) -> dict[str, TensorEntry]:
    """The tensors in the order of their bytes, when they fill the file without gap or overlap.

    Raises:
        Refused: naming the first tensor that is malformed or lies wrongly.
    """
    found = {name: _entry(name, values) for name, values in header.items() if name != METADATA}
    table = dict(sorted(found.items(), key=lambda item: item[1].start))
    at = 0
    for name, entry in table.items():
        if entry.start != at:
            raise Refused(f"its tensor {name[:60]} begins at byte {entry.start}, {at} is free")
        at = entry.end
    if at != data_bytes:
        raise Refused(f"header says {at} bytes of tensors, the file has {data_bytes}")
    return table


def _entry(name: str, values: Any) -> TensorEntry:
    shown = name[:60]
    if not isinstance(values, dict) or set(values) != {"dtype", "shape", "data_offsets"}:
        raise Refused(f"the entry of its tensor {shown} is malformed")
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise Refused(
            f"its tensor {shown} is {str(dtype)[:20]}, not one of {', '.join(ELEMENT_BYTES)}"
        )
    counts = isinstance(shape, list) and all(type(n) is int and 0 < n < 2**32 for n in shape)
    if not counts or len(shape) > 8:
        raise Refused(f"its tensor {shown} has the shape {str(shape)[:60]}")
    whole = isinstance(offsets, list) and all(type(n) is int and n >= 0 for n in offsets)
    size_bytes = ELEMENT_BYTES[dtype] * math.prod(shape)
    if not whole or len(offsets) != 2 or offsets[1] - offsets[0] != size_bytes:
        raise Refused(f"its tensor {shown} takes {size_bytes} bytes, not {str(offsets)[:60]}")
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def header_bytes(table: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """Length and header as they stand at the beginning of a file; equal arguments give equal bytes."""
    header: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))}
    for name, entry in table.items():
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return struct.pack("<Q", len(text)) + text

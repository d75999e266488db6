"""Latents on disk: what a job has computed, with the request that it belongs to.

One safetensors file with one tensor ``latents`` [T, H, W, C] float32 and the request as JSON in the header.
Unlike in a video's metadata its paths stay whole: the file is there to go on from, on this machine.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from kandinsky5.errors import UserError
from kandinsky5.output.atomic import prepare_output, replacing
from kandinsky5.request import GenerationRequest

TENSOR = "latents"
REQUEST_KEY = "request"
MAX_HEADER_BYTES = 32 * 2**20
"""Far above the longest prompts."""
MAX_LATENTS_BYTES = 4 * 2**30
"""Eight times those of the longest and largest video."""

_OTHER_KINDS = (
    (b"version https://git-lfs", "a Git-LFS pointer: fetch the file itself"),
    (b"GGUF", "a GGUF file"),
    (b"PK\x03\x04", "a zip or pickle: a pickle can run code; use .safetensors"),
    (b"\x80", "a pickle: a pickle can run code; use .safetensors"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"<", "a web page or XML: download the file itself"),
)


def save_latents(path: str | Path, latents: torch.Tensor, request: GenerationRequest) -> None:
    """Write latents and request; equal arguments give equal bytes.

    Args:
        path: the final name; it appears whole or not at all.
        latents: [T, H, W, C], any device and floating dtype; stored as float32.
        request: what is being made.

    Raises:
        ValueError: not four dimensions.
        UserError: a path that cannot be written.
        DiskFull: too little room.
    """
    if latents.ndim != 4 or not latents.numel():
        raise ValueError(f"latents {list(latents.shape)}; [T, H, W, C] is wanted")
    tensor = latents.detach().to("cpu", torch.float32).contiguous()
    # One key only: the order of several in the header would be left to chance.
    data = safetensors.torch.save({TENSOR: tensor}, {REQUEST_KEY: json.dumps(request.to_dict())})
    final = prepare_output(path, needed_bytes=len(data))
    with replacing(final, needed_bytes=len(data)) as temporary:
        temporary.write_bytes(data)


def load_latents(
    path: str | Path,
    *,
    field: str = "init_latents",
    shape: tuple[int, int, int, int] | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Read a latents file without trusting it.

    Args:
        path: the file; ``~`` is expanded.
        field: the option it was given by, for the message.
        shape: (T, H, W, C) that are wanted, if there is only one possibility.

    Returns:
        The tensor [T, H, W, C] float32, finite, on the CPU; and the request as a dictionary, empty when the
        file holds none. It is unchecked: :meth:`GenerationRequest.from_dict` names what is wrong with it.

    Raises:
        UserError: missing, another kind of file, tampered with, or of another shape.
    """
    try:
        file = Path(path).expanduser()
        if file.exists() and not file.is_file():
            raise UserError(field, str(path), "a latents file, not a folder or device")
        with file.open("rb") as stream:
            header, size = _read_header(stream)
            found = _checked_shape(header, size)
            if shape is not None and found != shape:
                raise _Refused(f"latents {list(found)} where {list(shape)} are wanted")
            latents = _read_tensor(stream, found)
        return latents, _request(header)
    except _Refused as error:
        raise UserError(
            field, str(path), f"{error}; give a file that --save-latents wrote"
        ) from error
    # RuntimeError: "~" where there is no home; ValueError: a NUL character.
    except (OSError, RuntimeError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(field, str(path), f"cannot be read ({reason})") from error


class _Refused(ValueError):
    """What is wrong with the file."""


def _read_header(stream: BinaryIO) -> tuple[dict[str, Any], int]:
    """(header, bytes of tensor data behind it)."""
    file_bytes = os.fstat(stream.fileno()).st_size
    start = stream.read(64)
    for signature, kind in _OTHER_KINDS:
        # A header's length begins with any byte; that "{" follows it tells a safetensors file.
        if start.startswith(signature) and start[8:9] != b"{":
            raise _Refused(f"this is {kind}")
    if len(start) < 8:
        raise _Refused(f"cut short: {len(start)} bytes")
    (length,) = struct.unpack("<Q", start[:8])
    if length > file_bytes - 8:
        raise _Refused(f"its header claims {length} bytes, the file has {file_bytes}")
    if length > MAX_HEADER_BYTES:
        raise _Refused(f"its header claims {length} bytes, at most {MAX_HEADER_BYTES} are read")
    stream.seek(8)
    try:
        header = json.loads(stream.read(length))
    except (ValueError, RecursionError) as error:
        raise _Refused("its header is no JSON") from error
    if not isinstance(header, dict):
        raise _Refused("its header is no JSON object")
    return header, file_bytes - 8 - length


def _checked_shape(header: dict[str, Any], data_bytes: int) -> tuple[int, int, int, int]:
    """(T, H, W, C) when the header describes exactly one latents tensor that fills the file."""
    names = [name for name in header if name != "__metadata__"]
    if names != [TENSOR]:
        shown = ", ".join(names[:3]) or "none"
        raise _Refused(f"its tensors are {shown} ({len(names)}), not the one named {TENSOR}")
    entry = header[TENSOR]
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Refused("the tensor's entry in its header is malformed")
    dims = entry["shape"]
    counts = isinstance(dims, list) and all(type(n) is int and 0 < n < 2**32 for n in dims)
    if not counts or len(dims) != 4:
        raise _Refused(f"its tensor has the shape {str(dims)[:60]}, not [T, H, W, C]")
    if entry["dtype"] != "F32":
        raise _Refused(f"its tensor is {str(entry['dtype'])[:20]}, not F32")
    tensor_bytes = 4 * math.prod(dims)
    if tensor_bytes > MAX_LATENTS_BYTES:
        raise _Refused(f"its tensor claims {tensor_bytes} bytes, at most {MAX_LATENTS_BYTES}")
    if entry["data_offsets"] != [0, tensor_bytes] or tensor_bytes != data_bytes:
        raise _Refused(f"header says {tensor_bytes} bytes of latents, the file has {data_bytes}")
    return (dims[0], dims[1], dims[2], dims[3])


def _read_tensor(stream: BinaryIO, shape: tuple[int, ...]) -> torch.Tensor:
    # Read, not mapped: a mapped file that is cut short later kills the process.
    data = bytearray(4 * math.prod(shape))
    if stream.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise _Refused("cut short while it was read")
    latents = torch.frombuffer(data, dtype=torch.float32).reshape(shape)
    if not bool(torch.isfinite(latents).all()):
        raise _Refused("its latents hold NaN or infinite values")
    return latents


def _request(header: dict[str, Any]) -> dict[str, Any]:
    metadata = header.get("__metadata__")
    text = metadata.get(REQUEST_KEY) if isinstance(metadata, dict) else None
    if text is None:
        return {}
    try:
        request = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        raise _Refused("the request in its header is no JSON object")
    return request

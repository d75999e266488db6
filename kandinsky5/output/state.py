"""Latents on disk: what a job has computed, with the request that it belongs to.

One safetensors file with one tensor ``latents`` [T, H, W, C] float32 and the request as JSON in the header.
Unlike in a video's metadata its paths stay whole: the file is there to go on from, on this machine.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from kandinsky5.output.atomic import prepare_output, replacing
from kandinsky5.output.tensor_file import METADATA, Refused, opened, read_header
from kandinsky5.request import GenerationRequest

TENSOR = "latents"
REQUEST_KEY = "request"
MAX_LATENTS_BYTES = 4 * 2**30
"""Eight times those of the longest and largest video."""


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
    advice = "give a file that --save-latents wrote"
    with opened(path, field=field, what="a latents file", advice=advice) as stream:
        header, size = read_header(stream)
        found = _checked_shape(header, size)
        if shape is not None and found != shape:
            raise Refused(f"latents {list(found)} where {list(shape)} are wanted")
        return _read_tensor(stream, found), _request(header)


def _checked_shape(header: dict[str, Any], data_bytes: int) -> tuple[int, int, int, int]:
    """(T, H, W, C) when the header describes exactly one latents tensor that fills the file."""
    names = [name for name in header if name != METADATA]
    if names != [TENSOR]:
        shown = ", ".join(names[:3]) or "none"
        raise Refused(f"its tensors are {shown} ({len(names)}), not the one named {TENSOR}")
    entry = header[TENSOR]
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Refused("the tensor's entry in its header is malformed")
    dims = entry["shape"]
    counts = isinstance(dims, list) and all(type(n) is int and 0 < n < 2**32 for n in dims)
    if not counts or len(dims) != 4:
        raise Refused(f"its tensor has the shape {str(dims)[:60]}, not [T, H, W, C]")
    if entry["dtype"] != "F32":
        raise Refused(f"its tensor is {str(entry['dtype'])[:20]}, not F32")
    tensor_bytes = 4 * math.prod(dims)
    if tensor_bytes > MAX_LATENTS_BYTES:
        raise Refused(f"its tensor claims {tensor_bytes} bytes, at most {MAX_LATENTS_BYTES}")
    if entry["data_offsets"] != [0, tensor_bytes] or tensor_bytes != data_bytes:
        raise Refused(f"header says {tensor_bytes} bytes of latents, the file has {data_bytes}")
    return (dims[0], dims[1], dims[2], dims[3])


def _read_tensor(stream: BinaryIO, shape: tuple[int, ...]) -> torch.Tensor:
    # Read, not mapped: a mapped file that is cut short later kills the process.
    data = bytearray(4 * math.prod(shape))
    if stream.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise Refused("cut short while it was read")
    latents = torch.frombuffer(data, dtype=torch.float32).reshape(shape)
    if not bool(torch.isfinite(latents).all()):
        raise Refused("its latents hold NaN or infinite values")
    return latents


def _request(header: dict[str, Any]) -> dict[str, Any]:
    metadata = header.get(METADATA)
    text = metadata.get(REQUEST_KEY) if isinstance(metadata, dict) else None
    if text is None:
        return {}
    try:
        request = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        raise Refused("the request in its header is no JSON object")
    return request

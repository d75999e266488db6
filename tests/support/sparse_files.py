"""Checkpoint files whose data takes no room on the disk."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

Described = dict[str, tuple[str, tuple[int, ...]]]
"""Name of a tensor → (dtype as the format has it, shape)."""

SIZES = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}


def write_sparse(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: dict | None = None
) -> Path:
    """A valid file of these tensors, all of them zeros."""
    header: dict = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + SIZES[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def grown_to(path: Path, size_bytes: int) -> Path:
    """The file with zeros behind what it has."""
    os.truncate(path, size_bytes)
    return path


def shapes_of(model: type, config: object) -> dict[str, tuple[int, ...]]:
    """Name → shape of a model's state."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in model(config).state_dict().items()}

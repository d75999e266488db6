"""Whether memory ran out because it lies in pieces: a new process then has what this one cannot use."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

MIN_SHARE = 0.1
"""Of what is reserved: pieces that are less of it are no cause, whatever was asked for."""

_ASKED = re.compile(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB|TiB)")
_MAIN_MEMORY = "DefaultCPUAllocator"
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


@dataclass(frozen=True)
class DeviceMemory:
    """What torch's allocator has of a device.

    Attributes:
        reserved_bytes: taken from the device.
        allocated_bytes: of these, in tensors.
    """

    reserved_bytes: int
    allocated_bytes: int


def lies_in_pieces(error: BaseException) -> bool:
    """Whether device memory ran out because it lies in pieces; to be asked before anything is let go."""
    if isinstance(error, MemoryError) or _MAIN_MEMORY in str(error):
        return False
    return is_in_pieces(device_memory(), asked_bytes(error))


def device_memory() -> DeviceMemory | None:
    """Of the current GPU, as it is now; None without one: torch does not divide up main memory."""
    if not torch.cuda.is_available():
        return None
    return DeviceMemory(torch.cuda.memory_reserved(), torch.cuda.memory_allocated())


def asked_bytes(error: BaseException) -> int:
    """What the allocator could not give, by its message; 0 where that does not tell."""
    found = _ASKED.search(str(error))
    return round(float(found[1]) * _UNITS[found[2]]) if found else 0


def is_in_pieces(memory: DeviceMemory | None, asked: int) -> bool:
    """Whether what was asked for would fit into what is reserved and in no tensor.

    The allocator gives back whole free segments before it says that memory ran out; what it still holds then
    are gaps between tensors.

    Args:
        memory: at that moment, before anything was let go.
        asked: bytes that could not be given; 0 where that is not known.
    """
    if memory is None:
        return False
    gaps = memory.reserved_bytes - memory.allocated_bytes
    return gaps >= max(1, asked, MIN_SHARE * memory.reserved_bytes)

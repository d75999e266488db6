"""Which device and which dtype a job runs in."""

from __future__ import annotations

import torch

from kandinsky5.errors import UserError


def choose_device(wanted: str) -> torch.device:
    """``auto`` is the first GPU, or the CPU where there is none.

    Raises:
        UserError: the device asked for is not there.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            "device", wanted, f"{torch.cuda.device_count()} CUDA devices are here; cpu works"
        )
    return device


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 on a GPU and float32 on a CPU."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]

"""How fast a conversion is and how much memory it takes: ``k1.py bench convert``."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from kandinsky5.circumstances import circumstances
from kandinsky5.conversion.convert import convert
from kandinsky5.conversion.plan import laid_out
from kandinsky5.errors import UserError
from kandinsky5.memory import meter
from kandinsky5.model.dit import DiffusionTransformer3D, DiTConfig
from kandinsky5.model.recipes import CHUNK_VALUES, TensorSpec, bytes_of
from kandinsky5.output.atomic import require_space

_SMALL = DiTConfig(
    model_dim=128, ff_dim=256, num_text_blocks=1, num_visual_blocks=1, axes_dims=(16, 24, 24)
)
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def conversion(
    *, blocks: int = 2, folder: str | None = None, dtype: str = "bf16", holes: bool = False
) -> dict[str, Any]:
    """Convert a made-up checkpoint in Lite's shapes to int8, and measure.

    Args:
        blocks: visual blocks; 32 is the whole of Lite, 4 GB in bf16; 16 are 4 GB in fp32.
        folder: where there is room for one and a half such files; the system's temporary one if left out.
        dtype: of the checkpoint, ``bf16`` or ``fp32``.
        holes: have the checkpoint be zeros for which the disk keeps no blocks. It is read and converted as
            any other, and takes as much memory; only writing it costs nothing.

    Returns:
        JSON-ready: seconds, bytes before and after, ``extra_rss_bytes``: peak of resident memory above
        what the process had before (0 where the system does not tell).

    Raises:
        UserError: field ``blocks``, not 1 to 512; field ``dtype``.
    """
    if not 1 <= blocks <= 512:
        raise UserError("blocks", blocks, "1 to 512")
    if dtype not in _DTYPES:
        raise UserError("dtype", dtype, f"one of {', '.join(_DTYPES)}")
    with tempfile.TemporaryDirectory(dir=folder, prefix="k1-bench-") as name:
        source, out = Path(name) / "source.safetensors", Path(name) / "int8.safetensors"
        write_checkpoint(source, _SMALL)
        convert(source, out, "int8")  # what is loaded and kept for the first time is not its own
        out.unlink()
        config = dataclasses.replace(DiTConfig(), num_visual_blocks=blocks)
        write_checkpoint(source, config, _DTYPES[dtype], holes=holes)
        meter.start_measuring()
        before_bytes = meter.peaks().rss_bytes  # just begun, the peak is what there is now
        started = time.monotonic()
        done = convert(source, out, "int8")
        seconds = time.monotonic() - started
        extra_rss_bytes = meter.peaks().rss_bytes - before_bytes
    return {
        "benchmark": "convert",
        "blocks": blocks,
        "dtype": dtype,
        "holes": holes,
        "source_bytes": done.source_bytes,
        "size_bytes": done.size_bytes,
        "seconds": round(seconds, 2),
        "source_bytes_per_s": round(done.source_bytes / seconds),
        "extra_rss_bytes": extra_rss_bytes,
        "threads": torch.get_num_threads(),
        **circumstances(),
    }


def write_checkpoint(
    path: Path, config: DiTConfig, dtype: torch.dtype = torch.bfloat16, *, holes: bool = False
) -> None:
    """A checkpoint with random numbers, written a few million at a time, or with holes that read as zeros."""
    with torch.device("meta"):
        state = DiffusionTransformer3D(config).state_dict()
    entries = [(name, TensorSpec(dtype, tuple(t.shape))) for name, t in state.items()]
    header, _, size_bytes = laid_out(entries, {})
    require_space(path, len(header) if holes else size_bytes)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(CHUNK_VALUES, generator=generator).mul_(0.02).to(dtype)
    with path.open("wb") as file:
        file.write(header)
        if holes:
            file.truncate(size_bytes)
            return
        for _, tensor in state.items():
            for first in range(0, tensor.numel(), CHUNK_VALUES):
                file.write(bytes_of(numbers[: min(CHUNK_VALUES, tensor.numel() - first)]))

"""Pro in its true shapes on a CPU, its int8 weights streamed from the disk (A10).

The weights are random; what is shown is how much main memory the way from file to velocity takes, and that
every byte of a block is read once for a guided step.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kandinsky5.bench.blocks import MODULATION, config_of, shape_of
from kandinsky5.bench.random_file import write_random_transformer
from kandinsky5.circumstances import circumstances
from kandinsky5.errors import UserError
from kandinsky5.memory import meter
from kandinsky5.memory.layout import BlockLayout
from kandinsky5.model.dit import DiTConfig
from kandinsky5.model.reader import TransformerReader
from kandinsky5.model.text import Conditioning
from kandinsky5.pipeline.denoise import Guidance, StepState, denoise, draw_noise, schedule
from kandinsky5.pipeline.transformer import BLOCKS, Placement, TransformerTenant

TARGET_RSS_BYTES = 4_000_000_000
TEXT_TOKENS = (8, 5)
"""Of the prompt and of the negative one."""
GUIDANCE, SHIFT = 5.0, 5.0
SLOTS, RING = 2, 2
TOKENS_PER_FRAME = 4
MAX_TOKENS = 512
CPU = torch.device("cpu")
_IO = Path("/proc/self/io")


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        reads: name of a tensor → how often it was read in the loop.
        system_bytes: read in the loop, as the system counts; None where it does not tell.
        prepare_s, prepare_rss_bytes: of what a schedule needs once.
        between_rss_bytes: when that is given back and the loop has not begun.
        steps: ``seconds``, ``h2d_bytes`` and ``stall_s`` of each.
        rss_bytes: peak of the loop.
        finite: whether all numbers of the result are.
    """

    reads: Counter[str]
    system_bytes: int | None
    prepare_s: float
    prepare_rss_bytes: int
    between_rss_bytes: int
    steps: list[dict[str, Any]]
    rss_bytes: int
    finite: bool


class CountingReader(TransformerReader):
    """Counts how often each tensor is read.

    Attributes:
        reads: by name.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, dtype=torch.bfloat16)
        self.reads: Counter[str] = Counter()
        self._counting = threading.Lock()

    def __enter__(self) -> CountingReader:
        return self

    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        with self._counting:
            self.reads.update(targets.keys())
        super().read_into(targets)


def pro_forward(
    *,
    model: str = "pro",
    blocks: int | None = None,
    text_blocks: int | None = None,
    tokens: int = 4,
    steps: int = 2,
    folder: str | None = None,
) -> dict[str, Any]:
    """Write random int8 weights in Pro's shapes, run guided steps from the disk, and delete them.

    Args:
        model: another member of the family, whose blocks are smaller.
        blocks: visual blocks; None for all, of Pro 60 and 22 GB.
        text_blocks: None for all.
        tokens: visual tokens, a multiple of 4.
        steps: guided ones.
        folder: where there is room for the file; None for the system's temporary one.

    Returns:
        JSON-ready: file and block sizes, seconds and bytes of each step, peaks of resident memory,
        ``each_byte_once``, ``reached`` {A10} (None for less than the whole of Pro), and the circumstances.

    Raises:
        UserError: a number that cannot be used, or a disk without room.
    """
    shape = shape_of(model)
    count = shape.visual_blocks if blocks is None else blocks
    texts = shape.text_blocks if text_blocks is None else text_blocks
    if not (SLOTS < count <= shape.visual_blocks and 1 <= texts <= shape.text_blocks and steps > 0):
        allowed = (
            f"{SLOTS + 1} to {shape.visual_blocks} blocks, 1 to {shape.text_blocks} text blocks"
        )
        raise UserError("blocks", [count, texts, steps], f"{allowed}, 1 step or more")
    if not 0 < tokens <= MAX_TOKENS or tokens % TOKENS_PER_FRAME:
        raise UserError("tokens", tokens, f"a multiple of {TOKENS_PER_FRAME} to {MAX_TOKENS}")
    config = replace(config_of(shape), num_visual_blocks=count, num_text_blocks=texts)
    with tempfile.TemporaryDirectory(dir=_folder(folder), prefix="k1-pro-") as name:
        path = Path(name) / "int8.safetensors"
        begun = time.monotonic()
        file_bytes = write_random_transformer(path, config)
        write_s = time.monotonic() - begun
        meter.start_measuring()
        before_bytes = meter.peaks().rss_bytes  # just begun, the peak is what there is now
        with CountingReader(path) as reader:
            layouts = [
                BlockLayout.of(block, skip=(MODULATION,))
                for block in reader.model.visual_transformer_blocks
            ]
            measured = run(reader, tokens=tokens, steps=steps)
    told = _told(measured, layouts, steps, before_bytes)
    whole = (model, count, texts) == ("pro", shape.visual_blocks, shape.text_blocks)
    return {
        "benchmark": "pro-forward",
        "model": model,
        "blocks": count,
        "text_blocks": texts,
        "tokens": tokens,
        "slots": SLOTS,
        "ring": RING,
        "threads": torch.get_num_threads(),
        "file_bytes": file_bytes,
        "write_s": round(write_s, 1),
        **told,
        "reached": {"A10": _reached(told) if whole else None},
        **circumstances(),
    }


@torch.inference_mode()
def run(reader: CountingReader, *, tokens: int, steps: int) -> Measured:
    """Guided steps from noise as a job takes them, with no block resident."""
    placement = Placement(resident=0, slots=SLOTS, source="disk", ring=RING)
    tenant = TransformerTenant(reader, device=CPU, placement=placement)
    positive, negative = (_conditioning(reader.model.config, n) for n in TEXT_TOKENS)
    guidance = Guidance(positive, negative, GUIDANCE)
    times = schedule(steps, SHIFT)
    shape = (tokens // TOKENS_PER_FRAME, 4, 4, reader.model.config.in_visual_dim)
    noise = draw_noise(shape, torch.Generator().manual_seed(1))
    begun = time.monotonic()
    conditioning = tenant.prepare(guidance.conditionings, times[:-1].tolist())
    prepare_s, prepare_rss_bytes = time.monotonic() - begun, meter.peaks().rss_bytes
    reader.reads.clear()
    meter.start_measuring()
    between_rss_bytes = meter.peaks().rss_bytes
    before, told = _system_bytes(), []
    begun = time.monotonic()
    transformer = tenant.enter()
    traffic = transformer.traffic

    def step_done(state: StepState) -> None:
        nonlocal traffic, begun
        now, ended = transformer.traffic, time.monotonic()
        moved = now - traffic
        told.append(
            {
                "seconds": round(ended - begun, 2),
                "h2d_bytes": moved.h2d_bytes,
                "d2h_bytes": moved.d2h_bytes,
                "stall_s": round(moved.stall_s, 2),
            }
        )
        traffic, begun = now, ended

    latent = denoise(
        transformer,
        noise,
        guidance,
        times,
        conditioning=conditioning,
        expect_passes=transformer.expect,
        on_step=step_done,
    )
    tenant.close()
    after = _system_bytes()
    return Measured(
        reads=reader.reads,
        system_bytes=None if before is None or after is None else after - before,
        prepare_s=prepare_s,
        prepare_rss_bytes=prepare_rss_bytes,
        between_rss_bytes=between_rss_bytes,
        steps=told,
        rss_bytes=meter.peaks().rss_bytes,
        finite=bool(latent.isfinite().all()),
    )


def _told(
    measured: Measured, layouts: list[BlockLayout], steps: int, before_bytes: int
) -> dict[str, Any]:
    step_bytes = sum(layout.tensor_bytes for layout in layouts)
    laps = [_laps(measured.reads, index, layout) for index, layout in enumerate(layouts)]
    peak_bytes = max(measured.prepare_rss_bytes, measured.rss_bytes)
    return {
        "block_bytes": layouts[0].tensor_bytes,
        "read_bytes_per_step": step_bytes,
        "system_read_bytes": measured.system_bytes,
        "each_byte_once": laps == [steps] * len(laps),
        "steps": measured.steps,
        "prepare_s": round(measured.prepare_s, 2),
        "rss_before_bytes": before_bytes,
        "prepare_peak_rss_bytes": measured.prepare_rss_bytes,
        "between_rss_bytes": measured.between_rss_bytes,
        "denoise_peak_rss_bytes": measured.rss_bytes,
        "peak_rss_bytes": peak_bytes,
        "finite": measured.finite,
    }


def _reached(told: dict[str, Any]) -> bool:
    return told["each_byte_once"] and told["finite"] and told["peak_rss_bytes"] <= TARGET_RSS_BYTES


def _laps(reads: Counter[str], index: int, layout: BlockLayout) -> int | None:
    """How often a block was read; None if not all of its tensors alike, or its modulation too."""
    start = f"{BLOCKS}.{index}."
    times = {reads[start + entry.name] for entry in layout.entries}
    strangers = [name for name in reads if name.startswith(f"{start}{MODULATION}.")]
    return times.pop() if len(times) == 1 and not strangers else None


def _conditioning(config: DiTConfig, text_tokens: int) -> Conditioning:
    generator = torch.Generator().manual_seed(text_tokens)
    text = torch.randn(text_tokens, config.in_text_dim, generator=generator)
    return Conditioning(text, torch.randn(config.in_text_dim2, generator=generator))


def _folder(folder: str | None) -> str | None:
    if folder is not None and not Path(folder).is_dir():
        raise UserError("folder", folder, "a folder that exists")
    return folder


def _system_bytes() -> int | None:
    """Read by this process so far, from memory or disk, as Linux counts."""
    try:
        lines = _IO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("rchar:")), None)

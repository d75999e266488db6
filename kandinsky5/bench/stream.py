"""Streaming on a GPU against the whole stack resident, and against swapping by eviction (B3, B4).

Blocks of the true shapes with random weights, each block different; one evaluation of the visual blocks is a
step. No time is told unless all ways give the same numbers to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kandinsky5.bench.baselines import baseline
from kandinsky5.bench.blocks import MODULATION, config_of, empty_blocks, shape_of
from kandinsky5.circumstances import circumstances
from kandinsky5.errors import UserError
from kandinsky5.family import TransformerShape
from kandinsky5.memory.host import HostSlab, page_lock_for
from kandinsky5.memory.layout import BlockLayout
from kandinsky5.memory.residency import Residency
from kandinsky5.memory.source import PinnedSource
from kandinsky5.memory.streamer import Streamer
from kandinsky5.memory.transfer import CudaTransfer
from kandinsky5.model.rope import rope_angles_3d, rope_of

TEXT_TOKENS = 256
GRIDS = {"512x768x121": (31, 32, 48), "1024x1024x1": (1, 64, 64)}
"""Tokens along time, height and width."""
RATIO_LIMIT = 1.02
COPY_RATE_LIMIT = 0.9
BASELINE_LIMIT = 1.25
_COPIES = 8


@dataclass(frozen=True)
class Measured:
    """One way of running the stack.

    Attributes:
        output: of the last step, for comparison.
        step_s: mean over the steps.
        peak_bytes: most device memory reserved.
    """

    output: torch.Tensor
    step_s: float
    peak_bytes: int


def stream(
    *,
    model: str = "pro",
    weights: str = "bf16",
    size: str = "512x768x121",
    blocks: int | None = None,
    slots: int = 2,
    steps: int = 2,
) -> dict[str, Any]:
    """Time one evaluation of the visual blocks: resident, streamed, and swapped by eviction.

    Args:
        model: ``pro``, ``lite`` or ``image``.
        weights: ``bf16`` or ``int8``.
        size: a key of :data:`GRIDS`.
        blocks: how many of the model's; None for all.
        slots: buffers on the device for the streamed way.
        steps: timed, after one that is not.

    Returns:
        JSON-ready: seconds a step of each way, ``streamed_over_resident``, ``copy_rate_share`` of what a copy
        alone reaches, ``d2h_copies`` seen by the profiler, peaks, ``reached`` {B3, B4}, the circumstances.

    Raises:
        UserError: no CUDA device, or a value that cannot be used.
        RuntimeError: the ways give different numbers.
    """
    if not torch.cuda.is_available():
        raise UserError("bench", "stream", "a machine with a CUDA device")
    if size not in GRIDS or steps < 1 or slots < 1:
        raise UserError("bench", [size, steps, slots], f"a size of {', '.join(GRIDS)}; 1 or more")
    device = torch.device("cuda", torch.cuda.current_device())
    shape = shape_of(model)
    stack = empty_blocks(shape, weights, blocks)
    step = StackStep(stack, shape, GRIDS[size], device)
    with torch.inference_mode():
        rate_gb_s = copy_rate_gb_s(BlockLayout.of(stack[0], (MODULATION,)).nbytes, device)
        resident, streamed, extra = _ours(stack, step, slots, steps, device)
        swapped = _baseline(stack, step, steps, device)
    for other in (streamed, swapped):
        if other is not None and not torch.equal(other.output, resident.output):
            raise RuntimeError("the ways give different numbers, so their times mean nothing")
    ratio = streamed.step_s / resident.step_s
    share = extra["streamed_gb_s"] / rate_gb_s
    gain = None if swapped is None else swapped.step_s / streamed.step_s
    b3 = ratio <= RATIO_LIMIT and share >= COPY_RATE_LIMIT and extra["d2h_copies"] == 0
    return {
        "benchmark": "stream",
        "model": model,
        "weights": weights,
        "size": size,
        "blocks": len(stack),
        "slots": slots,
        "resident_s": round(resident.step_s, 4),
        "streamed_s": round(streamed.step_s, 4),
        "swapped_s": None if swapped is None else round(swapped.step_s, 4),
        "streamed_over_resident": round(ratio, 4),
        "swapped_over_streamed": None if gain is None else round(gain, 3),
        "pinned_copy_gb_s": round(rate_gb_s, 2),
        "copy_rate_share": round(share, 3),
        **extra,
        "peak_bytes": {"resident": resident.peak_bytes, "streamed": streamed.peak_bytes},
        "reached": {"B3": b3, "B4": None if gain is None else gain >= BASELINE_LIMIT},
        **circumstances(),
    }


class RandomWeights:
    """Random weights for blocks that are alike: one draw for all, and biases that tell them apart.

    Args:
        layouts: of the blocks.
    """

    def __init__(self, layouts: list[BlockLayout]) -> None:
        self._layouts = layouts
        self._drawn = torch.zeros(layouts[0].nbytes, dtype=torch.uint8)
        torch.manual_seed(0)
        for name, view in layouts[0].views(self._drawn).items():
            if view.dtype == torch.int8:
                view.random_(-127, 128)
            elif name.endswith("_scales"):
                view.fill_(0.02 / 127)
            elif name.endswith("norm.weight"):
                view.fill_(1.0)
            elif name.endswith("weight"):
                view.normal_(std=0.02)

    def __call__(self, index: int, slab: torch.Tensor) -> None:
        slab.copy_(self._drawn)
        for name, view in self._layouts[index].views(slab).items():
            if name.endswith("bias"):
                view.normal_(generator=torch.Generator().manual_seed(index))


class StackStep:
    """One evaluation of a stack of visual blocks; the input is the same each time.

    Args:
        blocks: the stack.
        shape: its dimensions.
        grid: tokens along time, height and width.
        device: where it computes.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        shape: TransformerShape,
        grid: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        self._blocks = blocks
        dim, tokens = shape.model_dim, grid[0] * grid[1] * grid[2]
        torch.manual_seed(1)
        self._x = torch.randn(tokens, dim, device=device, dtype=torch.bfloat16)
        self._text = torch.randn(TEXT_TOKENS, dim, device=device, dtype=torch.bfloat16)
        self._modulation = 0.1 * torch.randn(1, 9 * dim, device=device)
        axes = config_of(shape).axes_dims
        self._rope = rope_of(rope_angles_3d(grid, axes, (1.0, 1.0, 1.0), device))

    def __call__(self, before: Callable[[int], None] = lambda index: None) -> torch.Tensor:
        x = self._x.clone()
        for index, block in enumerate(self._blocks):
            before(index)
            x = block(x, self._text, self._modulation, self._rope)
        return x


def copy_rate_gb_s(nbytes: int, device: torch.device) -> float:
    """What copies from page-locked memory reach when nothing else is done."""
    host, engine = HostSlab(nbytes, page_lock_for(device)), CudaTransfer(device)
    try:
        slot = engine.allocate(nbytes)
        for _ in range(2):  # the first round wakes the link
            before_s = engine.copy_s()
            for _ in range(_COPIES):
                engine.copy(slot, host.bytes, engine.mark())
            torch.cuda.synchronize(device)
        return _COPIES * nbytes / (engine.copy_s() - before_s) / 1e9
    finally:
        engine.close()
        host.free()


def _ours(
    stack: nn.ModuleList, step: StackStep, slots: int, steps: int, device: torch.device
) -> tuple[Measured, Measured, dict[str, Any]]:
    """Resident, streamed, and what the streamer and the profiler tell of the latter."""
    layouts = [BlockLayout.of(block, skip=(MODULATION,)) for block in stack]
    source = PinnedSource(layouts, RandomWeights(layouts), page_lock=page_lock_for(device))
    try:
        with Streamer(stack, source, device=device, resident=range(len(stack))) as streamer:
            resident = _measured(step, streamer, steps, device)
        Residency().release()
        engine = CudaTransfer(device)
        with Streamer(stack, source, device=device, slots=slots, engine=engine) as streamer:
            streamed = _measured(step, streamer, steps, device)
            traffic = streamer.traffic()
            extra = {
                "streamed_gb_s": round(traffic.h2d_bytes / engine.copy_s() / 1e9, 2),
                "stall_s": round(traffic.stall_s, 4),
                "slot_bytes": streamer.slot_bytes,
                "d2h_copies": _copies_back(step, device),
            }
    finally:
        source.close()
        Residency().release()
    return resident, streamed, extra


def fill_plainly(stack: nn.ModuleList) -> None:
    """Give the blocks the same random weights as parameters of their own in main memory."""
    layouts = [BlockLayout.of(block, skip=(MODULATION,)) for block in stack]
    weights = RandomWeights(layouts)
    for index, (block, layout) in enumerate(zip(stack, layouts, strict=True)):
        slab = torch.empty(layout.nbytes, dtype=torch.uint8)
        weights(index, slab)
        block.to_empty(device="cpu")
        block.load_state_dict(layout.views(slab), strict=False)


def _measured(
    step: StackStep,
    streamer: Streamer | None,
    steps: int,
    device: torch.device,
    before: Callable[[int], None] = lambda index: None,
) -> Measured:
    step(before)  # main memory is filled, kernels are chosen, the allocator has its blocks
    if streamer is not None:
        streamer.end_step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(steps):
        output = step(before)
        if streamer is not None:
            streamer.end_step()
    ended.record()
    torch.cuda.synchronize(device)
    step_s = begun.elapsed_time(ended) / 1000.0 / steps
    return Measured(output, step_s, torch.cuda.max_memory_reserved(device))


def _copies_back(step: StackStep, device: torch.device) -> int:
    """Copies from the device to main memory during one step, as the profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize(device)
    return sum("DtoH" in event.name for event in profiled.events() or ())


def _baseline(
    stack: nn.ModuleList, step: StackStep, steps: int, device: torch.device
) -> Measured | None:
    """Swapping by eviction, which moves whole blocks, modulation too; None without the baseline's file."""
    module = baseline("eviction_swap")
    if module is None:
        return None
    fill_plainly(stack)
    swap = module.EvictionSwap(stack, device)
    return _measured(step, None, steps, device, swap.before)

"""What is free on this machine, as a budget; the user's own figures come first.

What this process holds counts as free: it is the job's to use, or models that wait and can be let go. So a
second job is planned as the first one was.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from kandinsky5.machine import gpu_facts, memory_bytes
from kandinsky5.memory.budget import GB, Budget, in_gb
from kandinsky5.request import GenerationRequest

ASSUMED_RAM_BYTES = 16 * GB
"""Where the system does not tell how much there is."""


def budget_for(request: GenerationRequest) -> tuple[Budget, tuple[str, ...]]:
    """What was asked for, and what is free where nothing was; with notes about that.

    Raises:
        UserError: a budget out of its range.
    """
    total_ram, free_ram = memory_bytes()
    notes = []
    if free_ram is not None:
        free_ram += own_bytes()
    ram_bytes = round(request.ram * GB) if request.ram else free_ram or ASSUMED_RAM_BYTES
    if not request.ram:
        notes.append(f"budget of RAM: the {in_gb(ram_bytes)} that are free; --ram sets another")
    vram_bytes: int | None
    total_vram = None
    if request.vram:
        vram_bytes = round(request.vram * GB)
        # Whoever computes here has torch, and is to hear of a budget that the card has not; a plan for
        # another card is not to wait for it.
        if request.device != "cpu" and "torch" in sys.modules:
            total_vram = _card(request.device)[1]
    else:
        vram_bytes, total_vram = (None, None) if request.device == "cpu" else _card(request.device)
        if vram_bytes is None:
            notes.append("no GPU: computed on the CPU; --vram GB plans for a card")
        else:
            notes.append(
                f"budget of VRAM: the {in_gb(vram_bytes)} that are free; --vram sets another"
            )
    return Budget(vram_bytes, ram_bytes, total_vram, total_ram), tuple(notes)


def text_formats() -> tuple[str, ...]:
    """Formats of the text encoder's weights for which the packages are here; none of them is imported."""
    has_nf4 = importlib.util.find_spec("bitsandbytes") is not None
    return ("bf16", "nf4") if has_nf4 else ("bf16",)


def _card(device: str) -> tuple[int | None, int | None]:
    """Free and total bytes of the card meant, or None twice where there is none."""
    import torch  # seconds to import, and needed only where no budget is given

    cards = gpu_facts(torch).cards
    index = int(device.partition(":")[2] or 0)
    if index >= len(cards):
        return None, None
    return cards[index].free_bytes + torch.cuda.memory_reserved(index), cards[index].total_bytes


def own_bytes() -> int:
    """Main memory that this process has; 0 where the system does not tell."""
    return held_bytes(os.getpid())


def held_bytes(pid: int) -> int:
    """Main memory that a process has; 0 where there is none, or the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")

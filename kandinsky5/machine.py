"""What the machine says about itself: cards, driver, memory, packages.

This looks; :mod:`kandinsky5.doctor` judges. torch is never imported here: whoever has it hands it in.
"""

from __future__ import annotations

import importlib
import logging
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 20
NVIDIA_VENDOR = "0x10de"
DISPLAY_CLASS = "0x03"


@dataclass(frozen=True)
class Card:
    """A GPU that torch sees."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class GpuFacts:
    """What torch and the system say about NVIDIA cards.

    Attributes:
        cuda_build: CUDA version torch was built for; None for a CPU build.
        driver: version of NVIDIA's driver; None without one.
        cards: those torch can use.
        card_on_bus: whether the system has an NVIDIA card at all.
    """

    cuda_build: str | None
    driver: str | None
    cards: tuple[Card, ...] = ()
    card_on_bus: bool = False


def gpu_facts(torch: ModuleType) -> GpuFacts:
    """The cards that this torch can use, and what there is without it."""
    cards = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free_bytes, total_bytes = torch.cuda.mem_get_info(index)
            capability = (properties.major, properties.minor)
            cards.append(Card(properties.name, capability, total_bytes, free_bytes))
    return GpuFacts(torch.version.cuda, _driver_version(), tuple(cards), _nvidia_card_on_bus())


def _driver_version() -> str | None:
    """Of NVIDIA's driver, from the kernel, else (in WSL) from its own tool."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        text = output_of(command) or ""
    version = re.search(r"\b(\d{3,}\.[\d.]+\d)\b", text)
    return version[1] if version else None


def _nvidia_card_on_bus() -> bool:
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor = (device / "vendor").read_text(encoding="ascii").strip()
            kind = (device / "class").read_text(encoding="ascii").strip()
        except OSError:
            continue
        if vendor == NVIDIA_VENDOR and kind.startswith(DISPLAY_CLASS):
            return True
    return False


def memory_bytes() -> tuple[int | None, int | None]:
    """Main memory (total, available), within the limits of a container; None where nothing tells."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None, None
    sizes = {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}
    total, available = sizes.get("MemTotal"), sizes.get("MemAvailable")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        kinds = Path("/sys/fs/cgroup/memory.stat").read_text(encoding="ascii")
        used -= sum(map(int, re.findall(r"^inactive_file (\d+)$", kinds, re.M)))  # cache, given up
    except (OSError, ValueError):  # no such limit, or the word "max"
        return total, available
    if total is None or available is None:
        return limit, limit - used
    return min(total, limit), min(available, limit - used)


def imported(name: str) -> ModuleType | str:
    """The module, or why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        log.info("importing %s: %s", name, error)
        return f"{name} cannot be imported: {str(error).splitlines()[0] if str(error) else type(error)}"


def installed_version(name: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def output_of(command: Sequence[str]) -> str | None:
    """What a command prints, or None when it fails, hangs or is not there."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.info("%s: %s", command[0], error)
        return None
    return done.stdout

"""What this machine can do, and where it cannot, why and what helps.

What judges is pure and takes what :mod:`kandinsky5.machine` saw, so that an old driver or a missing card
can be judged anywhere. torch is imported only while :func:`diagnose` runs.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kandinsky5.checks import MISSING, OK, WARNING, Check
from kandinsky5.errors import CheckpointError
from kandinsky5.fast_paths import fast_paths, torch_itself, triton_itself
from kandinsky5.machine import (
    Card,
    GpuFacts,
    gpu_facts,
    imported,
    installed_version,
    memory_bytes,
    output_of,
)
from kandinsky5.presets import PRESETS, Preset

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
TESTED_TORCH = ((2, 10), (2, 13))
TESTED_PYTHON = ((3, 10), (3, 12))
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""Of each major CUDA version, the first Linux driver that runs it (NVIDIA's release notes)."""

BF16_CAPABILITY = (8, 0)
DEMO_RAM_BYTES = 3 * 10**9
DISK_BYTES = 10**9
REPORT_COLUMNS = 110


@dataclass(frozen=True)
class Report:
    """All checks, in the order in which they are read, and the cards that torch can use."""

    checks: tuple[Check, ...]
    cards: tuple[Card, ...] = ()

    @property
    def demo_works(self) -> bool:
        """Whether the built-in model can make a video here."""
        status = {check.name: check.status for check in self.checks}
        return all(status.get(name) != MISSING for name in ("torch", "ffmpeg", "demo model"))

    @property
    def has_gpu(self) -> bool:
        """Whether there is a card that torch can use."""
        return any(check.name == "gpu" and check.status != MISSING for check in self.checks)

    @property
    def summary(self) -> str:
        """One sentence: what works here."""
        if not self.demo_works:
            return "The built-in demo does not work here yet: see what is missing."
        if self.has_gpu:
            return "The built-in demo works here, and there is a GPU for the large models."
        return "The built-in demo works here, on the CPU; the large models need an NVIDIA GPU."

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {
            "summary": self.summary,
            "demo_works": self.demo_works,
            "has_gpu": self.has_gpu,
            "cards": [asdict(card) for card in self.cards],
            "checks": [asdict(check) for check in self.checks],
        }

    def to_text(self) -> str:
        """A line for each check, its advice below it, and the summary."""
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            before = f"{check.status:8} {check.name:{width}}  "
            lines.append(_wrapped(before, check.found))
            if check.advice:
                lines.append(_wrapped(" " * len(before) + "-> ", check.advice))
        return "\n".join([*lines, "", self.summary])


def diagnose(*, out_dir: Path, state_dir: Path, models_dirs: Sequence[Path] = ()) -> Report:
    """Look at the machine; nothing is changed on it and nothing is fetched.

    Args:
        out_dir, state_dir: whose disks are looked at.
        models_dirs: folders in which models are looked for, besides those K1 knows.
    """
    checks = [
        _system(),
        _python(),
        *judge_packages(pinned_versions(REQUIREMENTS), installed_version),
    ]
    torch = imported("torch")
    cards: tuple[Card, ...] = ()
    if isinstance(torch, ModuleType):
        facts = gpu_facts(torch)
        cards = facts.cards
        checks += [torch_itself(torch), *judge_gpu(facts), *fast_paths(torch)]
    else:
        checks.append(Check("torch", MISSING, torch, "install the packages of requirements.txt"))
    checks += [triton_itself(), _ffmpeg(), judge_memory(*memory_bytes())]
    checks += [_disk("output folder", out_dir), _disk("state folder", state_dir)]
    return Report((*checks, *_models(models_dirs)), cards)


def pinned_versions(requirements: Path) -> dict[str, tuple[str, ...]]:
    """Package → the versions that ``requirements.txt`` names for it, one a Python; empty without it."""
    try:
        lines = requirements.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pinned: dict[str, tuple[str, ...]] = {}
    for line in lines:
        if pin := re.match(r"([\w.-]+)==([\w.+!-]+)", line):
            pinned[pin[1]] = (*pinned.get(pin[1], ()), pin[2])
    return pinned


def judge_packages(pinned: Mapping[str, tuple[str, ...]], installed: Any) -> list[Check]:
    """Compare what is installed (``installed(name)`` → version or None) with what was tested."""
    if not pinned:
        return [Check("packages", WARNING, f"no {REQUIREMENTS.name} to compare with")]
    checks = []
    for name, versions in pinned.items():
        version = installed(name)
        tested = " or ".join(versions)
        if version is None:
            advice = "install the packages of requirements.txt"
            checks.append(Check(f"package {name}", MISSING, f"tested with {tested}", advice))
        elif version.partition("+")[0] in versions:
            checks.append(Check(f"package {name}", OK, version))
        elif name == "torch" and _is_between(version, *TESTED_TORCH):
            checks.append(Check(f"package {name}", OK, f"{version} (tested with {tested})"))
        else:
            advice = "if something fails, install the packages of requirements.txt"
            found = f"{version} (tested with {tested})"
            checks.append(Check(f"package {name}", WARNING, found, advice))
    return checks


def judge_gpu(facts: GpuFacts) -> list[Check]:
    """A line for each card, or one that says why there is none to use."""
    if facts.cards:
        return [_judge_card(card, facts) for card in facts.cards]
    if facts.driver is None:
        if facts.card_on_bus:
            advice = "install NVIDIA's driver and start the machine again"
            return [Check("gpu", MISSING, "there is an NVIDIA card, but no driver for it", advice)]
        advice = "the built-in demo runs on the CPU; the large models need an NVIDIA card"
        return [Check("gpu", MISSING, "no NVIDIA card", advice)]
    if facts.cuda_build is None:
        advice = "install torch again, without +cpu in its version"
        found = f"driver {facts.driver} is here, but this torch is built for the CPU alone"
        return [Check("gpu", MISSING, found, advice)]
    oldest = OLDEST_DRIVER.get(_leading_number(facts.cuda_build), 0)
    if _leading_number(facts.driver) < oldest:
        found = f"driver {facts.driver} is too old for CUDA {facts.cuda_build}"
        return [Check("gpu", MISSING, found, f"update NVIDIA's driver to {oldest} or newer")]
    advice = "look at CUDA_VISIBLE_DEVICES; in a container, let the GPU in (--gpus all)"
    return [Check("gpu", MISSING, f"driver {facts.driver} is here, but torch sees no card", advice)]


def judge_memory(total_bytes: int | None, available_bytes: int | None) -> Check:
    """Main memory, all of it and what is free."""
    if total_bytes is None or available_bytes is None:
        return Check("memory", WARNING, "this system does not tell how much there is")
    found = f"{_gigabytes(available_bytes)} free of {_gigabytes(total_bytes)}"
    if available_bytes < DEMO_RAM_BYTES:
        advice = f"close other programs: the built-in demo wants {_gigabytes(DEMO_RAM_BYTES)}"
        return Check("memory", WARNING, found, advice)
    return Check("memory", OK, found)


def _judge_card(card: Card, facts: GpuFacts) -> Check:
    found = (
        f"{card.name}, {_gigabytes(card.free_bytes)} free of {_gigabytes(card.total_bytes)},"
        f" compute capability {card.capability[0]}.{card.capability[1]},"
        f" driver {facts.driver or 'unknown'}, CUDA {facts.cuda_build}"
    )
    if card.capability < BF16_CAPABILITY:
        advice = "cards before Ampere compute slowly in bfloat16; expect long times"
        return Check("gpu", WARNING, found, advice)
    return Check("gpu", OK, found)


def _system() -> Check:
    return Check("system", OK, f"{platform.system()} {platform.release()}, {os.cpu_count()} cores")


def _python() -> Check:
    found = f"{platform.python_version()} at {sys.executable}"
    if _is_between(platform.python_version(), *TESTED_PYTHON):
        return Check("python", OK, found)
    return Check("python", WARNING, found, "K1 is tested with Python 3.10 to 3.12")


def _ffmpeg() -> Check:
    """The bundled ffmpeg, made to encode two frames with the encoder K1 uses."""
    advice = "install imageio-ffmpeg again"
    bundled = imported("imageio_ffmpeg")
    if not isinstance(bundled, ModuleType):
        return Check("ffmpeg", MISSING, bundled, advice)
    try:
        executable = str(bundled.get_ffmpeg_exe())
    except RuntimeError as error:
        return Check("ffmpeg", MISSING, str(error), advice)
    source = ("-f", "lavfi", "-i", "color=size=64x64:rate=24", "-frames:v", "2")
    sink = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-f", "null", "-")
    if output_of((executable, "-v", "error", "-nostdin", *source, *sink)) is None:
        return Check("ffmpeg", MISSING, f"{executable} cannot encode H.264", advice)
    return Check("ffmpeg", OK, f"{executable} encodes H.264")


def _disk(name: str, folder: Path) -> Check:
    """Room and leave to write where the folder is or would be made."""
    place = folder.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK)):
        found = f"{folder}: {place} is not a folder that can be written"
        return Check(name, MISSING, found, "choose another folder")
    free_bytes = shutil.disk_usage(place).free
    found = f"{folder}: {_gigabytes(free_bytes)} free"
    if free_bytes < DISK_BYTES:
        return Check(name, WARNING, found, "make room: a video and its latents need some")
    return Check(name, OK, found)


def _models(models_dirs: Sequence[Path]) -> Iterable[Check]:
    """For each family, the presets whose weights, text encoders, tokenizers and VAE are here."""
    families: dict[str, list[Preset]] = {}
    for preset in PRESETS.values():
        families.setdefault(preset.model, []).append(preset)
    for family, presets in families.items():
        lacking = {preset.name: _what_is_lacking(preset, models_dirs) for preset in presets}
        ready = [name for name, reason in lacking.items() if reason is None]
        if ready:
            yield Check(f"{family} model", OK, f"complete for {', '.join(ready)}")
        else:
            found, _, advice = str(lacking[presets[0].name]).rpartition("; ")
            if presets[0].is_builtin:
                advice = "the built-in model is part of K1: get the repository again"
            yield Check(f"{family} model", MISSING, found, advice)


@dataclass(frozen=True)
class _Choice:
    """The model of a preset, nothing of the user's own."""

    preset: str
    dit: str | None = None
    model_dir: str | None = None


def _what_is_lacking(preset: Preset, models_dirs: Sequence[Path]) -> CheckpointError | None:
    from kandinsky5.model.files import locate_model

    try:
        locate_model(_Choice(preset.name), models_dirs)
    except CheckpointError as error:
        return error
    return None


def _wrapped(before: str, text: str) -> str:
    return textwrap.fill(
        text,
        REPORT_COLUMNS,
        initial_indent=before,
        subsequent_indent=" " * len(before),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _is_between(version: str, oldest: tuple[int, int], newest: tuple[int, int]) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and oldest <= (int(numbers[1]), int(numbers[2])) <= newest


def _leading_number(version: str) -> int:
    number = re.match(r"\d+", version)
    return int(number[0]) if number else 0


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"

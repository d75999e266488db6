"""Where and with what a number was measured; every benchmark's result holds it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "imageio-ffmpeg")


def circumstances() -> dict[str, Any]:
    """JSON-ready: ``date``, ``hardware`` {cpu, cores, gpu, driver}, ``versions``, ``command``."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": {"cpu": _cpu_name(), "cores": os.cpu_count(), **_gpu()},
        "versions": versions,
        "command": shlex.join(["k1.py", *sys.argv[1:]]),
    }


def _gpu() -> dict[str, str | None]:
    torch = sys.modules.get("torch")  # there if it took part; not worth loading for its own sake
    if torch is None or not torch.cuda.is_available():
        return {"gpu": None, "driver": None}
    try:
        driver = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        driver = None
    return {"gpu": torch.cuda.get_device_name(), "driver": driver}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

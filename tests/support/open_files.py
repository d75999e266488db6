"""Which files this process has open: what other tests leave behind for the collector does not count."""

from __future__ import annotations

import os
from pathlib import Path


def open_files(folder: Path) -> list[str]:
    """Files below a folder that this process has open."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(entry))
        except OSError:
            continue  # the one of the listing itself
    return [link for link in links if link.startswith(str(folder))]

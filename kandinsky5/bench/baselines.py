"""What benchmarks compare with: the programs of ``benchmarks/``, which are no part of K1."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def baseline(name: str) -> ModuleType | None:
    """The module ``benchmarks/<name>.py``; None where the file is not beside the program.

    Raises:
        ImportError: it needs a package that is not installed.
    """
    path = FOLDER / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

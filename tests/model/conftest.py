"""What several tests of the models share."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kandinsky5.demo.scenes import describe, random_scene

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def text_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's small tokenizers and tiny random encoders; not to be changed."""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("text parts")
    captions = [describe(random_scene(rng), rng) for _ in range(1000)]
    _tool("demo_text").build(folder, captions, seed=3)
    return folder


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module, path = importlib.util.module_from_spec(spec), list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module

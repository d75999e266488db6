"""For all tests: no request to any hub, a cache of their own, no deadlines, and where the data lies."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.update(HF_HUB_OFFLINE="1", GRADIO_ANALYTICS_ENABLED="False")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cores are shared between the test processes

# What K1 keeps of prompts between runs must not come from, nor go to, the cache of who runs the tests.
_CACHE = tempfile.mkdtemp(prefix="k1-test-cache-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = _CACHE

settings.register_profile("k1", deadline=None)  # a busy machine is no failure
settings.load_profile("k1")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds k1.py."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data beside the repository that does not belong into it; the test is skipped where it is absent."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder

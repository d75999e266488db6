"""For all tests: no request to any hub, no deadlines, and where the project's data for tests lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.update(HF_HUB_OFFLINE="1", GRADIO_ANALYTICS_ENABLED="False")

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

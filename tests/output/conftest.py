"""Frames to write and an independent way to read them back."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest


def _moving_disc(frames: int, height: int, width: int) -> np.ndarray:
    """uint8 [frames, height, width, 3]: a red disc that moves right over a blue slope."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    video = np.zeros((frames, height, width, 3), np.uint8)
    for index in range(frames):
        video[index, ..., 2] = (columns / width * 200).astype(np.uint8)
        centre = width * (0.25 + 0.5 * index / max(frames - 1, 1))
        distance = np.hypot(rows - height / 2, columns - centre)
        edge = np.clip(height / 4 - distance, 0, 4) / 4
        video[index, ..., 0] = (edge * 220).astype(np.uint8)
    return video


def _played(path: Path) -> tuple[np.ndarray, str]:
    """(uint8 [frames, height, width, 3], ffmpeg's description of the stream)."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    played = subprocess.run(command, capture_output=True, check=True)
    said = played.stderr.decode("utf-8", "replace")
    stream = next(line for line in said.splitlines() if "Video: h264" in line)
    size = re.search(r", (\d+)x(\d+)", stream)
    assert size
    width, height = int(size[1]), int(size[2])
    return np.frombuffer(played.stdout, np.uint8).reshape(-1, height, width, 3), stream


@pytest.fixture
def moving_disc() -> Callable[[int, int, int], np.ndarray]:
    return _moving_disc


@pytest.fixture
def played() -> Callable[[Path], tuple[np.ndarray, str]]:
    return _played

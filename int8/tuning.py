"""Which tile sizes are fastest on this machine: tried once for each shape and kept in a file.

``INT8_TUNING=off`` takes the table's first choice instead. The file may be missing, broken or not
writable: then the choice is made again in every process.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from int8.configs import MatmulConfig, capability_of, configs_for, row_bucket
from int8.failures import pass_on_out_of_memory
from int8.timing import gpu_seconds

KERNEL_VERSION = 1
"""Raised when the matmul kernel changes so that old choices mean nothing."""

MIN_ROWS = 2048
"""Below this a matmul takes microseconds: trying would cost more than it could give."""

REPETITIONS = 5

log = logging.getLogger(__name__)

Launch = Callable[[MatmulConfig], Any]


def cache_file() -> Path:
    """``k1/int8.json`` in the XDG cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "k1" / "int8.json"


class Choices:
    """Key → config, in memory and in a file that several processes may write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = self._read()

    def get(self, key: str) -> MatmulConfig | None:
        return self._known.get(key)

    def put(self, key: str, config: MatmulConfig) -> None:
        """Keep a choice; failing to write it is no error."""
        self._known = {**self._read(), **self._known, key: config}
        entries = {name: known.to_list() for name, known in sorted(self._known.items())}
        text = json.dumps({"version": KERNEL_VERSION, "configs": entries}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                os.replace(name, self.path)
            except OSError:
                os.unlink(name)
                raise
        except OSError as error:
            log.info("int8 tuning is not kept in %s: %s", self.path, error.strerror)

    def _read(self) -> dict[str, MatmulConfig]:
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["version"] != KERNEL_VERSION:
                return {}
            return {key: MatmulConfig.from_list(sizes) for key, sizes in stored["configs"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.info("int8 tuning in %s is not readable: %s", self.path, error)
            return {}


@cache
def _choices(path: Path) -> Choices:
    return Choices(path)


def choose(
    launch: Launch, device: torch.device, shape: tuple[int, int, int], group: int
) -> MatmulConfig:
    """The config for a matmul of shape (M, N, K); on a GPU the candidates are timed the first time.

    ``launch`` runs the matmul with a config, into its real output.
    """
    rows, columns, depth = shape
    candidates = configs_for(capability_of(device), rows, group)
    if len(candidates) == 1 or not _may_tune(device, rows):
        return candidates[0]
    key = f"{_machine(device)} m{row_bucket(rows)} n{columns} k{depth} g{group}"
    choices = _choices(cache_file())
    found = choices.get(key)
    if found is None or found not in candidates:
        found = fastest(launch, candidates, _time_on_gpu)
        choices.put(key, found)
    return found


def fastest(
    launch: Launch,
    candidates: Sequence[MatmulConfig],
    seconds: Callable[[Callable[[], Any]], float],
) -> MatmulConfig:
    """The candidate that takes least time; one that this card refuses is left out.

    Raises:
        RuntimeError: the card refuses all.
        torch.OutOfMemoryError: there is no room, which is nobody's fault.
    """
    times: dict[MatmulConfig, float] = {}
    refused: Exception | None = None
    for config in candidates:
        try:
            times[config] = seconds(lambda config=config: launch(config))  # type: ignore[misc]
        except Exception as error:  # noqa: BLE001  Triton, ptxas and the driver each have their own
            pass_on_out_of_memory(error)
            log.info("int8 config %s was refused: %s", config, error)
            refused = error
    if not times:
        raise RuntimeError("no int8 matmul config runs on this GPU") from refused
    return min(times, key=lambda config: times[config])


def _may_tune(device: torch.device, rows: int) -> bool:
    return (
        device.type == "cuda"
        and rows >= MIN_ROWS
        and os.environ.get("INT8_TUNING", "on") != "off"
        and not torch.cuda.is_current_stream_capturing()
    )


@cache
def _machine(device: torch.device) -> str:
    import triton

    major, minor = capability_of(device)
    name = torch.cuda.get_device_name(device)
    return f"{name} sm{major}{minor} triton {triton.__version__}"


def _time_on_gpu(run: Callable[[], Any]) -> float:
    """Shortest of a few runs, after one that compiles."""
    return min(gpu_seconds(run, REPETITIONS, warm_up=1))

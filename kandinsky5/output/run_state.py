"""A run that is not finished, on disk: everything that decides how it goes on.

One safetensors file. Its tensors are the latent, the times of the schedule, the conditionings (so that going
on needs no text encoder), a given first frame and what the step cache carries along; its header holds the
request, the step, the checkpoints' hashes and a SHA-256 over all of it. That hash tells a damaged or edited
file; it is no signature, so whatever it covers is checked for shape and range as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from kandinsky5.errors import UserError
from kandinsky5.output.atomic import prepare_output, replacing
from kandinsky5.output.run_state_parts import (
    CACHE_PREFIX,
    DTYPE_NAMES,
    DTYPES,
    RunState,
    SavedText,
)
from kandinsky5.output.tensor_file import (
    METADATA,
    Refused,
    TensorEntry,
    header_bytes,
    opened,
    read_header,
    tensor_table,
)
from kandinsky5.request import GenerationRequest

__all__ = [
    "RunState",
    "RunStateSummary",
    "SavedText",
    "describe_run_state",
    "load_run_state",
    "save_run_state",
]

FORMAT_VERSION = 1
MAX_STATE_BYTES = 16 * 2**30
"""Above the largest video with the step cache's residuals."""

_BODY, _HASH = "k1_run_state", "sha256"
_KEYS = {
    "format": int,
    "k1": str,
    "request": dict,
    "step": int,
    "total": int,
    "saved_at": float,
    "checkpoints": dict,
    "cache": dict,
    "facts": dict,
}
_WHAT = "a saved state"
_ADVICE = "give a state that K1 saved while a job ran"


@dataclass(frozen=True)
class RunStateSummary:
    """What a saved state says of itself; read from its header, the tensors unseen and the hash unchecked."""

    request: dict[str, Any]
    step: int
    total: int
    saved_at: float
    k1_version: str
    size_bytes: int

    def to_text(self) -> str:
        """One line: what, step n of N, when."""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.saved_at))
        prompt = " ".join(str(self.request.get("prompt", "")).split())
        shown = prompt if len(prompt) <= 60 else prompt[:59] + "…"
        return f"{self.request.get('preset')}, “{shown}”: step {self.step} of {self.total}, saved {when}"


def save_run_state(path: str | Path, state: RunState, *, now: float | None = None) -> Path:
    """Write a state; the file appears whole or not at all.

    Args:
        path: the final name; an older file of that name stays when the new one cannot be written.
        state: any device; tensors keep their dtypes.
        now: unix seconds to note; None takes the clock.

    Returns:
        The absolute path.

    Raises:
        UserError: a path that cannot be written.
        DiskFull: too little room.
    """
    from kandinsky5 import __version__  # not above: the package's front may import this one day

    tensors = {name: _stored(tensor) for name, tensor in state.tensors().items()}
    table = _table_of(tensors)
    body = json.dumps(
        {
            "format": FORMAT_VERSION,
            "k1": __version__,
            "request": state.request.to_dict(),
            "step": state.step,
            "total": state.total,
            "saved_at": float(time.time() if now is None else now),
            "checkpoints": dict(state.checkpoints),
            "cache": dict(state.cache_values),
            "facts": dict(state.facts),
        },
        allow_nan=False,
    )
    digest = _digest_of(body, table)
    for tensor in tensors.values():
        digest.update(_bytes_of(tensor))
    head = header_bytes(table, {_BODY: body, _HASH: digest.hexdigest()})
    size_bytes = len(head) + sum(entry.end - entry.start for entry in table.values())
    final = prepare_output(path, needed_bytes=size_bytes)
    with replacing(final, needed_bytes=size_bytes) as temporary, temporary.open("wb") as file:
        file.write(head)
        for tensor in tensors.values():
            file.write(_bytes_of(tensor))
    return final


def load_run_state(path: str | Path, *, field: str = "file") -> RunState:
    """Read a state without trusting it; tensors come to the CPU.

    Args:
        path: the file; ``~`` is expanded.
        field: the option it was given by, for the message.

    Raises:
        UserError: missing, another kind of file, cut short, edited, of a newer K1, or with parts that do
            not fit together; the reason is named.
    """
    with opened(path, field=field, what=_WHAT, advice=_ADVICE) as stream:
        body, table, claimed = _read_claims(stream)
        values = _checked_values(body)
        digest = _digest_of(body, table)
        tensors = {}
        for name, entry in table.items():
            data = bytearray(entry.end - entry.start)
            # Read, not mapped: a mapped file that is cut short later kills the process.
            if stream.readinto(data) != len(data):  # type: ignore[attr-defined]
                raise Refused("cut short while it was read")
            digest.update(data)
            tensors[name] = torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)
        if digest.hexdigest() != claimed:
            raise Refused("it is damaged or was edited: its hash does not fit what it holds")
        return _state_of(values, tensors)


def describe_run_state(path: str | Path, *, field: str = "file") -> RunStateSummary:
    """What a state is, from its header alone; raises UserError as :func:`load_run_state` does."""
    with opened(path, field=field, what=_WHAT, advice=_ADVICE) as stream:
        body, table, _ = _read_claims(stream)
        values = _checked_values(body)
        return RunStateSummary(
            request=values["request"],
            step=values["step"],
            total=values["total"],
            saved_at=values["saved_at"],
            k1_version=values["k1"],
            size_bytes=stream.tell() + sum(entry.end - entry.start for entry in table.values()),
        )


def _read_claims(stream: BinaryIO) -> tuple[str, dict[str, TensorEntry], str]:
    """(body, tensors, hash) as the header claims them; the stream then stands at the data."""
    header, data_bytes = read_header(stream)
    metadata = header.get(METADATA)
    if not isinstance(metadata, dict) or _BODY not in metadata:
        raise Refused("its header holds no saved run")
    body, claimed = metadata[_BODY], metadata.get(_HASH)
    if not isinstance(body, str) or not isinstance(claimed, str):
        raise Refused("its header holds no saved run and hash as text")
    if data_bytes > MAX_STATE_BYTES:
        raise Refused(f"{data_bytes} bytes of tensors, at most {MAX_STATE_BYTES} are read")
    return body, tensor_table(header, data_bytes), claimed


def _checked_values(body: str) -> dict[str, Any]:
    """The body with every key there and of its type."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused("the run in its header is no JSON") from error
    version = values.get("format") if isinstance(values, dict) else None
    if type(version) is not int or version < 1:
        raise Refused("the run in its header has no format version")
    if version > FORMAT_VERSION:
        raise Refused(f"format {version}, this K1 knows {FORMAT_VERSION}: update K1")
    if wrong := [name for name, kind in _KEYS.items() if type(values.get(name)) is not kind]:
        raise Refused(f"the run in its header lacks a usable {wrong[0]}")
    if not math.isfinite(values["saved_at"]) or abs(values["saved_at"]) > 1e11:
        raise Refused("the run in its header lacks a usable saved_at")
    return dict(values)


def _state_of(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> RunState:
    cache = {
        name.removeprefix(CACHE_PREFIX): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(CACHE_PREFIX)
    }
    try:
        request = GenerationRequest.from_dict(values["request"])
        state = RunState(
            request=request,
            step=values["step"],
            times=tensors.pop("times"),
            latent=tensors.pop("latent"),
            positive=SavedText(tensors.pop("positive.text"), tensors.pop("positive.pooled")),
            negative=_negative_of(tensors),
            first_frame=tensors.pop("first_frame", None),
            checkpoints=values["checkpoints"],
            cache_tensors=cache,
            cache_values=values["cache"],
            facts=values["facts"],
            saved_at=values["saved_at"],
            k1_version=values["k1"],
        )
    except KeyError as error:
        raise Refused(f"its tensor {error.args[0]} is missing") from error
    except (UserError, ValueError) as error:
        raise Refused(str(error)) from error
    if tensors:
        raise Refused(f"it holds a tensor {next(iter(tensors))[:60]} that K1 does not know")
    if state.total != values["total"]:
        raise Refused(f"{values['total']} steps where its schedule has {state.total}")
    return state


def _negative_of(tensors: dict[str, torch.Tensor]) -> SavedText | None:
    if "negative.text" not in tensors:
        return None
    return SavedText(tensors.pop("negative.text"), tensors.pop("negative.pooled"))


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").contiguous()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _table_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorEntry]:
    table, at = {}, 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * tensor.element_size()
        table[name] = TensorEntry(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), at, end)
        at = end
    return table


def _digest_of(body: str, table: Mapping[str, TensorEntry]) -> Any:
    """SHA-256 over body and table; the tensors' bytes follow in the order of the table."""
    entries = [[name, entry.dtype, list(entry.shape)] for name, entry in table.items()]
    text = body.encode("utf-8", "surrogatepass")
    return hashlib.sha256(text + b"\0" + json.dumps(entries).encode() + b"\0")

"""What ``k1.py convert`` does and says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from kandinsky5.conversion.convert import Conversion, convert
from kandinsky5.conversion.verify import Verification, verify
from kandinsky5.errors import UserError
from kandinsky5.events import EventSink, StageStarted
from kandinsky5.model.files import typed_path

_GB = 1e9


def run_conversion(
    file: str, out: str, to: str, *, check: bool, emit: EventSink
) -> tuple[dict[str, Any], str]:
    """Convert, and compare the result with its source if asked.

    Args:
        file, out, to: as typed.
        check: whether to compare.
        emit: listens to the progress.

    Returns:
        The JSON-ready document, and the same for a person.

    Raises:
        UserError, CheckpointError, DiskFull, Stopped: see :func:`kandinsky5.conversion.convert.convert`.
    """
    source = typed_path("file", file)
    if not out.strip():
        raise UserError("out", out, "the name of the new file")
    done = convert(source, Path(out.strip()).expanduser(), to, emit=emit)
    document = dataclasses.asdict(done) | {"output": str(done.output)}
    lines = [_summary(done)]
    if check:
        emit(StageStarted("verify"))
        found = verify(source, done.output)
        document["verify"] = _verification(found)
        lines += _table(found)
    return document, "\n".join(lines)


def _summary(done: Conversion) -> str:
    if done.already:
        size = f"{done.size_bytes / _GB:.2f} GB"
        return f"{done.output}: converted to {done.to} from this very source already, {size}: nothing to do"
    sizes = f"{done.source_bytes / _GB:.2f} → {done.size_bytes / _GB:.2f} GB"
    resumed = f", the first {done.resumed_at} of an earlier run" if done.resumed_at else ""
    changed = f"{done.converted} tensors to {done.to}"
    return f"{done.output}: {changed}, {sizes} in {done.seconds:.0f} s{resumed}"


def _verification(found: Verification) -> dict[str, Any]:
    lowest = found.lowest
    return {
        "sqnr_db": found.sqnr_db,
        "lowest_db": lowest and lowest[1],
        "lowest_layer": lowest and lowest[0],
        "equal_tensors": found.equal_tensors,
    }


def _table(found: Verification) -> list[str]:
    """A line for every layer, the least exact last, where a terminal shows it."""
    rows = sorted(
        found.sqnr_db.items(), key=lambda row: (row[1] is not None, -(row[1] or 0.0), row[0])
    )
    lines = [f"  {'exact' if db is None else f'{db:.2f} dB':>9}  {name}" for name, db in rows]
    return [*lines, f"  {found.equal_tensors} other tensors are the source's"]

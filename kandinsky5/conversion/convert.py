"""Converting a checkpoint: tensor by tensor, in little memory, and on from where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from kandinsky5.conversion.origin import is_made_already
from kandinsky5.conversion.part import PartFile, part_of, written_bytes
from kandinsky5.conversion.plan import ConversionPlan, plan_conversion
from kandinsky5.errors import K1Error, Stopped, UserError
from kandinsky5.events import EventSink, StageStarted, StepDone, ignore
from kandinsky5.model.checkpoint import Checkpoint
from kandinsky5.model.recipes import bytes_of
from kandinsky5.output.atomic import prepare_output, require_space, write_error

STAGE = "convert"


@dataclass(frozen=True)
class Conversion:
    """A conversion that is done.

    Attributes:
        output: the new file.
        to: ``int8`` or ``bf16``.
        source_bytes, size_bytes: of the files before and after.
        converted: how many tensors of the source changed their format.
        tensors: in the new file.
        resumed_at: how many tensors of the source an earlier run had done.
        seconds: of this run.
        already: whether the file was there, made of this very source: nothing was done.
    """

    output: Path
    to: str
    source_bytes: int
    size_bytes: int
    converted: int
    tensors: int
    resumed_at: int
    seconds: float
    already: bool = False


def convert(source: Path, out: Path, to: str, *, emit: EventSink = ignore) -> Conversion:
    """Write a checkpoint in another format; the same source always gives the same bytes.

    One tensor is in memory at a time, large ones a few rows at a time while they are worked on. Stopped at
    whatever moment, the same call later goes on from the tensors that were done.

    Args:
        source: a .safetensors file, an index of shards, or a folder with either.
        out: the new file. Where it is there already and of this very source, it is left as it is.
        to: ``int8`` (this project's own) or ``bf16``.
        emit: listens to ``StepDone`` for every tensor.

    Raises:
        UserError: ``to`` cannot be reached, ``out`` cannot be written or is another file already.
        CheckpointError: the source is unusable, or changed while or since it was read.
        DiskFull: too little room, before anything is written.
        K1Error: the disk became full or failed; what is done is kept.
        Stopped: Ctrl-C; what is done is kept.
    """
    started = time.monotonic()
    with Checkpoint(source) as checkpoint:
        plan = plan_conversion(checkpoint, to)
        _refuse_own_source(checkpoint, out)
        already = is_made_already(out, plan, checkpoint)
        final, resumed_at = (out.absolute(), 0) if already else _made(checkpoint, plan, out, emit)
        return Conversion(
            output=final,
            to=to,
            source_bytes=checkpoint.size_bytes,
            size_bytes=plan.size_bytes,
            converted=plan.converted,
            tensors=len(plan.places),
            resumed_at=resumed_at,
            seconds=round(time.monotonic() - started, 3),
            already=already,
        )


def _made(
    checkpoint: Checkpoint, plan: ConversionPlan, out: Path, emit: EventSink
) -> tuple[Path, int]:
    """Write the file; gives its path, and how many tensors of the source an earlier run had done."""
    final = prepare_output(out)
    require_space(final, plan.size_bytes - written_bytes(final))
    with _errors_told(final, plan), PartFile(final, plan, checkpoint) as part:
        resumed_at = part.done
        emit(StageStarted(STAGE))
        _write_tensors(checkpoint, plan, part, emit)
        checkpoint.check_unchanged()
        part.finish()
    return final, resumed_at


def _write_tensors(
    checkpoint: Checkpoint, plan: ConversionPlan, part: PartFile, emit: EventSink
) -> None:
    total, started = len(plan.recipes), time.monotonic()
    for done, recipe in enumerate(plan.recipes[part.done :], start=part.done):
        made = {
            name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in recipe.outputs.items()
        }
        recipe.fill(checkpoint, made)
        for name, tensor in made.items():
            part.write(name, bytes_of(tensor))
        part.record(done + 1)
        each = (time.monotonic() - started) / (done + 1 - part.done)
        emit(StepDone(done + 1, total, each, each * (total - done - 1)))


def _refuse_own_source(checkpoint: Checkpoint, out: Path) -> None:
    for file in checkpoint.files:
        if out.exists() and out.samefile(file.path):
            raise UserError("out", str(out), "this is the file to convert; give another name")


@contextmanager
def _errors_told(final: Path, plan: ConversionPlan) -> Iterator[None]:
    """Say of whatever ends the writing that nothing done is lost, and where it is."""
    kept = f"what is done is in {part_of(final).name}: the same command goes on from there"
    try:
        yield
    except OSError as error:
        raise K1Error(f"{write_error(final, error, plan.size_bytes)}; {kept}") from error
    except KeyboardInterrupt as error:
        raise Stopped(f"stopped; {kept}") from error

"""The commands ``resume`` and ``decode``, and the saved states of runs without a page.

Only the standard library is loaded until a command is carried out.
"""

from __future__ import annotations

import argparse
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kandinsky5.errors import UserError
from kandinsky5.events import EventSink
from kandinsky5.request import GenerationRequest, GenerationResult

if TYPE_CHECKING:
    from kandinsky5.output.autosave import StateKeeper

Tell = Callable[[str], None]


def resume_options(parser: argparse.ArgumentParser) -> None:
    """``FILE [--out F]``; the folder options are the caller's."""
    parser.add_argument("file", metavar="FILE", help="a saved state of an unfinished run")
    parser.add_argument("--out", metavar="F", help="the result's file (default: a new name)")


def decode_options(parser: argparse.ArgumentParser) -> None:
    """``LATENTS [--out F]``; the folder options are the caller's."""
    parser.add_argument("file", metavar="LATENTS", help="latents that --save-latents wrote")
    parser.add_argument("--out", metavar="F", help="the result's file (default: a new name)")


def resume(
    arguments: argparse.Namespace,
    *,
    emit: EventSink,
    should_stop: Callable[[], bool],
    tell: Tell,
) -> GenerationResult:
    """Go on from a saved state to the result.

    Args:
        arguments: ``file``, ``out``, ``outdir``, ``state_dir``, ``models_dirs``.
        emit, should_stop: as for :func:`kandinsky5.generate`.
        tell: gets lines for the user: what goes on, and where it is saved when it ends early.

    Raises:
        UserError, CheckpointError, OutOfMemory, Stopped: see :mod:`kandinsky5.errors`.
    """
    from kandinsky5.output.run_state import describe_run_state
    from kandinsky5.pipeline.pipeline import Pipeline

    path = Path(arguments.file).expanduser()
    summary = describe_run_state(path)
    out = _output_for(summary.request, arguments)
    tell(f"resuming {summary.to_text()}")
    with kept_states(arguments.state_dir, tell) as states:
        pipeline = Pipeline(models_dirs=tuple(arguments.models_dirs))
        return pipeline.resume(path, out=out, emit=emit, should_stop=should_stop, states=states)


def decode(
    arguments: argparse.Namespace, *, emit: EventSink, should_stop: Callable[[], bool]
) -> GenerationResult:
    """Turn saved latents into the result; only the VAE is needed.

    Args:
        arguments: ``file``, ``out``, ``outdir``, ``models_dirs``.
        emit, should_stop: as for :func:`kandinsky5.generate`.

    Raises:
        UserError, CheckpointError, OutOfMemory, Stopped: see :mod:`kandinsky5.errors`.
    """
    from kandinsky5.output.state import load_latents
    from kandinsky5.pipeline.pipeline import Pipeline

    path = Path(arguments.file).expanduser()
    _, values = load_latents(path, field="file")
    if not values:
        raise UserError(
            "file", str(path), "latents that --save-latents wrote; these do not say of what model"
        )
    out = _output_for(values, arguments)
    pipeline = Pipeline(models_dirs=tuple(arguments.models_dirs))
    return pipeline.decode(path, out=out, emit=emit, should_stop=should_stop)


@contextmanager
def kept_states(state_dir: Path, tell: Tell) -> Iterator[StateKeeper]:
    """Where a run without a page saves itself, on a stop too; gone when the block ends well.

    When it ends early and there is a state, ``tell`` gets the command that goes on from it.
    """
    from kandinsky5.output.autosave import StateKeeper

    folder = state_dir.expanduser().absolute() / "states" / f"run-{secrets.token_hex(8)}"
    keeper = StateKeeper(folder)
    keeper.ask_to_save_on_stop()
    try:
        yield keeper
    except BaseException:  # Ctrl-C too; it goes on upwards
        if (newest := keeper.newest()) is not None:
            tell(f"saved; to go on: python k1.py resume {shlex.quote(str(newest))}")
        raise
    keeper.discard()


def _output_for(values: Mapping[str, Any], arguments: argparse.Namespace) -> Path:
    """The file that was asked for, else a new name in the output folder."""
    if arguments.out is not None:
        return Path(arguments.out).expanduser()
    from kandinsky5.worker.client import check_writable, output_path

    request = GenerationRequest.from_dict(values)
    check_writable(arguments.outdir)
    return output_path(arguments.outdir, request, time.localtime())

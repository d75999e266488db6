"""The commands ``resume`` and ``decode``, and the saved states of runs without a page.

Only the standard library is loaded until a command is carried out.
"""

from __future__ import annotations

import argparse
import math
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kandinsky5.errors import UserError
from kandinsky5.events import EventSink
from kandinsky5.output.autosave import DEFAULT_MINUTES, Autosave, StateKeeper
from kandinsky5.request import GenerationRequest, GenerationResult

Tell = Callable[[str], None]
OTHERWISE = ("attention", "weights", "dtype")
"""In what a run may go on otherwise than it was begun, as after numbers that are not finite."""
RUN_PREFIX = "run-"
"""Of the folders in which runs without a page are saved."""


def resume_options(parser: argparse.ArgumentParser) -> None:
    """``FILE [--out F] [--save-latents F]``, in what to compute, when to save; folders are the caller's."""
    parser.add_argument("file", metavar="FILE", help="a saved state of an unfinished run")
    parser.add_argument("--out", metavar="F", help="the result's file (default: a new name)")
    parser.add_argument("--save-latents", metavar="F", help="keep the final latents in this file")
    for name in OTHERWISE:
        parser.add_argument(
            f"--{name}", metavar="STR", help=f"another {name} than the run was begun with"
        )
    saving_options(parser)


def saving_options(parser: argparse.ArgumentParser) -> None:
    """How often an unfinished run is saved."""
    parser.add_argument(
        "--save-every-minutes",
        metavar="M",
        type=_minutes,
        default=DEFAULT_MINUTES,
        help="save the unfinished run so often (default 5)",
    )
    parser.add_argument(
        "--save-every-steps",
        metavar="N",
        type=_steps,
        help="and after so many steps (default: not)",
    )


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < math.inf:
        raise UserError("save_every_minutes", text, "a number above 0")
    return minutes


def _steps(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise UserError("save_every_steps", text, "a whole number above 0")
    return int(text)


def decode_options(parser: argparse.ArgumentParser) -> None:
    """``LATENTS [--out F]``; the folder options are the caller's."""
    parser.add_argument(
        "file",
        metavar="LATENTS",
        help="latents that --save-latents wrote, or a state behind its last step",
    )
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
        arguments: ``file``, ``out``, ``save_latents``, ``outdir``, ``state_dir``, ``models_dirs``, and
            those of :func:`saving_options`.
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
    latents = arguments.save_latents and Path(arguments.save_latents).expanduser()
    is_own = _is_own(path, arguments.state_dir)
    tell(f"resuming {summary.to_text()}")
    otherwise = {name: given for name in OTHERWISE if (given := getattr(arguments, name))}
    if otherwise:
        shown = ", ".join(f"{name} {value}" for name, value in otherwise.items())
        tell(f"note: it goes on with {shown}: not to the bit what it would have become")
    if latents is None and not is_own and summary.request.get("save_latents"):
        tell("note: its latents are not kept where the file says; --save-latents F keeps them")
    folder = path.resolve().parent
    goes_on_there = is_own and folder.name.startswith(RUN_PREFIX)
    with kept_states(arguments, tell, folder=folder if goes_on_there else None) as states:
        pipeline = Pipeline(models_dirs=tuple(arguments.models_dirs))
        return pipeline.resume(
            path,
            out=out,
            emit=emit,
            should_stop=should_stop,
            states=states,
            save_latents=latents,
            keep_paths=is_own,
            otherwise=otherwise,
        )


def decode(
    arguments: argparse.Namespace, *, emit: EventSink, should_stop: Callable[[], bool]
) -> GenerationResult:
    """Turn saved latents, or a state behind its last step, into the result; only the VAE is needed.

    Args:
        arguments: ``file``, ``out``, ``outdir``, ``models_dirs``.
        emit, should_stop: as for :func:`kandinsky5.generate`.

    Raises:
        UserError, CheckpointError, OutOfMemory, Stopped: see :mod:`kandinsky5.errors`.
    """
    from kandinsky5.pipeline.decodable import read_decodable
    from kandinsky5.pipeline.pipeline import Pipeline

    path = Path(arguments.file).expanduser()
    _, values = read_decodable(path)
    if not values:
        raise UserError(
            "file", str(path), "latents that --save-latents wrote; these do not say of what model"
        )
    out = _output_for(values, arguments)
    pipeline = Pipeline(models_dirs=tuple(arguments.models_dirs))
    return pipeline.decode(path, out=out, emit=emit, should_stop=should_stop)


@contextmanager
def kept_states(
    arguments: argparse.Namespace, tell: Tell, *, folder: Path | None = None
) -> Iterator[StateKeeper]:
    """Where a run without a page saves itself, on a stop too; gone when the block ends well.

    When it ends early and there is a state, ``tell`` gets the command that goes on from it.

    Args:
        arguments: ``state_dir`` and those of :func:`saving_options`.
        folder: where the run saved itself before; None for a new one.
    """
    folder = folder or _states_in(arguments.state_dir) / f"{RUN_PREFIX}{secrets.token_hex(8)}"
    minutes, steps = arguments.save_every_minutes, arguments.save_every_steps
    keeper = StateKeeper(folder, autosave=Autosave(every_minutes=minutes, every_steps=steps))
    keeper.ask_to_save_on_stop()
    try:
        yield keeper
    except BaseException:  # Ctrl-C too; it goes on upwards
        if (newest := keeper.newest()) is not None:
            tell(f"saved; to go on: python k1.py resume {shlex.quote(str(newest))}")
        raise
    keeper.discard()


def _states_in(state_dir: Path) -> Path:
    return state_dir.expanduser().absolute() / "states"


def _is_own(path: Path, state_dir: Path) -> bool:
    """Whether this machine's K1 saved the state: only then may its request say which files are written."""
    return path.resolve().is_relative_to(_states_in(state_dir).resolve())


def _output_for(values: Mapping[str, Any], arguments: argparse.Namespace) -> Path:
    """The file that was asked for, else a new name in the output folder."""
    if arguments.out is not None:
        return Path(arguments.out).expanduser()
    from kandinsky5.worker.client import check_writable, output_path

    request = GenerationRequest.from_dict(values)
    check_writable(arguments.outdir)
    return output_path(arguments.outdir, request, time.localtime())

"""The commands of ``k1.py`` and their printing.

A command gives a :class:`Reply`; only :func:`main` writes it to stdout. While a command works, everything
that libraries or child processes print to stdout goes to stderr, so that ``--json`` is one document.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import logging.handlers
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import kandinsky5
from kandinsky5.arguments import (
    PLAN_FIELDS,
    build_parser,
    default_state_dir,
    request_of,
)
from kandinsky5.benches import BENCHES
from kandinsky5.errors import CheckpointError, K1Error, Stopped
from kandinsky5.presets import PRESETS, Preset
from kandinsky5.progress import ProgressLine
from kandinsky5.request import GenerationRequest, settle
from kandinsky5.resume_command import decode, kept_states, resume

log = logging.getLogger(__name__)

LOG_NAME = "k1.log"
LOG_BYTES = 2_000_000
LOG_BACKUPS = 3
SPIN_COUNT = "1000"
"""How often a thread of torch's OpenMP looks for work before it sleeps. By default it hardly ever does, and
one busy program beside it makes the demo take four times as long. Read when torch is loaded."""


@dataclass(frozen=True)
class Reply:
    """What a command answers.

    Attributes:
        document: JSON-ready, for ``--json``.
        text: the same for a person.
        exit_code: of the program.
    """

    document: Any
    text: str
    exit_code: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name) and give its exit code."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    typed = _with_default_command(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _parsed(typed)
    except SystemExit as help_was_shown:
        return int(help_was_shown.code or 0)
    except K1Error as error:
        reply = _refusal(error)
    else:
        reply = _carry_out(arguments)
    if reply.exit_code:
        _tell(f"k1: {' '.join(reply.text.split())}")
    if "--json" in typed:
        _answer(json.dumps(reply.document, indent=2))
    elif not reply.exit_code and reply.text:
        _answer(reply.text)
    return reply.exit_code


def _answer(text: str) -> None:
    """Print it; whoever reads may have heard enough, as ``head`` has."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # nothing is left to fail at exit


def _parsed(typed: Sequence[str]) -> argparse.Namespace:
    arguments = build_parser().parse_args(typed)
    if arguments.version:
        arguments.command = "version"
    return arguments


def _carry_out(arguments: argparse.Namespace) -> Reply:
    """Do what was asked; whatever happens becomes a reply, and what was unexpected is in the log."""
    state_dir = getattr(arguments, "state_dir", None) or default_state_dir()
    with _log_in(state_dir) as log_file, _stdout_kept_clean():
        try:
            _add_models_dirs(arguments, state_dir)
            return COMMANDS[arguments.command](arguments)
        except KeyboardInterrupt:
            return _refusal(Stopped("stopped"))
        except K1Error as error:
            log.info("refused: %s", error)
            return _refusal(error)
        except Exception as error:  # the program's boundary: nobody above could do better
            log.exception("unexpected")
            where = f"the traceback is in {log_file}" if log_file else "no log could be written"
            return _refusal(K1Error(f"unexpected {type(error).__name__}: {error}; {where}"))


def _add_models_dirs(arguments: argparse.Namespace, state_dir: Path) -> None:
    """The folders for models in the studio's settings count for the commands too, after those typed."""
    if arguments.command == "ui" or not hasattr(arguments, "models_dirs"):
        return
    from kandinsky5.ui.settings import read_settings

    named = map(Path, read_settings(state_dir).models_dirs)
    arguments.models_dirs = list(dict.fromkeys((*arguments.models_dirs, *named)))


def _version(arguments: argparse.Namespace) -> Reply:
    return Reply({"version": kandinsky5.__version__}, f"K1 {kandinsky5.__version__}")


def _ui(arguments: argparse.Namespace) -> Reply:
    from kandinsky5.ui.launch import launch
    from kandinsky5.ui.options import StudioOptions

    options = StudioOptions(
        host=arguments.host,
        port=arguments.port,
        listen=arguments.listen,
        auth=arguments.auth,
        out_dir=arguments.outdir,
        state_dir=arguments.state_dir,
        models_dirs=tuple(arguments.models_dirs),
        device=arguments.device,
    )
    return Reply(None, "", launch(options, announce=_tell))


def _generate(arguments: argparse.Namespace) -> Reply:
    request = _with_output(request_of(arguments), arguments.outdir)
    with (
        _stop_by_signal() as stop,
        kept_states(arguments, _tell) as states,
        contextlib.closing(ProgressLine(sys.stderr)) as progress,
    ):
        result = kandinsky5.generate(
            request,
            emit=progress,
            should_stop=stop.is_set,
            models_dirs=tuple(arguments.models_dirs),
            states=states,
        )
    return Reply(result.to_dict(), result.output)


def _resume(arguments: argparse.Namespace) -> Reply:
    with (
        _stop_by_signal() as stop,
        contextlib.closing(ProgressLine(sys.stderr)) as progress,
    ):
        result = resume(arguments, emit=progress, should_stop=stop.is_set, tell=_tell)
    return Reply(result.to_dict(), result.output)


def _decode(arguments: argparse.Namespace) -> Reply:
    with (
        _stop_by_signal() as stop,
        contextlib.closing(ProgressLine(sys.stderr)) as progress,
    ):
        result = decode(arguments, emit=progress, should_stop=stop.is_set)
    return Reply(result.to_dict(), result.output)


def _with_output(request: GenerationRequest, folder: Path) -> GenerationRequest:
    """With a new name in the output folder unless it has one already."""
    if request.out is not None:
        return request
    settle(request)  # a request that cannot be run shall leave no folder behind
    from kandinsky5.worker.client import DRAWN_SEEDS, check_writable, output_path

    check_writable(folder)
    seed = secrets.randbelow(DRAWN_SEEDS) if request.seed is None else request.seed
    request = dataclasses.replace(request, seed=seed)
    out = output_path(folder, request, time.localtime())
    return dataclasses.replace(request, out=str(out))


def _inspect(arguments: argparse.Namespace) -> Reply:
    from kandinsky5.model.files import typed_path
    from kandinsky5.model.inspect import inspect_file

    path = typed_path("file", arguments.file)
    report = inspect_file(path).to_dict()
    if report["kind"] == "unusable":
        return Reply(report, "; ".join(report["problems"]), CheckpointError.exit_code)
    lines = [str(path), *(f"  {key:14} {_shown(value)}" for key, value in report.items() if value)]
    return Reply(report, "\n".join(lines))


def _plan(arguments: argparse.Namespace) -> Reply:
    from kandinsky5.plan_command import plan_of

    typed = {
        key: value
        for key, value in vars(arguments).items()
        if key in (*PLAN_FIELDS, "expand", "loras")
    }
    return Reply(*plan_of(typed, tuple(arguments.models_dirs)))


def _download(arguments: argparse.Namespace) -> Reply:
    from kandinsky5.download import download

    document = download(
        arguments.preset,
        models_dirs=tuple(arguments.models_dirs),
        dry_run=arguments.dry_run,
        tell=_tell,
    )
    size = f"{document['to_fetch_bytes'] / 1e9:.1f} GB"
    done = f"would fetch {size}" if arguments.dry_run else f"fetched {size}"
    return Reply(document, f"{done} into {document['folder']}")


def _presets(arguments: argparse.Namespace) -> Reply:
    head = (
        "NAME",
        "WIDTH",
        "HEIGHT",
        "SECONDS",
        "STEPS",
        "GUIDANCE",
        "SHIFT",
        "ATTENTION",
        "WEIGHTS",
    )
    rows = [head, *(_preset_row(preset) for preset in PRESETS.values())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    document = {name: dataclasses.asdict(preset) for name, preset in PRESETS.items()}
    return Reply(document, "\n".join(line.rstrip() for line in lines))


def _preset_row(preset: Preset) -> tuple[str, ...]:
    width, height = preset.sizes_px[0]
    attention = f"nabla P={preset.nabla.P:g}" if preset.nabla else "full"
    numbers = (width, height, preset.seconds, preset.steps, preset.guidance, preset.shift)
    return (
        preset.name,
        *(f"{number:g}" for number in numbers),
        attention,
        preset.weights_file or "built in",
    )


def _doctor(arguments: argparse.Namespace) -> Reply:
    from kandinsky5.doctor import diagnose

    report = diagnose(
        out_dir=arguments.outdir,
        state_dir=arguments.state_dir,
        models_dirs=tuple(arguments.models_dirs),
    )
    return Reply(report.to_dict(), report.to_text())


def _convert(arguments: argparse.Namespace) -> Reply:
    from kandinsky5.conversion.command import run_conversion

    with contextlib.closing(ProgressLine(sys.stderr)) as progress:
        document, text = run_conversion(
            arguments.file, arguments.out, arguments.to, check=arguments.verify, emit=progress
        )
    return Reply(document, text)


def _bench(arguments: argparse.Namespace) -> Reply:
    bench = BENCHES[arguments.name]
    keywords = [option.keyword for option in bench.options]
    given = {key: getattr(arguments, key) for key in keywords if hasattr(arguments, key)}
    document = bench.run(given)
    return Reply(
        document, "\n".join(f"{key:18} {_shown(value)}" for key, value in document.items())
    )


COMMANDS: dict[str, Callable[[argparse.Namespace], Reply]] = {
    "ui": _ui,
    "generate": _generate,
    "resume": _resume,
    "decode": _decode,
    "inspect": _inspect,
    "plan": _plan,
    "download": _download,
    "presets": _presets,
    "doctor": _doctor,
    "convert": _convert,
    "bench": _bench,
    "version": _version,
}


def _with_default_command(argv: Sequence[str]) -> list[str]:
    """``k1.py --port 7861`` means ``k1.py ui --port 7861``."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version")):
        return ["ui", *argv]
    return list(argv)


def _refusal(error: K1Error) -> Reply:
    return Reply({"error": str(error), "exit_code": error.exit_code}, str(error), error.exit_code)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """Send to stderr what is written to stdout meanwhile, by C code and child processes too."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def _stop_by_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; the second one interrupts at once."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        _tell("\nstopping after this step; Ctrl-C once more stops at once")

    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _log_in(state_dir: Path) -> Iterator[Path | None]:
    """Log into the state folder; gives the file, or None where none can be written: the work goes on."""
    path = (state_dir / LOG_NAME).absolute()
    handler: logging.Handler = logging.NullHandler()  # else the warnings would appear on stderr
    written: Path | None = None
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(
            path, maxBytes=LOG_BYTES, backupCount=LOG_BACKUPS, encoding="utf-8"
        )
        written = path
    except OSError as error:
        _tell(f"note: no log is written, {path}: {error.strerror}; give another --state-dir")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("kandinsky5").setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield written
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)
        handler.close()

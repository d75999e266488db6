"""What is typed on the command line, and the request it means. Only the standard library is needed."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from kandinsky5.benches import BENCHES
from kandinsky5.errors import K1Error, UserError
from kandinsky5.request import CHOICES, RANGES, GenerationRequest
from kandinsky5.resume_command import decode_options, resume_options, saving_options

LORA_SUFFIX = ".safetensors"


class UsageError(K1Error):
    """A command line that cannot be read."""

    exit_code = 2


class Parser(argparse.ArgumentParser):
    """Refuses with one line and an exception instead of a page of usage and an exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True)
class Option:
    """One option of ``generate``: the field of the request it sets, and how its value reads.

    Attributes:
        flag: as typed.
        field: of :class:`~kandinsky5.request.GenerationRequest`.
        metavar: placeholder in the help.
        help: one line.
    """

    flag: str
    field: str
    metavar: str
    help: str


def _choices(field: str) -> str:
    return "|".join(CHOICES[field])


REQUEST_OPTIONS = (
    Option("--preset", "preset", "NAME", "see: k1.py presets (default demo-t2v)"),
    Option("--prompt", "prompt", "TEXT", "what to make"),
    Option("--negative", "negative_prompt", "TEXT", "what to keep away from"),
    Option("--clip-prompt", "clip_prompt", "TEXT", "a prompt of its own for CLIP"),
    Option("--expanded-prompt", "expanded_prompt", "TEXT", "encoded in the prompt's place"),
    Option("--image", "image", "F", "the input picture, for i2v and i2i presets"),
    Option("--seed", "seed", "N", "the same seed gives the same result; drawn when left out"),
    Option("--width", "width", "W", "pixels"),
    Option("--height", "height", "H", "pixels"),
    Option("--seconds", "seconds", "S", "length of a video"),
    Option("--steps", "steps", "N", "steps of the schedule"),
    Option("--guidance", "guidance", "G", "classifier-free guidance; 1 is off"),
    Option("--shift", "shift", "X", "schedule shift"),
    Option("--guidance-start", "guidance_start", "P", "first share of the steps without (0)"),
    Option("--guidance-end", "guidance_end", "P", "guided up to this share of the steps (1)"),
    Option("--dit", "dit", "PATH", "a transformer checkpoint of your own"),
    Option("--model-dir", "model_dir", "DIR", "a whole model, in either published layout"),
    Option("--weights", "weights", _choices("weights"), "format of the transformer's weights"),
    Option("--text-weights", "text_weights", _choices("text_weights"), "of the text encoder's"),
    Option("--vram", "vram", "GB", "GPU memory to stay within"),
    Option("--ram", "ram", "GB", "main memory to stay within"),
    Option("--attention", "attention", _choices("attention"), "attention engine"),
    Option("--nabla-p", "nabla_p", "P", "share of the probability that NABLA keeps (the preset's)"),
    Option("--nabla-wt", "nabla_wt", "N", "NABLA's window in latent frames (11)"),
    Option("--nabla-wh", "nabla_wh", "N", "NABLA's window along the height in tiles of 128 px (3)"),
    Option("--nabla-ww", "nabla_ww", "N", "NABLA's window along the width, likewise (3)"),
    Option("--cache", "cache", _choices("cache"), "step cache"),
    Option("--cache-threshold", "cache_threshold", "X", "more skips more (0.12)"),
    Option(
        "--cache-retention", "cache_retention", "P", "first share of the steps left alone (0.2)"
    ),
    Option("--init-latents", "init_latents", "F", "starting noise instead of the seed's"),
    Option("--save-latents", "save_latents", "F", "keep the final latents in this file"),
    Option("--out", "out", "F", "the result's file (default: a new name in the output folder)"),
    Option("--device", "device", "D", "auto, cpu, cuda or cuda:N"),
    Option("--dtype", "dtype", _choices("dtype"), "what the transformer computes in"),
    Option("--crf", "crf", "N", "H.264 quality, 0 (lossless) to 51"),
    Option("--vae-tiling", "vae_tiling", _choices("vae_tiling"), "how the VAE decodes a video"),
    Option("--vae-tile", "vae_tile", "PX", "side of the VAE's tiles, in steps of 16 (by memory)"),
    Option("--source", "source", _choices("source"), "where the blocks are while it denoises"),
    Option(
        "--resident-blocks", "resident_blocks", "N", "blocks that stay on the device (by memory)"
    ),
    Option("--slots", "slots", "N", "buffers on the device for the others (2)"),
    Option("--chunk-tokens", "chunk_tokens", "N", "tokens of a block at once (by memory)"),
    Option("--chunk-heads", "chunk_heads", "N", "heads of self-attention at once (by memory)"),
)

PLAN_FIELDS = (
    "preset",
    "width",
    "height",
    "seconds",
    "steps",
    "guidance",
    "dit",
    "model_dir",
    "weights",
    "text_weights",
    "vram",
    "ram",
    "attention",
    "device",
    "dtype",
    "vae_tiling",
    "vae_tile",
    "source",
    "resident_blocks",
    "slots",
    "chunk_tokens",
    "chunk_heads",
)
"""Fields of a request on which its memory plan depends."""


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="k1.py",
        allow_abbrev=False,
        description="K1: videos and pictures with Kandinsky 5. Without a command it opens the studio.",
        epilog="exit codes: 0 done, 1 a fault of the program, 2 bad input, 3 a needed file is missing or"
        " unusable, 4 out of memory, 5 stopped",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=False)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    _studio_options(add("ui", "open the studio in the browser"))
    _generate_options(add("generate", "run one job without a browser"))
    for name, text, options in (
        ("resume", "go on from a saved state", resume_options),
        ("decode", "only the VAE: latents to a video", decode_options),
    ):
        command = add(name, text)
        options(command)
        _folder_options(command, "outdir", "models_dir", "state_dir")
        _json_option(command)
    download = add("download", "fetch what a preset needs from the hub; goes on where it stopped")
    download.add_argument("preset", metavar="PRESET", help="see: k1.py presets")
    download.add_argument("--dry-run", action="store_true", help="only list files and sizes")
    _folder_options(download, "models_dir", "state_dir")
    _json_option(download)
    inspect = add("inspect", "what a model file is, told from its header")
    inspect.add_argument("file", metavar="FILE", help="a checkpoint, an index or a folder")
    plan = add("plan", "the memory plan of a job: what stays, what is streamed, what would fit")
    _plan_options(plan)
    presets = add("presets", "the table of presets")
    doctor = add("doctor", "what this machine can do, with self-tests")
    _folder_options(doctor, "outdir", "models_dir", "state_dir")
    convert = add(
        "convert", "quantise a checkpoint once, in little memory; goes on where it was stopped"
    )
    _convert_options(convert)
    bench = add("bench", "run a benchmark")
    _bench_options(bench)
    for command in (inspect, plan, presets, doctor, convert):
        _json_option(command)
    return parser


def request_of(arguments: argparse.Namespace) -> GenerationRequest:
    """The request that ``generate`` was given: the job file's, with what was typed instead of its values.

    Raises:
        UserError: the job file cannot be read, or a value cannot be used.
    """
    values = read_job_file(Path(arguments.request)) if arguments.request is not None else {}
    typed = {
        field: getattr(arguments, field)
        for field in (*(option.field for option in REQUEST_OPTIONS), "expand", "loras", "preview")
        if hasattr(arguments, field)
    }
    return GenerationRequest.from_dict({**values, **typed})


def read_job_file(path: Path) -> dict[str, Any]:
    """The values of a job file, not yet checked.

    Raises:
        UserError: it is missing, cannot be read, or is not a JSON object.
    """
    try:
        values = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            "request", str(path), f"a job file that can be read ({error.strerror})"
        ) from None
    except UnicodeDecodeError:
        raise UserError("request", str(path), "a job file in JSON, as UTF-8 text") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError("request", str(path), f"a job file in JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError("request", values, "a job file that holds a JSON object")
    return values


def default_state_dir() -> Path:
    """``$XDG_STATE_HOME/k1``, else ``~/.local/state/k1``."""
    home = os.environ.get("XDG_STATE_HOME", "")
    return (Path(home) if home else Path("~/.local/state").expanduser()) / "k1"


def _request_option(parser: argparse.ArgumentParser, option: Option) -> None:
    kind: Any = _number_of(option.field) if option.field in RANGES else str
    parser.add_argument(
        option.flag,
        dest=option.field,
        metavar=option.metavar,
        help=option.help,
        type=kind,
        default=argparse.SUPPRESS,
    )


def _plan_options(parser: argparse.ArgumentParser) -> None:
    for option in REQUEST_OPTIONS:
        if option.field in PLAN_FIELDS:
            _request_option(parser, option)
    _lora_option(parser)
    _no_expand_option(parser)
    _folder_options(parser, "models_dir", "state_dir")


def _generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--request", metavar="JOB.JSON", help="take the job from a file; options override it"
    )
    for option in REQUEST_OPTIONS:
        _request_option(parser, option)
    _lora_option(parser)
    _no_expand_option(parser)
    parser.add_argument(
        "--no-preview",
        dest="preview",
        action="store_false",
        default=argparse.SUPPRESS,
        help="make no pictures of the unfinished video, where the job is shown in the studio",
    )
    saving_options(parser)
    _folder_options(parser, "outdir", "models_dir", "state_dir")
    _json_option(parser)


def _lora_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora",
        dest="loras",
        metavar="F[:strength]",
        type=_lora,
        action="append",
        default=argparse.SUPPRESS,
        help="an adapter and how strongly it acts; may be given several times",
    )


def _no_expand_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-expand",
        dest="expand",
        action="store_false",
        default=argparse.SUPPRESS,
        help="leave the prompt as it is",
    )


def _studio_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on")
    parser.add_argument("--port", default=7860, type=_port, metavar="P", help="default 7860")
    parser.add_argument("--listen", action="store_true", help="let other machines in; needs --auth")
    parser.add_argument("--auth", metavar="USER:PASS", help="ask every visitor for these")
    parser.add_argument("--device", metavar="D", help="auto, cpu, cuda or cuda:N")
    _folder_options(parser, "outdir", "models_dir", "state_dir")
    parser.set_defaults(outdir=None)  # so that the settings can tell whether it was typed


def _convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", help="a transformer checkpoint, an index or a folder"
    )
    parser.add_argument("--to", required=True, choices=("int8", "bf16"), help="the format wanted")
    parser.add_argument("--out", required=True, metavar="F", help="the new file, .safetensors")
    parser.add_argument(
        "--verify", action="store_true", help="then compare: noise of every layer in dB"
    )


def _bench_options(parser: argparse.ArgumentParser) -> None:
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, bench in BENCHES.items():
        command = names.add_parser(
            name, help=bench.title, description=bench.title, allow_abbrev=False
        )
        for option in bench.options:
            switch: dict[str, Any] = {"action": "store_true"}
            valued: dict[str, Any] = {"type": option.kind, "metavar": option.kind.__name__.upper()}
            command.add_argument(
                option.flag,
                dest=option.keyword,
                default=argparse.SUPPRESS,
                help=option.help,
                **(switch if option.kind is bool else valued),
            )
        _folder_options(command, "state_dir")
        _json_option(command)


def _folder_options(parser: argparse.ArgumentParser, *names: str) -> None:
    if "outdir" in names:
        parser.add_argument(
            "--outdir", type=_folder, default=Path("outputs"), metavar="D", help="default ./outputs"
        )
    if "models_dir" in names:
        parser.add_argument(
            "--models-dir",
            dest="models_dirs",
            type=_folder,
            action="append",
            default=[],
            metavar="D",
            help="look for models here too; may be given several times",
        )
    if "state_dir" in names:
        parser.add_argument(
            "--state-dir",
            type=_folder,
            default=default_state_dir(),
            metavar="D",
            help="jobs, log and uploads (default ~/.local/state/k1)",
        )


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def _number_of(field: str) -> Any:
    """Reads a number for a field; the request judges its range."""

    def read(text: str) -> int | float:
        try:
            return int(text)
        except ValueError:
            pass
        try:
            return float(text)
        except ValueError:
            low, high = RANGES.get(field, (1, 2**31))
            raise UserError(field, text, f"a number from {low:g} to {high:g}") from None

    return read


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise UserError("port", text, "a number from 1 to 65535")
    return int(text)


def _folder(text: str) -> Path:
    return Path(text).expanduser()


def _lora(text: str) -> dict[str, Any]:
    """``F`` or ``F:strength``; a colon that no number follows belongs to the path."""
    path, _, last = text.rpartition(":")
    try:
        strength = float(last)
    except ValueError:
        if path.endswith(LORA_SUFFIX):
            raise UserError("lora", text, "FILE or FILE:STRENGTH, the strength a number") from None
        return {"path": text}
    return {"path": path, "strength": strength} if path else {"path": text}

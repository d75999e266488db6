"""README.md and the command line say the same."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from kandinsky5.arguments import build_parser
from kandinsky5.cli import COMMANDS

README = Path(__file__).resolve().parents[1] / "README.md"


def text() -> str:
    return README.read_text(encoding="utf-8")


def blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", text(), re.MULTILINE | re.DOTALL)


def documented() -> list[list[str]]:
    """The command lines of the README that start k1.py, without the program's name."""
    lines = re.findall(r"^python k1\.py\b(.*)$", text(), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def help_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        build_parser().parse_args([*command, "--help"])
    return capsys.readouterr().out


def test_it_begins_with_two_commands_that_set_up_everything() -> None:
    studio, tests = blocks()[0].strip(), blocks()[1].strip()
    for command, requirements, last in (
        (studio, "requirements.txt", "python k1.py"),
        (tests, "requirements-dev.txt", "python -m pytest"),
    ):
        first, second, third = command.split(" && ")
        venv = first.removeprefix("python3 -m venv ")
        assert second == f"{venv}/bin/pip install -r {requirements}"
        assert third == f"{venv}/bin/{last}"


def test_ci_finds_exactly_one_test_command() -> None:
    script = (README.parent / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -E '([^']+)' README\.md", script)
    assert pattern is not None
    assert re.findall(pattern[1], text(), re.MULTILINE) == [blocks()[1].strip()]


@pytest.mark.parametrize("line", documented(), ids=" ".join)
def test_a_documented_line_can_be_typed(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = line[0] if line else "ui"
    if "--help" not in line:
        arguments = build_parser().parse_args(line or ["ui"])
        assert arguments.command == command
    shown = help_of(line[:2] if command == "bench" else [command], capsys)
    for flag in (word for word in line if word.startswith("--")):
        assert flag in shown


def test_every_command_is_documented_and_none_that_is_not() -> None:
    assert {line[0] for line in documented() if line} == set(COMMANDS) - {"version"}


def test_exit_codes_are_those_of_the_program() -> None:
    from kandinsky5 import errors

    codes = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.K1Error)
    }
    assert {int(code) for code in re.findall(r"^\| (\d) \|", text(), re.MULTILINE)} == {0, *codes}


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", text()):
        assert (README.parent / target).is_file()


def test_the_layout_names_what_is_there() -> None:
    layout = text().partition("## Layout")[2]
    for cell in re.findall(r"^\| (`.+?) \|", layout, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", cell):
            inside = README.parent / "kandinsky5" / name
            assert (README.parent / name).exists() or inside.exists(), name

"""Budgets that cannot be, typed for ``plan`` and ``generate``: one line, exit 2, nothing is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from demo_runs import quick, ran

from kandinsky5 import cli
from kandinsky5.memory import free
from kandinsky5.memory.budget import GB
from kandinsky5.pipeline import accept
from kandinsky5.pipeline.pipeline import Pipeline

COMMANDS = (["plan"], ["generate", "--prompt", "a red circle", "--out", "out.mp4"])
BUDGETS = (
    "--ram 0",
    "--ram -3",
    "--ram nan",
    "--ram 1e9",
    "--vram 0",
    "--vram -0.5",
    "--vram 2000",
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_out_of_range_is_refused_with_the_range(
    tmp_path: Path, monkeypatch, capfd, command: list[str], budget: str
) -> None:
    def loaded(*arguments: object) -> None:
        raise AssertionError("a model was looked for")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(accept, "find_model_files", loaded)
    words = [*command, "--preset", "demo-t2v", *budget.split(), "--state-dir", str(tmp_path / "s")]
    assert cli.main(words) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("k1: ") and said.err.count("\n") == 1
    assert budget.split()[0].removeprefix("--") in said.err and "from 0.5 to" in said.err
    assert not (tmp_path / "out.mp4").exists()


def test_more_ram_than_there_is_runs_and_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(free, "memory_bytes", lambda: (16 * GB, 8 * GB))
    pipeline = Pipeline()
    run = ran(tmp_path, quick(steps=1, ram=64.0), pipeline=pipeline)
    pipeline.release()
    (notice,) = [text for text in run.notices if "budget" in text]
    assert "64.0 GB of RAM is more than this machine has (16.0 GB)" in notice
    assert run.result is not None and notice in run.result.notices


def test_a_budget_that_is_too_small_is_refused_with_what_would_do(
    tmp_path: Path, monkeypatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["generate", "--preset", "demo-t2v", "--prompt", "a circle", "--out", "out.mp4"]
    assert cli.main([*words, "--ram", "0.6", "--state-dir", str(tmp_path / "state")]) == 4
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "0.60 GB are given" in said and "it would fit in" in said
    assert not (tmp_path / "out.mp4").exists()

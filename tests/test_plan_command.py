"""``k1.py plan``: what is typed, what is printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kandinsky5 import cli, plan_command
from kandinsky5.memory import free
from kandinsky5.memory.budget import GB
from kandinsky5.plan_command import plan_of
from kandinsky5.presets import DEMO_FOLDER
from tests.support.loras import random_pairs, save_kohya

RunPlan = Callable[..., tuple[int, str, str]]
PRO = {"preset": "pro-t2v-5s-sd", "vram": 8.0, "ram": 32.0}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 GB, 20 of them free, without a card."""
    monkeypatch.setattr(free, "memory_bytes", lambda: (64 * GB, 20 * GB))
    monkeypatch.setattr(free, "own_bytes", lambda: 0)
    monkeypatch.setattr(free, "_card", lambda device: (None, None))


@pytest.fixture
def typed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> RunPlan:
    """Run the command line: exit code, stdout, stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(["plan", *argv, "--state-dir", str(tmp_path)])
        return code, *capfd.readouterr()

    return run


def test_it_prints_one_json_document(typed: RunPlan) -> None:
    line = "--preset pro-t2v-5s-sd --vram 8 --ram 32 --weights int8 --json"
    code, out, _ = typed(*line.split())
    document = json.loads(out)
    assert code == 0
    assert document["fits"] is True
    assert document["weights"] == "int8"
    assert document["peak_vram_bytes"] <= 8 * GB


def test_every_option_counts() -> None:
    plain = plan_of(PRO)[0]
    for change in (
        {"width": 512, "height": 512},
        {"seconds": 3.0},
        {"guidance": 1.0},
        {"steps": 20},
        {"expand": False},
        {"weights": "bf16"},
        {"text_weights": "bf16"},
        {"vram": 16.0},
        {"ram": 64.0},
        {"dtype": "fp32"},
    ):
        assert plan_of({**PRO, **change})[0] != plain, change


def test_the_table_has_a_bar_for_every_stage(typed: RunPlan) -> None:
    code, out, _ = typed(*"--preset pro-t2v-5s-sd --vram 8 --ram 32".split())
    assert code == 0
    lines = out.splitlines()
    for stage in ("expand", "encode text", "prepare", "denoise", "decode"):
        (row,) = (line for line in lines if line.startswith(f"{stage} "))
        assert row.count("█") + row.count("░") == plan_command.BAR_CELLS
    assert "47,616 tokens" in out
    assert "for both evaluations together" in out
    assert "between uses" in out


def test_what_does_not_fit_shows_an_arrow_and_a_way_out() -> None:
    document, text = plan_of({"preset": "pro-t2v-10s-hd", "vram": 4.0, "ram": 32.0})
    assert document["fits"] is False
    assert "DOES NOT FIT" in text
    assert "▶" in text
    assert "problem: it would fit in" in text


def test_without_budgets_it_takes_what_is_free_and_says_so() -> None:
    document, text = plan_of({"preset": "demo-i2v"})
    assert document["vram_budget_bytes"] is None
    assert document["ram_budget_bytes"] == 20 * GB
    assert document["fits"] is True
    assert "no GPU" in text


def test_a_free_card_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free, "_card", lambda device: (7 * GB, 8 * GB))
    document, text = plan_of({"preset": "lite-t2v-5s-sft"})
    assert document["vram_budget_bytes"] == 7 * GB
    assert "7.0 GB that are free" in text


def test_more_ram_than_there_is_is_told() -> None:
    notices = plan_of({**PRO, "ram": 128.0})[0]["notices"]
    assert any("more than this machine has (64.0 GB)" in notice for notice in notices)


@pytest.mark.parametrize(
    "words",
    ["--vram 0", "--vram -3", "--ram nan", "--vram 2000", "--preset none", "--resident 3"],
)
def test_bad_input_is_one_line_and_exit_2(typed: RunPlan, words: str) -> None:
    code, out, err = typed(*words.split())
    assert code == 2
    assert out == ""
    assert err.startswith("k1: ")
    assert err.count("\n") == 1


def test_a_files_own_dimensions_and_format_are_taken() -> None:
    path = str(DEMO_FOLDER / "transformer")
    document, _ = plan_of({**PRO, "dit": path})
    assert document["model"] == "demo"
    assert document["resident_blocks"] == 6


def test_a_lora_is_counted_where_the_model_is_here(typed: RunPlan, tmp_path: Path) -> None:
    sizes = {"visual_transformer_blocks.0.self_attention.to_query": (192, 192)}
    path = save_kohya(tmp_path / "style.safetensors", random_pairs(sizes, 100), alpha=1.0)
    line = ("--preset", "demo-t2v", "--ram", "8", "--json")
    plain = json.loads(typed(*line)[1])
    found = json.loads(typed(*line, "--lora", f"{path}:0.5")[1])
    assert plain["ram_budget_bytes"] - found["ram_budget_bytes"] == 4 * 100 * 2 * 192
    assert any("style.safetensors: 3 of 3 tensors match" in text for text in found["notices"])
    code, _, err = typed("--preset", "demo-t2v", "--lora", str(tmp_path / "none.safetensors"))
    assert (code, err.count("\n")) == (2, 1)


def test_a_folder_without_a_model_is_one_line(typed: RunPlan, tmp_path: Path) -> None:
    code, _, err = typed("--preset", "lite-t2v-5s-sft", "--model-dir", str(tmp_path))
    assert code in (2, 3)
    assert err.count("\n") == 1


def test_a_file_that_is_no_transformer_is_refused(typed: RunPlan, tmp_path: Path) -> None:
    code, _, err = typed("--vram", "8", "--dit", str(DEMO_FOLDER / "vae"))
    assert code == 3
    assert "not a transformer" in err
    assert typed("--vram", "8", "--dit", str(tmp_path / "none.safetensors"))[0] in (2, 3)

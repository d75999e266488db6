"""The choice of tile sizes and the file that keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from int8 import tuning
from int8.configs import FEW_ROWS, HOPPER, MatmulConfig, configs_for, row_bucket
from int8.tuning import Choices, cache_file, choose, fastest

FIRST, SECOND, THIRD = HOPPER[:3]


def test_the_fastest_is_taken_and_a_refused_one_left_out() -> None:
    def seconds(run) -> float:
        config = run()
        if config == FIRST:
            raise RuntimeError("out of resource: shared memory")
        return {SECOND: 2.0, THIRD: 1.0}[config]

    assert fastest(lambda config: config, [FIRST, SECOND, THIRD], seconds) == THIRD


def test_a_card_that_refuses_all_says_so() -> None:
    def seconds(run) -> float:
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no int8 matmul config"):
        fastest(lambda config: config, [FIRST], seconds)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=["torch", "triton"],
)
def test_memory_that_runs_out_is_not_taken_for_a_refusal(error: Exception) -> None:
    def seconds(run) -> float:
        if run() == FIRST:
            raise error
        return 1.0

    with pytest.raises(torch.OutOfMemoryError):
        fastest(lambda config: config, [FIRST, SECOND], seconds)


def test_choices_are_kept_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "int8.json"
    Choices(path).put("a", FIRST)
    Choices(path).put("b", SECOND)
    again = Choices(path)
    assert (again.get("a"), again.get("b"), again.get("c")) == (FIRST, SECOND, None)
    assert [file.name for file in path.parent.iterdir()] == ["int8.json"]


def test_two_processes_do_not_lose_each_others_choices(tmp_path: Path) -> None:
    path = tmp_path / "int8.json"
    one, other = Choices(path), Choices(path)
    one.put("a", FIRST)
    other.put("b", SECOND)
    assert Choices(path).get("a") == FIRST


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 1}',
        '{"version": 1, "configs": []}',
        '{"version": 1, "configs": {"a": [1, 2]}}',
        '{"version": 1, "configs": {"a": [128, 128, 128, 8, 8, -4]}}',
        '{"version": 1, "configs": {"a": "big"}}',
        '{"version": 99, "configs": {"a": [128, 128, 128, 8, 8, 4]}}',
        "\udcff",
    ],
)
def test_a_broken_file_is_as_none_and_is_replaced(text: str, tmp_path: Path) -> None:
    path = tmp_path / "int8.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    choices = Choices(path)
    assert choices.get("a") is None
    choices.put("b", FIRST)
    assert json.loads(path.read_text())["configs"] == {"b": FIRST.to_list()}


def test_a_place_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    choices = Choices(tmp_path / "file" / "int8.json")
    choices.put("a", FIRST)
    assert choices.get("a") == FIRST


def test_the_file_lies_in_the_xdg_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_file() == Path("/somewhere/k1/int8.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file() == Path.home() / ".cache" / "k1" / "int8.json"


def test_without_a_gpu_the_tables_first_choice_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "fastest", lambda *given: pytest.fail("nothing is timed on a CPU"))
    found = choose(lambda config: None, torch.device("cpu"), (50_000, 4096, 4096), 1024)
    assert found == configs_for((8, 0), 50_000, 1024)[0]


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("rows", [1, 64, 65, 1024, 1025, 300_000])
@pytest.mark.parametrize("group", [128, 1024])
def test_every_machine_has_a_config_whose_steps_divide_a_group(
    capability: tuple[int, int], rows: int, group: int
) -> None:
    configs = configs_for(capability, rows, group)
    assert configs
    assert all(group % config.block_k == 0 for config in configs)


def test_few_rows_get_small_tiles() -> None:
    assert configs_for((9, 0), 3, 1024) == (FEW_ROWS,)


def test_rows_are_put_into_buckets_of_powers_of_two() -> None:
    assert [row_bucket(rows) for rows in (1, 2, 3, 64, 65, 47_616)] == [1, 2, 4, 64, 128, 65_536]


def test_a_config_survives_its_list() -> None:
    assert MatmulConfig.from_list(FIRST.to_list()) == FIRST

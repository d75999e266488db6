"""int8's benchmarks as K1 runs them: the baseline among them, targets and circumstances told."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from int8.bench import PRO_SHAPES, PRO_TOKENS
from kandinsky5.bench import baselines, int8_layers
from kandinsky5.bench.int8_layers import OWN, RIVAL, accuracy, is_accurate, rivals, speed_reached
from kandinsky5.benches import BENCHES
from kandinsky5.errors import UserError

WHERE = {"date", "hardware", "versions", "command"}


def measured(speedup: float, tokens: int = PRO_TOKENS) -> dict:
    """What a run in which every layer is so much faster than bf16 gives."""
    shape = {"speedup_over_bf16": {"bf16_cublas": 1.0, OWN: speedup}}
    return {"tokens": tokens, "shapes": {name: copy.deepcopy(shape) for name in PRO_SHAPES}}


def test_the_bench_compares_with_the_kernels_of_the_baseline(monkeypatch) -> None:
    pytest.importorskip("triton")
    asked: dict = {}

    def timed(**given) -> dict:
        asked.update(given)
        return measured(1.5)

    monkeypatch.setattr(int8_layers, "int8_bench", timed)
    found = BENCHES["int8"].run({"repetitions": 3})
    assert asked["repetitions"] == 3 and list(asked["more"]) == [RIVAL]
    assert found["reached"] == {"B5": True}
    assert found.keys() >= WHERE and "driver" in found["hardware"]
    json.dumps(found)


@pytest.mark.parametrize("lacking", ["triton", "the file"])
def test_without_triton_or_the_file_there_is_no_baseline(tmp_path, monkeypatch, lacking) -> None:
    if lacking == "triton":
        monkeypatch.setattr(int8_layers, "has_triton", lambda: False)
    else:
        monkeypatch.setattr(baselines, "FOLDER", tmp_path)
    assert rivals() == {}


def test_every_layer_has_to_be_fast_enough() -> None:
    assert speed_reached(measured(1.4)) is True
    slow = measured(2.0)
    slow["shapes"]["ff_out"]["speedup_over_bf16"][OWN] = 1.39
    assert speed_reached(slow) is False


def test_of_another_size_or_without_triton_nothing_is_said_of_the_target() -> None:
    assert speed_reached(measured(9.0, tokens=2048)) is None
    without = measured(9.0)
    for shape in without["shapes"].values():
        del shape["speedup_over_bf16"][OWN]
    assert speed_reached(without) is None


def test_the_table_of_accuracy_tells_its_targets_and_where_it_was_made() -> None:
    found = accuracy(tokens=64, outputs=64)
    assert found["reached"] == {"A5": True, "gaussian": True, "outliers": True, "gelu": True}
    assert found.keys() >= WHERE


def test_noise_and_a_wrong_factor_both_miss_the_target(monkeypatch) -> None:
    right = {"sqnr_db": 38.0, "gain": 1.001}
    assert is_accurate(right, 38.0)
    assert not is_accurate(right | {"sqnr_db": 37.9}, 38.0)
    assert not is_accurate(right | {"gain": 0.998}, 38.0)
    monkeypatch.setattr(int8_layers, "LEAST_DB", {"gaussian": 38.0, "outliers": 99.0})
    told = accuracy(tokens=16, outputs=16)["reached"]
    assert told == {"A5": False, "gaussian": True, "outliers": False}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    with pytest.raises(UserError, match="needs a CUDA device"):
        BENCHES["int8"].run({})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_card_the_baseline_is_right_and_timed() -> None:
    found = BENCHES["int8"].run({"tokens": 2048, "repetitions": 2})
    for shape in found["shapes"].values():
        assert {OWN, RIVAL} <= set(shape["seconds"])

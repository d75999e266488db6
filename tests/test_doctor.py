"""What doctor says of machines that are not this one, and that it can look at this one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kandinsky5 import fast_paths
from kandinsky5.doctor import (
    MISSING,
    OK,
    WARNING,
    Check,
    Report,
    diagnose,
    judge_gpu,
    judge_memory,
    judge_packages,
    pinned_versions,
)
from kandinsky5.fast_paths import judge_engine, judge_nf4, judge_weights
from kandinsky5.machine import Card, GpuFacts, imported, memory_bytes, output_of
from kandinsky5.model import fast_weights, text_nf4
from kandinsky5.model.fast_weights import WeightsPath

CARD = Card("NVIDIA H200", (9, 0), 140 * 10**9, 139 * 10**9)


def only(checks: list[Check]) -> Check:
    (check,) = checks
    return check


def test_a_card_with_driver_and_cuda_is_fine() -> None:
    check = only(judge_gpu(GpuFacts("13.0", "580.95.05", (CARD,), True)))
    assert check.status == OK
    assert all(word in check.found for word in ("H200", "140.0 GB", "580.95.05", "CUDA 13.0"))


def test_each_card_has_its_line() -> None:
    old = Card("Tesla T4", (7, 5), 16 * 10**9, 15 * 10**9)
    checks = judge_gpu(GpuFacts("13.0", "580.95.05", (CARD, old), True))
    assert [check.status for check in checks] == [OK, WARNING]


@pytest.mark.parametrize(
    ("facts", "found", "advice"),
    [
        (GpuFacts(None, None), "no NVIDIA card", "demo runs on the CPU"),
        (GpuFacts("13.0", None, card_on_bus=True), "no driver", "install NVIDIA's driver"),
        (GpuFacts("13.0", "535.183.01", card_on_bus=True), "too old for CUDA 13.0", "580 or newer"),
        (GpuFacts("12.8", "470.256.02", card_on_bus=True), "too old for CUDA 12.8", "525 or newer"),
        (GpuFacts(None, "580.95.05", card_on_bus=True), "built for the CPU", "install torch again"),
        (GpuFacts("13.0", "580.95.05", card_on_bus=True), "sees no card", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_why_there_is_no_gpu_and_what_helps(facts: GpuFacts, found: str, advice: str) -> None:
    check = only(judge_gpu(facts))  # fault 27
    assert check.status == MISSING
    assert found in check.found
    assert advice in check.advice


def test_packages_are_compared_with_the_pins() -> None:
    pins = {
        "torch": ("2.13.0",),
        "numpy": ("2.4.6", "2.2.6"),
        "triton": ("3.7.1",),
        "gradio": ("6",),
    }
    here = {"torch": "2.13.0+cpu", "numpy": "2.2.6", "triton": "3.9.0"}
    checks = judge_packages(pins, here.get)
    assert [check.status for check in checks] == [OK, OK, WARNING, MISSING]
    assert "3.7.1" in checks[2].found
    assert "requirements.txt" in checks[3].advice


@pytest.mark.parametrize(
    ("version", "status"), [("2.10.1", OK), ("2.9.0", WARNING), ("3.0", WARNING)]
)
def test_a_range_of_torch_releases_is_fine(version: str, status: str) -> None:
    checks = judge_packages({"torch": ("2.13.0",)}, lambda name: version)
    assert only(checks).status == status


def test_pins_are_read_from_requirements(repository: Path, tmp_path: Path) -> None:
    pins = pinned_versions(repository / "requirements.txt")
    assert pins["torch"] == ("2.13.0",)
    assert len(pins["numpy"]) == 2
    assert pinned_versions(tmp_path / "absent.txt") == {}


def test_little_memory_is_a_warning() -> None:
    assert judge_memory(16 * 10**9, 12 * 10**9).status == OK
    assert judge_memory(4 * 10**9, 10**9).status == WARNING
    assert judge_memory(None, None).status == WARNING


def test_memory_of_this_machine_is_read() -> None:
    total, available = memory_bytes()
    assert total is not None and available is not None
    assert 0 < available <= total


@pytest.mark.parametrize(
    ("statuses", "sentence"),
    [
        ({"torch": OK, "ffmpeg": OK, "demo model": OK, "gpu": OK}, "there is a GPU"),
        ({"torch": OK, "ffmpeg": OK, "demo model": OK, "gpu": MISSING}, "on the CPU"),
        ({"torch": OK, "ffmpeg": MISSING, "demo model": OK, "gpu": OK}, "does not work here yet"),
        ({"torch": MISSING, "ffmpeg": OK, "demo model": OK}, "does not work here yet"),
    ],
)
def test_one_sentence_says_what_works(statuses: dict[str, str], sentence: str) -> None:
    report = Report(tuple(Check(name, status, "") for name, status in statuses.items()))
    assert sentence in report.summary  # fault 27


def test_no_triton_is_not_the_end_of_the_demo() -> None:
    names = {"torch": OK, "ffmpeg": OK, "demo model": OK, "gpu": MISSING, "triton": MISSING}
    assert Report(tuple(Check(name, status, "") for name, status in names.items())).demo_works


def test_a_module_that_fails_while_importing_says_why() -> None:
    assert "No module named" in str(imported("k1_no_such_module"))


def test_an_engine_is_named_with_its_self_test() -> None:
    passed = judge_engine("flash2", "2.8.3", None, True, 0.0031)
    assert (passed.name, passed.status) == ("attention flash2", OK)
    assert "2.8.3" in passed.found and "3e-03" in passed.found
    absent = judge_engine("sage", None, "sageattention is not installed", False, None)
    assert absent.status == MISSING and "not needed" in absent.advice
    failed = judge_engine("flash3", "3.0", "flash_attn_3 is wrong by 0.4", True, 0.4)
    assert failed.status == WARNING
    assert "wrong by 0.4" in failed.found and "not used" in failed.advice


def test_weights_are_named_with_what_computes_them() -> None:
    fast = judge_weights("int8", "cuda", WeightsPath("triton"))
    assert (fast.name, fast.status) == ("weights int8", OK)
    assert fast.found == "by triton on the GPU, right by its self-test" and not fast.advice
    second = judge_weights("int8", "cuda", WeightsPath("int_mm", "int8 by triton: off"))
    assert (second.status, second.found) == (WARNING, "int8 by triton: off")
    assert "auto chooses another format" in second.advice and "int_mm" in second.advice
    nothing = judge_weights("int8", "cuda", WeightsPath(None, "int8 by torch: off"))
    assert nothing.status == WARNING and "--weights bf16" in nothing.advice


def test_a_path_that_a_device_lacks_is_a_warning_on_a_card_alone() -> None:
    for kind, status in (("cuda", WARNING), ("cpu", OK)):
        found = judge_weights("fp8", kind, WeightsPath("dequantised", lacking="no float8 product"))
        assert found.status == status
        assert found.found == "by dequantising them block by block: no float8 product"


def test_nf4_is_named_with_its_self_test() -> None:
    assert judge_nf4("0.50.2", None).status == OK
    absent = judge_nf4(None, "bitsandbytes is not installed")
    assert absent.status == MISSING and "not needed" in absent.advice
    wrong = judge_nf4("0.50.2", "bitsandbytes gives wrong numbers on cuda")
    assert wrong.status == WARNING and "0.50.2: bitsandbytes gives" in wrong.found


@pytest.mark.parametrize("weights", ["int8", "fp8", "nf4"])
def test_no_memory_for_a_self_test_is_a_warning_and_the_rest_is_told(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(name: str) -> None:
        if name == weights:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(
        fast_weights, "weights_path", lambda name, device: told(name) or WeightsPath("torch")
    )
    monkeypatch.setattr(text_nf4, "nf4_problem", lambda device: told("nf4"))
    found = {check.name: check for check in fast_paths._weights(torch, torch.device("cpu"))}
    assert list(found) == ["weights int8", "weights fp8", "weights nf4"]
    lacking = found.pop(f"weights {weights}")
    assert (lacking.status, lacking.found) == (WARNING, "no memory free for the self-test")
    assert {check.status for check in found.values()} == {OK}


def test_a_command_that_fails_or_is_absent_gives_nothing() -> None:
    assert output_of(("false",)) is None
    assert output_of(("k1-no-such-program",)) is None


def test_this_machine_is_diagnosed(tmp_path: Path) -> None:
    report = diagnose(out_dir=tmp_path / "not" / "there", state_dir=tmp_path)
    by_name = {check.name: check for check in report.checks}
    assert {"torch", "ffmpeg", "memory", "triton", "gpu", "demo model", "pro model"} <= set(by_name)
    assert by_name["torch"].status == by_name["ffmpeg"].status == OK
    assert by_name["attention nabla"].status == OK
    assert {f"attention {name}" for name in ("flash2", "flash3", "sage")} <= set(by_name)
    assert {f"weights {name}" for name in ("int8", "fp8", "nf4")} <= set(by_name)
    assert by_name["weights int8"].status == OK and "self-test" in by_name["weights int8"].found
    assert not (tmp_path / "not").exists()
    assert {check.status for check in report.checks} <= {OK, WARNING, MISSING}
    assert all(check.advice for check in report.checks if check.status == MISSING)
    assert json.loads(json.dumps(report.to_dict()))["checks"]
    assert report.summary in report.to_text()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = diagnose(out_dir=tmp_path / "file" / "outputs", state_dir=tmp_path)
    check = next(check for check in report.checks if check.name == "output folder")
    assert check.status == MISSING


def test_the_cards_stand_in_the_report_with_their_memory() -> None:
    card = Card("a card", (8, 9), total_bytes=24, free_bytes=20)
    (told,) = json.loads(json.dumps(Report((), (card,)).to_dict()))["cards"]
    assert (told["name"], told["total_bytes"], told["free_bytes"]) == ("a card", 24, 20)

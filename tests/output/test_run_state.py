"""Unfinished runs come back to the bit; a file that was tampered with is refused with the reason."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from kandinsky5.errors import UserError
from kandinsky5.output import atomic
from kandinsky5.output.atomic import DiskFull
from kandinsky5.output.run_state import (
    RunState,
    SavedText,
    describe_run_state,
    load_run_state,
    save_run_state,
)
from kandinsky5.request import GenerationRequest, settle

STEPS = 4


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def settled(**changes: Any) -> GenerationRequest:
    values = {"prompt": "a red circle 😀 \ud800", "seed": 3, "steps": STEPS, "guidance": 2.0}
    request, _ = settle(GenerationRequest(**{**values, **changes}))
    return request


def run(**changes: Any) -> RunState:
    parts: dict[str, Any] = {
        "request": settled(),
        "step": 2,
        "times": torch.linspace(1, 0, STEPS + 1),
        "latent": drawn(7, 8, 8, 16),
        "positive": SavedText(drawn(5, 32, seed=1), drawn(12, seed=2)),
        "negative": SavedText(drawn(2, 32, seed=3), drawn(12, seed=4)),
        "first_frame": drawn(1, 8, 8, 16, seed=5),
        "checkpoints": {"transformer": "ab" * 32, "vae": None},
        "cache_tensors": {
            "positive": drawn(6, 4, seed=6).bfloat16(),
            "skips": torch.tensor([1, 2]),
            "ran": torch.tensor([True, False]),
        },
        "cache_values": {"error": 0.1, "in_a_row": [1, 0]},
        "facts": {"seconds": {"denoise": 1.5}, "dtype": "fp32"},
    }
    return RunState(**{**parts, **changes})


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_run_state(tmp_path / "run.safetensors", run(), now=1_700_000_000.0)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        load_run_state(path)
    assert refused.value.field == "file"
    assert "\n" not in str(refused.value)
    return str(refused.value)


def rewritten(path: Path, change: Any) -> Path:
    """The file with its header, as JSON, changed by a function; the data stays."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return path


def test_everything_comes_back_to_the_bit(saved):
    first, second = run(), load_run_state(saved)
    for name, tensor in first.tensors().items():
        other = second.tensors()[name]
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name
    assert first.tensors().keys() == second.tensors().keys()
    for name in ("request", "step", "total", "checkpoints", "cache_values", "facts"):
        assert getattr(first, name) == getattr(second, name), name
    assert second.saved_at == 1_700_000_000.0
    assert second.k1_version


def test_a_run_without_guidance_picture_or_cache_comes_back_too(tmp_path):
    plain = run(
        request=settled(guidance=1.0),
        negative=None,
        first_frame=None,
        checkpoints={},
        cache_tensors={},
        cache_values={},
        facts={},
    )
    back = load_run_state(save_run_state(tmp_path / "a", plain))
    assert back.negative is None and back.first_frame is None and not back.cache_tensors


@pytest.mark.parametrize("step", [0, STEPS])
def test_a_run_may_stand_before_its_first_step_or_after_its_last(tmp_path, step):
    assert load_run_state(save_run_state(tmp_path / "a", run(step=step))).step == step


def test_equal_runs_give_equal_bytes(tmp_path):
    paths = [save_run_state(tmp_path / name, run(), now=1.0) for name in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_other_programs_can_read_the_file(saved):
    with safetensors.safe_open(saved, framework="pt") as file:
        assert torch.equal(file.get_tensor("latent"), run().latent)
        assert json.loads(file.metadata()["k1_run_state"])["step"] == 2


def test_tensors_of_inference_and_strided_ones_are_saved(tmp_path):
    with torch.inference_mode():
        turned = drawn(7, 8, 8, 16).transpose(1, 2)
        path = save_run_state(tmp_path / "a", run(latent=turned))
    assert torch.equal(load_run_state(path).latent, turned)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"latent": drawn(7, 8, 9, 16)}, "where its request means"),
        ({"latent": drawn(7, 8, 8)}, r"not float32 \[T, H, W, C\]"),
        ({"latent": drawn(7, 8, 8, 16).half()}, "not float32"),
        ({"latent": torch.full((7, 8, 8, 16), math.nan)}, "latent holds NaN"),
        ({"step": 5}, "step 5 of a schedule of 4"),
        ({"step": -1}, "step -1"),
        ({"step": True}, "step True"),
        ({"times": torch.linspace(0, 1, 5)}, "does not fall"),
        ({"times": torch.linspace(2, 0, 5)}, "does not fall"),
        ({"times": torch.tensor([1.0, math.nan, 0.5, 0.2, 0.0])}, "does not fall"),
        ({"times": torch.linspace(1, 0, 4)}, "4 steps in its request, 3"),
        ({"times": torch.linspace(1, 0, 5).double()}, r"not float32 \[steps\+1\]"),
        ({"negative": None}, "guidance 2.0 does not fit"),
        ({"positive": SavedText(drawn(5, 31), drawn(12))}, "other widths"),
        ({"positive": SavedText(drawn(5), drawn(12))}, r"not \[L, D\]"),
        ({"first_frame": drawn(1, 8, 8, 15)}, "first frame"),
        ({"cache_tensors": {"a": torch.tensor([math.inf])}}, r"cache\.a holds NaN"),
        ({"cache_tensors": {"a": torch.zeros(2, dtype=torch.complex64)}}, r"cache\.a is"),
        ({"checkpoints": {"vae": 3}}, "has no hash"),
        ({"request": GenerationRequest(prompt="not settled")}, "no seed or no size"),
    ],
)
def test_parts_that_do_not_fit_together_make_no_state(change, reason):
    with pytest.raises(ValueError, match=reason):
        run(**change)


def test_other_weights_are_refused_and_unknown_parts_pass():
    state = run()
    state.check_checkpoints({"transformer": "ab" * 32, "text": "99"})
    with pytest.raises(UserError, match="began with another file") as refused:
        state.check_checkpoints({"transformer": "cd" * 32})
    assert refused.value.field == "transformer"


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", 3), ("facts", {}), ("request", settled(seed=4).to_dict()), ("saved_at", 1.0)],
)
def test_edited_metadata_is_refused(saved, key, value):
    def edit(header: dict) -> None:
        body = json.loads(header["__metadata__"]["k1_run_state"])
        header["__metadata__"]["k1_run_state"] = json.dumps({**body, key: value})

    assert "was edited" in refusal(rewritten(saved, edit))


def test_one_changed_bit_of_any_tensor_is_refused(saved):
    data = saved.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    for at in (8 + length, (8 + length + len(data)) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        saved.write_bytes(changed)
        assert "was edited" in refusal(saved)


def test_tensors_that_changed_names_are_refused(saved):
    def swap(header: dict) -> None:
        pooled = header["positive.pooled"], header["negative.pooled"]
        header["negative.pooled"], header["positive.pooled"] = pooled

    assert "was edited" in refusal(rewritten(saved, swap))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"format": 2}, "update K1"),
        ({"format": "1"}, "no format version"),
        ({"step": "2"}, "usable step"),
        ({"step": True}, "usable step"),
        ({"request": None}, "usable request"),
        ({"saved_at": 1e300}, "usable saved_at"),
        ({"checkpoints": []}, "usable checkpoints"),
    ],
)
def test_a_newer_or_malformed_run_is_refused_before_its_tensors_are_read(saved, values, reason):
    def edit(header: dict) -> None:
        body = json.loads(header["__metadata__"]["k1_run_state"])
        header["__metadata__"]["k1_run_state"] = json.dumps({**body, **values})

    assert reason in refusal(rewritten(saved, edit))
    with pytest.raises(UserError, match=reason):
        describe_run_state(saved)


@pytest.mark.parametrize("body", [None, 5, "[]", "{", "[" * 50_000])
def test_a_header_without_a_run_is_refused(saved, body):
    def edit(header: dict) -> None:
        header["__metadata__"]["k1_run_state"] = body

    refusal(rewritten(saved, edit))
    refusal(rewritten(saved, lambda header: header.pop("__metadata__")))


def forged(path: Path, change: Any) -> Path:
    """A file with a hash that fits, as somebody who knows how would make it."""
    import kandinsky5.output.run_state as module

    def forge(header: dict) -> None:
        change(header)
        table = module.tensor_table(header, data_bytes)
        body = header["__metadata__"]["k1_run_state"]
        digest = module._digest_of(body, table)
        digest.update(data[8 + length :])
        header["__metadata__"]["sha256"] = digest.hexdigest()

    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    data_bytes = len(data) - 8 - length
    return rewritten(path, forge)


def test_a_forged_hash_does_not_help_a_state_that_makes_no_sense(saved):
    def later(header: dict) -> None:
        body = json.loads(header["__metadata__"]["k1_run_state"])
        header["__metadata__"]["k1_run_state"] = json.dumps({**body, "step": 40})

    assert "step 40 of a schedule of 4" in refusal(forged(saved, later))


@pytest.mark.parametrize("name", ["latent", "times", "positive.text", "negative.pooled"])
def test_a_missing_tensor_is_named(saved, name):
    def rename(header: dict) -> None:
        header["stranger"] = header.pop(name)

    assert f"its tensor {name} is missing" in refusal(forged(saved, rename))


def test_a_tensor_nobody_knows_is_named(saved):
    def rename(header: dict) -> None:
        header["stranger"] = header.pop("first_frame")

    assert "stranger that K1 does not know" in refusal(forged(saved, rename))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"dtype": "F8_E4M3"}, "not one of"),
        ({"shape": [7, 8, 8, 2**31]}, "takes"),
        ({"shape": [-7, 8, 8, -16]}, "has the shape"),
        ({"shape": [1] * 9}, "has the shape"),
        ({"data_offsets": [0, 10**12]}, "takes"),
        ({"data_offsets": [4, 28676]}, "begins at byte 4"),
        ({"extra": 1}, "malformed"),
    ],
)
def test_a_tampered_tensor_entry_is_refused(saved, entry, reason):
    assert reason in refusal(rewritten(saved, lambda header: header["latent"].update(entry)))


def test_a_header_of_ten_gigabytes_is_refused_unread(tmp_path):
    (tmp_path / "a").write_bytes(struct.pack("<Q", 10 * 2**30) + b'{"latent":')
    assert "claims 10737418240 bytes" in refusal(tmp_path / "a")


def test_every_cut_and_every_tail_is_refused(saved):
    data = saved.read_bytes()
    for length in [*range(0, len(data), 4099), len(data) - 1]:
        saved.write_bytes(data[:length])
        refusal(saved)
    saved.write_bytes(data + b"\0")
    refusal(saved)


@pytest.mark.parametrize("name", ["missing", ".", "\0", "/dev/zero"])
def test_what_is_no_file_is_refused(tmp_path, name):
    refusal(tmp_path / name)


def test_a_full_disk_leaves_the_older_state_as_it_was(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(atomic, "free_bytes", lambda folder: 10)
    with pytest.raises(DiskFull, match="needs"):
        save_run_state(saved, dataclasses.replace(run(), step=3))
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_state_says_what_it_is_without_its_tensors_being_read(saved):
    summary = describe_run_state(saved)
    assert (summary.step, summary.total) == (2, STEPS)
    assert GenerationRequest.from_dict(summary.request) == settled()
    assert summary.size_bytes == saved.stat().st_size
    assert summary.to_text().startswith("demo-t2v, “a red circle")
    assert "step 2 of 4" in summary.to_text() and "2023-11-1" in summary.to_text()

"""Latents come back as they were saved; a file that was tampered with is refused with the reason."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from kandinsky5.errors import UserError
from kandinsky5.output.state import load_latents, save_latents
from kandinsky5.request import GenerationRequest

SHAPE = [2, 4, 6, 16]


@pytest.fixture
def request_() -> GenerationRequest:
    return GenerationRequest(prompt="a red circle 😀 \ud800", seed=3, dit="/models/own.safetensors")


def latents() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def entry(**changes) -> dict:
    bytes_ = 4 * math.prod(SHAPE)
    return {"dtype": "F32", "shape": SHAPE, "data_offsets": [0, bytes_], **changes}


def craft(path: Path, header: object, data_bytes: int = 4 * math.prod(SHAPE)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * data_bytes)
    return path


def refusal(path: Path, **options) -> str:
    with pytest.raises(UserError) as refused:
        load_latents(path, **options)
    assert refused.value.field == options.get("field", "init_latents")
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_latents_and_request_come_back_to_the_bit(tmp_path, request_):
    save_latents(tmp_path / "a.safetensors", latents(), request_)
    tensor, values = load_latents(tmp_path / "a.safetensors")
    assert torch.equal(tensor, latents())
    assert tensor.dtype == torch.float32
    assert GenerationRequest.from_dict(values) == request_
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_other_programs_can_read_the_file(tmp_path, request_):
    save_latents(tmp_path / "a.safetensors", latents(), request_)
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["latents"]
        assert file.get_slice("latents").get_shape() == SHAPE
        assert json.loads(file.metadata()["request"])["seed"] == 3


def test_a_file_without_a_request_is_starting_noise(tmp_path):
    safetensors.torch.save_file({"latents": latents()}, tmp_path / "noise.safetensors")
    tensor, values = load_latents(tmp_path / "noise.safetensors")
    assert torch.equal(tensor, latents())
    assert values == {}


def test_equal_latents_give_equal_bytes(tmp_path, request_):
    for name in ("a", "b"):
        save_latents(tmp_path / name, latents(), request_)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_strided_and_half_precision_latents_are_stored_as_float32(tmp_path, request_):
    turned = latents().permute(1, 0, 2, 3).to(torch.bfloat16)
    save_latents(tmp_path / "a", turned, request_)
    assert torch.equal(load_latents(tmp_path / "a")[0], turned.float())


def test_latents_of_other_dimensions_are_not_saved(tmp_path, request_):
    with pytest.raises(ValueError, match="T, H, W, C"):
        save_latents(tmp_path / "a", torch.zeros(3, 3, 3), request_)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path, request_):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written"):
        save_latents(tmp_path / "file" / "a", latents(), request_)


def test_a_wanted_shape_is_checked_before_the_tensor_is_read(tmp_path, request_):
    save_latents(tmp_path / "a", latents(), request_)
    load_latents(tmp_path / "a", shape=(2, 4, 6, 16))
    message = refusal(tmp_path / "a", shape=(2, 4, 8, 16), field="latents")
    assert "[2, 4, 6, 16] where [2, 4, 8, 16]" in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    poisoned = latents()
    poisoned[1, 2, 3, 4] = value
    safetensors.torch.save_file({"latents": poisoned}, tmp_path / "a")
    assert "NaN or infinite" in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({}, "its tensors are none"),
        ({"other": entry()}, "its tensors are other"),
        ({"latents": entry(), "more": entry()}, "its tensors are latents, more"),
        ({"latents": entry(dtype="F16")}, "F16, not F32"),
        ({"latents": entry(dtype="I64")}, "I64, not F32"),
        ({"latents": entry(shape=[8, 6, 16])}, "not [T, H, W, C]"),
        ({"latents": entry(shape=[2, 4, 6, -16])}, "not [T, H, W, C]"),
        ({"latents": entry(shape=[2, 4, 0, 16])}, "not [T, H, W, C]"),
        ({"latents": entry(shape=[2, 4, 6, 16.0])}, "not [T, H, W, C]"),
        ({"latents": entry(shape=[True, 4, 12, 16])}, "not [T, H, W, C]"),
        ({"latents": entry(shape="2,4,6,16")}, "not [T, H, W, C]"),
        ({"latents": entry(shape=[10**4000] * 4)}, "not [T, H, W, C]"),
        ({"latents": entry(shape=[2**31] * 4)}, "claims"),
        ({"latents": entry(shape=[2, 4, 6, 17])}, "header says"),
        ({"latents": entry(data_offsets=[0, 10**12])}, "header says"),
        ({"latents": entry(data_offsets=[4, 3076])}, "header says"),
        ({"latents": entry(extra=1)}, "malformed"),
        ({"latents": None}, "malformed"),
        ([1], "no JSON object"),
        (b"{" * 50_000, "no JSON"),
        (b'{"latents": ' + b"[" * 50_000, "no JSON"),
        (b"{\xff\xfe}", "no JSON"),
        ({"latents": entry(), "__metadata__": {"request": "{"}}, "request in its header"),
        ({"latents": entry(), "__metadata__": {"request": "[]"}}, "request in its header"),
        ({"latents": entry(), "__metadata__": {"request": 5}}, "request in its header"),
    ],
)
def test_a_tampered_header_is_refused_with_the_reason(tmp_path, header, reason):
    assert reason in refusal(craft(tmp_path / "a", header))


def test_a_header_of_ten_gigabytes_is_refused_unread(tmp_path):
    (tmp_path / "a").write_bytes(struct.pack("<Q", 10 * 2**30) + b'{"latents":')
    assert "claims 10737418240 bytes" in refusal(tmp_path / "a")


def test_a_sparse_file_with_a_huge_header_is_refused_unread(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**30 + 8)
    assert "at most" in refusal(tmp_path / "a")


def test_every_cut_and_every_tail_is_refused(tmp_path, request_):
    save_latents(tmp_path / "a", latents(), request_)
    data = (tmp_path / "a").read_bytes()
    for length in [*range(0, len(data), 97), len(data) - 1]:
        (tmp_path / "cut").write_bytes(data[:length])
        refusal(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(data + b"\0")
    refusal(tmp_path / "cut")


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git-LFS pointer"),
        (b"GGUF\x03\0\0\0\0\0", "GGUF"),
        (b"PK\x03\x04" + b"\0" * 40, "a pickle can run code"),
        (b"\x80\x02}q\0" + b"\0" * 40, "a pickle can run code"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "a picture"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"", "cut short"),
    ],
)
def test_other_kinds_of_file_are_named(tmp_path, start, kind):
    (tmp_path / "a").write_bytes(start)
    assert kind in refusal(tmp_path / "a")


@pytest.mark.parametrize("prompt_length", range(1, 300, 3))
def test_no_length_of_header_is_taken_for_another_kind(tmp_path, prompt_length):
    save_latents(tmp_path / "a", latents(), GenerationRequest(prompt="x" * prompt_length))
    load_latents(tmp_path / "a")


@pytest.mark.parametrize("name", ["missing", ".", "\0", "/dev/zero"])
def test_what_is_no_file_is_refused(tmp_path, name):
    refusal(tmp_path / name)

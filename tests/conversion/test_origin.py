"""A converted file knows what it was made of: nothing is done twice, nothing of another source replaced."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_transformer import LAYER, save, weights

from kandinsky5.conversion import fingerprint
from kandinsky5.conversion.convert import convert
from kandinsky5.conversion.part import part_of
from kandinsky5.errors import UserError
from kandinsky5.model.checkpoint import Checkpoint
from kandinsky5.model.inspect import inspect_file

ANEW = "delete it to convert anew, or give another name"


@pytest.fixture
def source(tmp_path):
    return save(tmp_path / "dit.safetensors", weights(dtype=torch.bfloat16))


@pytest.fixture
def out(source, tmp_path):
    """Converted from the source."""
    convert(source, tmp_path / "int8.safetensors", "int8")
    return tmp_path / "int8.safetensors"


def refused(source, out, to: str = "int8") -> str:
    """The one line with which it is refused; the file stays as it was, and no other comes beside it."""
    before, names = out.read_bytes(), sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        convert(source, out, to)
    assert caught.value.field == "out"
    assert (out.read_bytes(), sorted(out.parent.iterdir())) == (before, names)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(ANEW)
    return str(caught.value)


def changed(source, name: str, place: int = 0):
    tensors = load_file(source)
    tensors[name].view(-1)[place] += 1
    return save(source, tensors)


def test_what_was_made_of_this_very_source_is_not_made_again(source, out, tmp_path):
    written_ns, heard = out.stat().st_mtime_ns, []
    done = convert(source, out, "int8", emit=heard.append)
    assert (done.already, done.output, done.size_bytes) == (True, out, out.stat().st_size)
    assert (out.stat().st_mtime_ns, heard) == (written_ns, [])
    moved = shutil.move(source, tmp_path / "moved.safetensors")
    assert convert(tmp_path / moved, out, "int8").already  # by what it holds, not by name and time
    assert not convert(tmp_path / moved, tmp_path / "new.safetensors", "int8").already


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("name", [f"{LAYER}.weight", "time_embeddings.in_layer.bias"])
def test_a_source_that_has_changed_since_is_said(source, out, name, place):
    changed(source, name, place)
    said = refused(source, out)
    assert "from dit.safetensors before it changed" in said
    out.unlink()
    assert not convert(source, out, "int8").already


def test_both_ends_of_a_large_tensor_tell_it(source, out, monkeypatch):
    with Checkpoint(source) as checkpoint:
        whole = fingerprint.source_fingerprint(checkpoint)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 8)
    found = set()
    for place in (0, 1000, -1):
        changed(source, f"{LAYER}.weight", place)
        with Checkpoint(source) as checkpoint:
            found.add(fingerprint.source_fingerprint(checkpoint))
    assert len(found) == 2 and whole not in found  # its middle is not looked at


def test_the_same_source_in_another_format_is_said(out, tmp_path):
    back = tmp_path / "back.safetensors"
    full = save(tmp_path / "full.safetensors", weights())
    convert(full, back, "bf16")
    assert "in another format" in refused(full, back, "int8")
    assert "a file other than int8.safetensors" in refused(out, back, "bf16")


def test_what_no_conversion_made_is_not_replaced(source, tmp_path):
    other = save(tmp_path / "other.safetensors", {"x": torch.zeros(3)})
    assert "was not made by a conversion" in refused(source, other)
    note = tmp_path / "note.txt"
    note.write_text("what a person wrote")
    said = refused(source, note)
    assert "cannot be used (" in said and "not a .safetensors file" in said


def test_a_damaged_one_is_said(source, out):
    with out.open("r+b") as file:
        file.truncate(out.stat().st_size - 5)
    assert "cannot be used (header says" in refused(source, out)


def test_one_of_an_earlier_version_that_noted_less_is_said(source, out):
    with Checkpoint(out) as checkpoint:
        noted = dict(checkpoint.metadata)
    del noted["k1_source_fingerprint"]
    save(out, load_file(out), noted)
    assert "an earlier K1, which did not note enough" in refused(source, out)


def test_a_stopped_conversion_under_the_name_of_a_finished_one_is_gone_on_with(source, out):
    shutil.move(out, part_of(out))
    done = convert(source, out, "int8")
    assert not done.already and done.resumed_at > 0


def test_inspect_tells_what_it_was_made_of(source, out):
    with Checkpoint(source) as checkpoint:
        wanted = {
            "header_sha256": checkpoint.header_sha256,
            "fingerprint": fingerprint.source_fingerprint(checkpoint),
        }
    report = inspect_file(out)
    assert report.source == wanted
    assert json.loads(json.dumps(report.to_dict()))["source"] == wanted
    assert inspect_file(source).source is None

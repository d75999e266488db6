"""``k1.py convert`` from what is typed to what is said."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_transformer import save, weights

from kandinsky5.cli import main


@pytest.fixture
def source(tmp_path):
    return save(tmp_path / "dit.safetensors", weights(dtype=torch.bfloat16))


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs a command line and gives exit code, stdout and stderr."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def run(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_it_converts_verifies_and_gives_one_json_document(run, source, tmp_path):
    out = tmp_path / "int8.safetensors"
    code, said, _ = run(
        "convert", str(source), "--to", "int8", "--out", str(out), "--verify", "--json"
    )
    document = json.loads(said)
    assert code == 0
    assert document["output"] == str(out)
    assert (document["to"], document["size_bytes"]) == ("int8", out.stat().st_size)
    assert document["source_bytes"] == source.stat().st_size
    checked = document["verify"]
    assert len(checked["sqnr_db"]) == document["converted"] == 26
    assert checked["lowest_db"] == min(checked["sqnr_db"].values()) > 38
    assert checked["equal_tensors"] + 26 == len(load_file(source))


def test_a_person_reads_sizes_and_a_line_for_every_layer(run, source, tmp_path):
    out = tmp_path / "int8.safetensors"
    code, said, err = run("convert", f'"{source}"', "--to", "int8", "--out", str(out), "--verify")
    lines = said.splitlines()
    assert code == 0
    assert lines[0].startswith(f"{out}: 26 tensors to int8")
    assert sum(" dB  " in line for line in lines) == 26
    assert "verify" in err
    code, said, err = run("convert", str(out), "--to", "bf16", "--out", str(tmp_path / "b"))
    assert code == 0 and len(said.splitlines()) == 1


def test_the_same_command_again_has_nothing_to_do_and_a_changed_source_is_one_line(
    run, source, tmp_path
):
    out = tmp_path / "int8.safetensors"
    command = ("convert", str(source), "--to", "int8", "--out", str(out))
    assert run(*command)[0] == 0
    code, said, err = run(*command)
    assert (code, err, said.count("\n")) == (0, "", 1)
    assert said.startswith(f"{out}: converted to int8 from this very source already")
    code, said, _ = run(*command, "--verify", "--json")
    document = json.loads(said)
    assert (code, document["already"], document["verify"]["lowest_db"] > 38) == (0, True, True)
    code, said, err = run("inspect", str(out))
    assert code == 0 and '"fingerprint"' in said
    save(source, {name: tensor + 1 for name, tensor in load_file(source).items()})
    code, said, err = run(*command)
    assert (code, said, err.count("\n")) == (2, "", 1)
    assert err.startswith("k1: out: got") and "before it changed" in err


@pytest.mark.parametrize(
    ("typed", "code", "says"),
    [
        (("nowhere.safetensors", "--to", "int8", "--out", "o"), 2, "nothing is at"),
        (("FILE", "--to", "bf16", "--out", "o"), 2, "is bf16 already"),
        (("FILE", "--to", "fp4", "--out", "o"), 2, "invalid choice"),
        (("FILE", "--to", "int8"), 2, "--out"),
        (("FILE", "--to", "int8", "--out", " "), 2, "the name of the new file"),
        (("FILE", "--to", "int8", "--out", "FILE"), 2, "the file to convert"),
        (("EMPTY", "--to", "int8", "--out", "o"), 3, "the file is empty"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    run, source, tmp_path, monkeypatch, typed, code, says
):
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    named = {"FILE": str(source), "EMPTY": str(empty)}
    found, said, err = run("convert", *(named.get(word, word) for word in typed))
    assert (found, said) == (code, "")
    assert err.startswith("k1: ") and err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "o").exists()

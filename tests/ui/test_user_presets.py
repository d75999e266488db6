"""The user's presets: kept whole, and nothing from elsewhere is trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kandinsky5.errors import K1Error, UserError
from kandinsky5.request import GenerationRequest, LoraChoice
from kandinsky5.ui import user_presets
from kandinsky5.ui.user_presets import (
    FILE_NAME,
    MAX_NAME_CHARACTERS,
    MAX_PRESETS,
    NameTaken,
    UserPresets,
    checked_name,
    read_preset,
    request_kept,
)

REQUEST = GenerationRequest(
    prompt="a red circle 🔴",
    negative_prompt="blur",
    steps=9,
    seed=2**62,
    crf=20,
    loras=(LoraChoice("style.safetensors", 0.5),),
    image="/somewhere/picture.png",
    out="/somewhere/out.mp4",
    save_latents="/somewhere/latents.safetensors",
)


def kept(with_prompts: bool = True, **changes: Any) -> dict[str, Any]:
    return {**request_kept(REQUEST, with_prompts=with_prompts), **changes}


def foreign(*presets: Any, **top: Any) -> bytes:
    return json.dumps({"version": 1, "presets": list(presets), **top}).encode()


@pytest.fixture
def presets(tmp_path: Path) -> UserPresets:
    return UserPresets(tmp_path)


def test_a_preset_outlives_the_studio_without_picture_and_files_to_write(presets, tmp_path):
    assert presets.save("Circles", kept()) is False
    found = UserPresets(tmp_path).get("Circles").request
    assert (found.prompt, found.seed, found.steps, found.crf) == ("a red circle 🔴", 2**62, 9, 20)
    assert found.loras == REQUEST.loras
    assert (found.image, found.out, found.save_latents) == (None, None, None)
    assert "/somewhere" not in (tmp_path / FILE_NAME).read_text()


def test_names_stand_in_alphabetical_order_and_a_deleted_one_is_gone(presets, tmp_path):
    for name in ("b", "A", "c"):
        presets.save(name, kept())
    assert presets.names == ("A", "b", "c")
    presets.delete("b")
    assert UserPresets(tmp_path).names == ("A", "c")
    for act in (presets.get, presets.delete, presets.exported):
        with pytest.raises(UserError, match="no longer there"):
            act("b")


def test_a_preset_is_replaced_only_when_that_is_wanted(presets):
    presets.save("Circles", kept())
    with pytest.raises(NameTaken):
        presets.save("Circles", kept(steps=30))
    assert presets.get("Circles").request.steps == 9
    assert presets.save("Circles", kept(steps=30), replace=True) is True
    assert presets.get("Circles").request.steps == 30


def test_without_its_prompts_a_preset_says_nothing_of_them(presets):
    presets.save("Plain", kept(with_prompts=False))
    found = presets.get("Plain")
    assert set(found.leaves) == set(user_presets.PROMPTS)
    assert (found.request.steps, found.request.negative_prompt) == (9, "")
    presets.save("Blank", kept(prompt=" "))
    assert presets.get("Blank").leaves == ("prompt",)


@pytest.mark.parametrize(
    "name", ["", "   ", "x" * (MAX_NAME_CHARACTERS + 1), "a\x1b[0m", "a\u202eb"]
)
def test_a_name_that_cannot_be_shown_is_refused(name):
    with pytest.raises(UserError) as caught:
        checked_name(name)
    assert caught.value.field == "name"


def test_blanks_and_breaks_in_a_name_are_joined():
    assert checked_name("  two\n words ") == "two words"


def test_a_file_that_cannot_be_written_changes_nothing(presets, monkeypatch):
    presets.save("Circles", kept())
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    for act in (lambda: presets.save("More", kept()), lambda: presets.delete("Circles")):
        with pytest.raises(K1Error, match="too little room"):
            act()
    assert presets.names == ("Circles",)


def test_a_damaged_file_is_set_aside_and_a_damaged_preset_is_told_when_it_is_used(tmp_path):
    (tmp_path / FILE_NAME).write_text("{")
    damaged = UserPresets(tmp_path)
    assert damaged.names == ()
    assert "damaged" in damaged.notice
    entries = [
        {"name": "Good", "request": kept()},
        {"name": "Bad", "request": kept(steps="many")},
        {"name": "Odd", "request": 7},
        {"name": ["no"], "request": kept()},
        "nothing",
    ]
    (tmp_path / FILE_NAME).write_text(
        json.dumps({"version": 1, "presets": entries, "colour": "red"})
    )
    found = UserPresets(tmp_path)
    assert found.names == ("Bad", "Good", "Odd")
    assert "2 without a name" in found.notice
    for name in ("Bad", "Odd"):
        with pytest.raises(UserError):
            found.get(name)
    found.save("New", kept())
    stored = json.loads((tmp_path / FILE_NAME).read_text())
    assert stored["colour"] == "red"
    bad = json.loads(json.dumps({"name": "Bad", "request": kept(steps="many")}))
    assert bad in stored["presets"]


def test_an_exported_preset_comes_back_elsewhere_beside_one_of_the_same_name(presets, tmp_path):
    presets.save("Circles", kept())
    other = UserPresets(tmp_path / "elsewhere")
    other.save("Circles", kept(steps=30))
    imported = other.take_in(presets.exported("Circles"), file_name="x.json")
    assert imported == user_presets.Imported(("Circles (2)",))
    assert other.get("Circles").request.steps == 30
    assert other.get("Circles (2)").request == presets.get("Circles").request


def test_a_job_file_is_a_preset_of_its_files_name(presets):
    job = json.dumps({"prompt": "a red circle", "steps": 7}).encode("utf-8-sig")
    assert presets.take_in(job, file_name="my job.json").names == ("my job",)
    assert presets.get("my job").request.steps == 7


def test_paths_from_elsewhere_to_be_written_or_shown_are_left_out(presets, tmp_path):
    request = {**REQUEST.to_dict(), "device": "cuda:7", "dit": "~/mine.safetensors"}
    imported = presets.take_in(foreign({"name": "A", "request": request}), file_name="x.json")
    assert imported.left_out == ("image", "save_latents", "out", "device")
    stored = json.loads((tmp_path / FILE_NAME).read_text())["presets"][0]["request"]
    assert not set(user_presets.LEFT_OUT) & set(stored)
    # a path that is only read is shown in the form, where it is looked at like any typed one
    assert presets.get("A").request.dit == "~/mine.safetensors"


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (kept(steps=0), "steps"),
        (kept(guidance="NaN"), "guidance"),
        (kept(preset="wan-t2v"), "preset"),
        (kept(colour="red"), "colour"),
        (kept(version=99), "version"),
        (kept(prompt="x" * 200_000), "prompt"),
        (kept(prompt="nul \0"), "prompt"),
        (kept(prompt="half \ud800"), "request"),
        (kept(loras=[{"path": f"{number}", "strength": 1} for number in range(9)]), "loras"),
        (kept(loras=[{"path": "a", "strength": 1e9}]), "loras"),
        ([], "request"),
        (None, "request"),
    ],
)
def test_a_foreign_preset_that_cannot_be_used_is_named_and_the_others_come(
    presets, request_, named
):
    entries = ({"name": "Bad", "request": request_}, {"name": "Good", "request": kept()})
    imported = presets.take_in(foreign(*entries), file_name="x.json")
    assert imported.names == ("Good",)
    ((name, reason),) = imported.refused
    assert name == "Bad"
    assert named in reason


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n",
        b"[]",
        b"7",
        b"[" * 100_000,
        foreign(version=2),
        foreign(version=True),
        json.dumps({"version": 1, "presets": {"a": 1}}).encode(),
        foreign(*[{}] * (MAX_PRESETS + 1)),
        b" " * (user_presets.MAX_FOREIGN_BYTES + 1),
    ],
)
def test_a_foreign_file_without_presets_is_refused(presets, content):
    with pytest.raises(UserError):
        presets.take_in(content, file_name="x.json")
    assert presets.names == ()


def test_a_foreign_name_is_shortened_to_stay_free_and_never_replaces(presets):
    name = "x" * MAX_NAME_CHARACTERS
    presets.save(name, kept())
    entries = [{"name": name, "request": kept()}] * 2 + [{"name": "", "request": kept()}]
    imported = presets.take_in(foreign(*entries, {"request": kept()}, 7), file_name="x.json")
    assert [len(found) for found in imported.names[:2]] == [MAX_NAME_CHARACTERS] * 2
    assert imported.names[2:] == ("without a name", "without a name (2)")
    assert len(imported.refused) == 1
    assert len(presets.names) == 5


def test_there_is_an_end_to_how_many_are_kept(presets, monkeypatch):
    monkeypatch.setattr(user_presets, "MAX_PRESETS", 2)
    presets.save("a", kept())
    presets.save("b", kept())
    with pytest.raises(UserError, match="delete some"):
        presets.save("c", kept())
    assert presets.save("b", kept(steps=3), replace=True)


def test_a_request_of_todays_form_is_kept_whole(presets):
    """What the form shows of a request, and nothing else, makes the way to the file and back."""
    found = read_preset(json.loads(json.dumps(kept()))).request
    for name in user_presets.KEPT:
        if hasattr(REQUEST, name):
            assert getattr(found, name) == getattr(REQUEST, name), name

"""A conversion that was stopped, at whatever moment, goes on and ends with the same bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_transformer import CONFIG, save, weights

from kandinsky5.conversion.convert import convert
from kandinsky5.conversion.fingerprint import source_fingerprint
from kandinsky5.conversion.part import RECORD_BYTES, PartFile, part_of
from kandinsky5.conversion.plan import plan_conversion
from kandinsky5.errors import CheckpointError, Stopped, UserError
from kandinsky5.events import StepDone
from kandinsky5.model.checkpoint import Checkpoint

if sys.platform != "win32":
    import fcntl

SMALL = dataclasses.replace(CONFIG, num_visual_blocks=1)


class Killed(BaseException):
    """As signal 9: nothing may tidy up after it."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return save(folder / "dit.safetensors", weights(SMALL, torch.bfloat16))


@pytest.fixture(scope="module")
def at_once(source):
    """Hash of the file that a conversion without a break gives."""
    out = source.with_name("at_once.safetensors")
    convert(source, out, "int8")
    return digest(out)


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def killed_after(writes: int, torn: float):
    """``os.pwrite`` that writes only a part of the last piece and then dies."""
    real, left = os.pwrite, iter(range(writes, -1, -1))

    def pwrite(descriptor, data, place):
        if next(left) == 0:
            real(descriptor, data[: int(len(data) * torn)], place)
            raise Killed
        return real(descriptor, data, place)

    return pwrite


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kills=st.lists(st.tuples(st.integers(0, 130), st.floats(0, 1)), min_size=1, max_size=3),
    sync_bytes=st.sampled_from([1, 20_000, 10**9]),
    lost=st.booleans(),
)
def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    source, at_once, monkeypatch, kills, sync_bytes, lost
):
    out = source.with_name("killed.safetensors")
    out.unlink(missing_ok=True)
    monkeypatch.setattr("kandinsky5.conversion.part.SYNC_BYTES", sync_bytes)
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: None
    )  # no power is cut here, and it is slow
    for writes, torn in kills:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", killed_after(writes, torn))
            try:
                convert(source, out, "int8")
                break
            except Killed:
                assert not out.exists()
        if lost:
            _lose_what_was_not_synced(source, out)
    convert(source, out, "int8")
    assert digest(out) == at_once
    assert not part_of(out).exists()


def _lose_what_was_not_synced(source, out):
    """As after a power cut: what no record vouches for is anything."""
    with Checkpoint(source) as checkpoint:
        plan = plan_conversion(checkpoint, "int8")
        with PartFile(out, plan, checkpoint) as part, part.path.open("r+b") as file:
            for recipe in plan.recipes[part.done :]:
                for name, spec in recipe.outputs.items():
                    file.seek(plan.places[name])
                    file.write(b"\xa5" * spec.size_bytes)


def test_what_was_done_is_not_done_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr("kandinsky5.conversion.part.SYNC_BYTES", 1)
    out, steps = tmp_path / "out.safetensors", []

    def interrupt(event):
        if isinstance(event, StepDone) and event.step == 30:
            raise KeyboardInterrupt

    with pytest.raises(Stopped, match=r"stopped; what is done is in out\.safetensors\.k1-part"):
        convert(source, out, "int8", emit=interrupt)
    done = convert(source, out, "int8", emit=steps.append)
    assert done.resumed_at == 30
    assert next(e.step for e in steps if isinstance(e, StepDone)) == 31


def test_little_that_is_done_is_kept_after_a_second_too(source, tmp_path, monkeypatch):
    """Far less than is kept by its bytes: of a small conversion nothing else would ever be."""
    out, clock = tmp_path / "out.safetensors", iter(range(10**6))
    monkeypatch.setattr("kandinsky5.conversion.part.time.monotonic", lambda: 0.2 * next(clock))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", killed_after(60, 0.5))
        with pytest.raises(Killed):
            convert(source, out, "int8")
    assert convert(source, out, "int8").resumed_at >= 20


def interrupted(source, out, monkeypatch, to: str = "int8"):
    monkeypatch.setattr("kandinsky5.conversion.part.SYNC_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", killed_after(60, 0.5))
        with pytest.raises(Killed):
            convert(source, out, to)


def test_a_source_that_changed_since_is_refused_and_its_beginning_kept(tmp_path, monkeypatch):
    source = save(tmp_path / "dit.safetensors", weights(dtype=torch.bfloat16))
    out = tmp_path / "out.safetensors"
    interrupted(source, out, monkeypatch)
    time.sleep(0.01)
    save(source, {n: t + 1 for n, t in weights(dtype=torch.bfloat16).items()})
    with pytest.raises(CheckpointError, match="delete that one to start again") as caught:
        convert(source, out, "int8")
    assert str(part_of(out)) in str(caught.value)
    assert part_of(out).exists() and not out.exists()
    part_of(out).unlink()
    assert convert(source, out, "int8").resumed_at == 0


def whole_but_unnamed(source, out) -> int:
    """A conversion that ended before the file got its name; gives when it was last written to, in ns."""
    convert(source, out, "int8")
    os.replace(out, part_of(out))
    return part_of(out).stat().st_mtime_ns


def test_what_was_whole_before_the_source_changed_is_begun_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("kandinsky5.conversion.fingerprint.SAMPLE_BYTES", 8)
    source = save(tmp_path / "dit.safetensors", weights(SMALL, torch.bfloat16))
    out, other = tmp_path / "out.safetensors", tmp_path / "other.safetensors"
    written_ns = whole_but_unnamed(source, out)
    with Checkpoint(source) as checkpoint, source.open("r+b") as file:
        before = source_fingerprint(checkpoint)
        file.seek(source.stat().st_size // 2)
        file.write(bytes(1000))  # in the middle of a matrix, which the header does not tell of
        assert source_fingerprint(checkpoint) == before
    os.utime(source, ns=(written_ns + 1, written_ns + 1))
    assert convert(source, out, "int8").resumed_at == 0
    convert(source, other, "int8")
    assert digest(out) == digest(other)


def test_what_is_whole_and_younger_than_its_source_only_gets_its_name(tmp_path, source, at_once):
    out = tmp_path / "out.safetensors"
    whole_but_unnamed(source, out)
    done = convert(source, out, "int8")
    assert done.resumed_at > 0 and digest(out) == at_once and not part_of(out).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on files there")
@pytest.mark.parametrize("then", ["nothing", "a third began anew"])
def test_a_file_that_another_program_has_finished_meanwhile_is_not_written(
    tmp_path, source, at_once, monkeypatch, then
):
    """This one had opened the unfinished file; before it had the lock, the other gave it its name."""
    out, lock = tmp_path / "out.safetensors", fcntl.flock
    whole_but_unnamed(source, out)
    whole = part_of(out).stat()

    def after_the_other(descriptor, how):
        if os.path.samestat(os.fstat(descriptor), whole):  # nothing else that is locked
            os.replace(part_of(out), out)
            if then != "nothing":
                part_of(out).write_bytes(b"begun")
        lock(descriptor, how)

    writes: list[int] = []
    monkeypatch.setattr(fcntl, "flock", after_the_other)
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, place: writes.append(place))
    with pytest.raises(UserError, match="has just finished this file"):
        convert(source, out, "int8")
    assert writes == [] and digest(out) == at_once
    assert part_of(out).exists() == (then != "nothing")


def test_another_conversion_of_the_same_source_begins_anew(tmp_path, monkeypatch):
    source = save(tmp_path / "dit.safetensors", weights())
    out = tmp_path / "out.safetensors"
    interrupted(source, out, monkeypatch, "bf16")
    assert convert(source, out, "int8").resumed_at == 0


@pytest.mark.parametrize("place", range(0, RECORD_BYTES, 12))
def test_a_record_that_is_damaged_counts_for_nothing(source, at_once, tmp_path, monkeypatch, place):
    out = tmp_path / "out.safetensors"
    interrupted(source, out, monkeypatch)
    with part_of(out).open("r+b") as file:
        file.seek(place)
        old = file.read(1)
        file.seek(place)
        file.write(bytes([old[0] ^ 1]))
    assert convert(source, out, "int8").resumed_at == 0
    assert digest(out) == at_once


def test_an_unfinished_file_is_no_checkpoint(source, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    interrupted(source, out, monkeypatch)
    with pytest.raises(CheckpointError):
        Checkpoint(part_of(out))


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on files there")
def test_two_programs_do_not_write_the_same_file(source, tmp_path):
    out = tmp_path / "out.safetensors"
    with Checkpoint(source) as checkpoint:
        plan = plan_conversion(checkpoint, "int8")
        with PartFile(out, plan, checkpoint), pytest.raises(UserError, match="another conversion"):
            convert(source, out, "int8")


def test_room_that_an_earlier_run_has_taken_is_not_asked_for_again(source, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    interrupted(source, out, monkeypatch)
    asked = []
    monkeypatch.setattr(
        "kandinsky5.conversion.convert.require_space", lambda path, size: asked.append(size)
    )
    taken = part_of(out).stat().st_blocks * 512
    done = convert(source, out, "int8")
    assert taken > 0 and asked == [done.size_bytes - taken]

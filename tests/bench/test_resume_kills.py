"""Runs that are killed come to the same bits; and what the benchmark of it would notice."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from forked_k1 import ForkedK1

from kandinsky5.bench.resume_kills import OUT, Pace, Run, moment, resume_kills
from kandinsky5.errors import K1Error, UserError


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_a_run_killed_three_times_comes_to_the_same_bits() -> None:
    report = resume_kills(kills=3, steps=4, seconds=1 / 6, seed=2, start=ForkedK1)
    assert report["kills"] == 3 == sum(len(run["kills"]) for run in report["runs"])
    assert report["identical"]
    assert all(run["latents_equal"] and run["frames_equal"] for run in report["runs"])


class Failing:
    def __init__(self, words: tuple[str, ...], folder) -> None:
        (folder / "stderr").write_text("load …\nk1: no room\n")

    def wait(self, timeout_s: float) -> int:
        return 1


def test_a_command_that_fails_is_no_survivor() -> None:
    with pytest.raises(K1Error, match="exit code 1.*no room"):
        resume_kills(kills=1, start=Failing)


@pytest.mark.parametrize("wrong", [{"mode": "t2i"}, {"kills": 0}, {"cache": "teacache"}])
def test_what_it_cannot_do_is_refused(wrong) -> None:
    with pytest.raises(UserError):
        resume_kills(**wrong, start=Failing)


def test_moments_fall_into_every_part_of_what_is_left() -> None:
    pace, rng = Pace(start_s=4.0, step_s=0.5, decode_s=2.0, steps=6), random.Random(0)
    seen = {moment(rng, pace, 2)[0] for _ in range(400)}
    assert seen == {None, 3, 4, 5, 6}
    late = [moment(rng, pace, 6) for _ in range(100)]
    assert {step for step, _ in late} == {None} and max(delay_s for _, delay_s in late) > 4.0
    assert all(0 <= moment(rng, pace, 0)[1] <= 4.5 for _ in range(100))


class Alive:
    """A command that ends by nothing but being killed; then its folder is as it left it."""

    def __init__(self, folder: Path, *left: str) -> None:
        self._folder, self._left = folder, left

    def wait(self, timeout_s: float) -> None:
        return None

    def kill(self) -> None:
        for name in self._left:
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


STATE = "state/states/run-1/step-00006.safetensors"


@pytest.mark.parametrize(
    ("left", "counts"), [((), 1), ((STATE,), 1), ((STATE, OUT), 1), ((OUT,), 0)], ids=str
)
def test_only_a_kill_after_which_there_is_something_to_go_on_with_counts(
    tmp_path, left, counts
) -> None:
    (tmp_path / "stderr").write_text("decode …\n")
    run = Run(tmp_path, (), lambda words, folder: Alive(folder, *left))
    assert run.survive(random.Random(0), Pace(0.0, 0.0, 0.0, 0)) is bool(counts)
    assert len(run.kills) == counts
    assert run.is_done is not bool(counts)

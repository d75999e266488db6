"""Whether killed runs of the built-in model come to the same bits: SIGKILL at random moments, then resume."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from kandinsky5.circumstances import circumstances
from kandinsky5.demo.bench import MODES, planned_pairs, read_clip, request_for
from kandinsky5.errors import K1Error, UserError
from kandinsky5.output.state import load_latents

log = logging.getLogger(__name__)

KILLS_OF_A_RUN = 2
"""At most; then it may end, and the next begins: with more, most kills would fall behind the last step."""
START_SHARES, DECODE_SHARES = 2, 4
"""How much oftener a moment falls into starting and into decoding than into one of the steps."""
POLL_S = 0.005
OUT = "out.mp4"
PATIENCE_S = 600.0


class Command(Protocol):
    """A command line under way in a process of its own."""

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code; None when it has not ended by then."""
        ...

    def kill(self) -> None:
        """End it by SIGKILL, with the encoder it started."""
        ...


Starter = Callable[[Sequence[str], Path], Command]
"""Starts ``k1.py`` with these words in that folder, its streams going to files ``stdout`` and ``stderr``."""


class Program:
    """``python k1.py …``; see :class:`Command`."""

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        program = Path(__file__).resolve().parents[2] / "k1.py"
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, str(program), *words],
                stdout=out,
                stderr=err,
                cwd=folder,
                start_new_session=True,
            )

    def wait(self, timeout_s: float) -> int | None:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@dataclass(frozen=True)
class Pace:
    """How long the unbroken run took to its first step, for each of them, and to decode."""

    start_s: float
    step_s: float
    decode_s: float
    steps: int


@dataclass
class Run:
    """One run in a folder of its own, begun again and gone on with until it is done."""

    folder: Path
    generate: tuple[str, ...]
    start: Starter
    kills: list[dict[str, Any]] = field(default_factory=list)

    def newest(self) -> Path | None:
        """Its newest saved state."""
        found = (self.folder / "state" / "states").glob("run-*/step-*.safetensors")
        return max(found, key=lambda path: path.name, default=None)

    def steps_saved(self) -> int:
        newest = self.newest()
        return 0 if newest is None else int(newest.stem.rpartition("-")[2])

    @property
    def is_done(self) -> bool:
        """Whether its result is there and its states are gone, which go behind it."""
        return (self.folder / OUT).exists() and self.newest() is None

    def begun(self) -> Command:
        """Its next process: it goes on from the newest state, or begins."""
        state = self.newest()
        words = self.generate
        if state is not None:
            words = ("resume", str(state), "--out", OUT)
        options = ("--save-every-steps", "1", "--state-dir", "state", "--json")
        return self.start((*words, *options), self.folder)

    def finish(self, command: Command) -> dict[str, Any]:
        """Wait for the end; gives what the command printed.

        Raises:
            K1Error: it failed; what it said.
        """
        code = command.wait(PATIENCE_S)
        if code != 0:
            said = (self.folder / "stderr").read_text(errors="replace").strip().splitlines()
            raise K1Error(f"exit code {code} after {self.kills}: {said[-1] if said else 'silence'}")
        document: dict[str, Any] = json.loads((self.folder / "stdout").read_text())
        return document

    def survive(self, rng: random.Random, pace: Pace) -> bool:
        """Start its next process and kill it at a random moment; False when it was done before that.

        A process that is killed while it ends has done its run too: nothing is left to be gone on with.
        """
        step, delay_s = moment(rng, pace, self.steps_saved())
        command = self.begun()
        deadline = time.monotonic() + PATIENCE_S
        while step is not None and self.steps_saved() < step and time.monotonic() < deadline:
            if command.wait(POLL_S) is not None:
                break
        if command.wait(delay_s) is not None:
            self.finish(command)
            return False
        command.kill()
        if self.is_done:
            return False
        self.kills.append({"saved": self.steps_saved(), "during": self._stage()})
        return True

    def _stage(self) -> str:
        """What the killed process last said that it does."""
        lines = (self.folder / "stderr").read_text(errors="replace").splitlines()
        stages = [line.split(" …")[0] for line in lines if line.endswith(" …")]
        return stages[-1] if stages else "start"

    def outcome(self) -> tuple[torch.Tensor, Any]:
        """(latents, frames) as they lie on the disk."""
        return (
            load_latents(self.folder / "latents.safetensors")[0],
            read_clip(self.folder / OUT),
        )


def moment(rng: random.Random, pace: Pace, done: int) -> tuple[int | None, float]:
    """A random moment of what is left of a run: (after this step is saved, or None, so many seconds later).

    Args:
        done: steps that the next process need not do.
    """
    left = pace.steps - done
    which = rng.randrange(START_SHARES + left + DECODE_SHARES)
    if which < START_SHARES:
        return None, rng.uniform(0.0, pace.start_s)
    which -= START_SHARES
    if which == 0 and left:  # its first step: nothing new is on the disk before it
        return None, pace.start_s + rng.uniform(0.0, pace.step_s)
    if which < left:
        return done + which, rng.uniform(0.0, pace.step_s)
    decoding_s = rng.uniform(0.0, pace.decode_s)
    return (pace.steps, decoding_s) if left else (None, pace.start_s + decoding_s)


def resume_kills(
    *,
    kills: int = 20,
    mode: str = "t2v",
    cache: str = "none",
    steps: int | None = None,
    seconds: float | None = None,
    seed: int = 40_000,
    start: Starter = Program,
) -> dict[str, Any]:
    """Kill runs at random moments, resume them each time, and compare what they come to with an unbroken one.

    Args:
        kills: in all; a run takes some of them, then the next begins.
        mode: "t2v" or "i2v".
        cache: "none" or "magcache".
        steps, seconds: of the run; None for the preset's.
        seed: of the prompt, the noise and the moments.
        start: starts the processes.

    Returns:
        JSON-ready: ``identical``, whether every run came to the unbroken one's latents and frames bit for
        bit; ``runs``, each with its ``kills`` (steps saved by then, and what was being done).

    Raises:
        UserError: a value that cannot be used.
        K1Error: a command failed.
    """
    if mode not in MODES:
        raise UserError("mode", mode, f"one of {', '.join(MODES)}")
    if not 1 <= kills <= 1000:
        raise UserError("kills", kills, "a number from 1 to 1000")
    rng = random.Random(f"kills/{seed}")
    with tempfile.TemporaryDirectory(prefix="k1-kills-") as scratch:
        words = _words(
            Path(scratch), mode=mode, cache=cache, steps=steps, seconds=seconds, seed=seed
        )
        unbroken = Run(_new(Path(scratch) / "unbroken"), words, start)
        began = time.monotonic()
        document = unbroken.finish(unbroken.begun())
        pace = _pace(document, time.monotonic() - began)
        wanted = unbroken.outcome()
        runs: list[dict[str, Any]] = []
        left = kills
        while left:
            run = Run(_new(Path(scratch) / "killed"), words, start)
            while len(run.kills) < min(left, KILLS_OF_A_RUN) and run.survive(rng, pace):
                log.info("killed: %s", run.kills[-1])
            if not run.is_done:
                run.finish(run.begun())
            left -= len(run.kills)
            latents, frames = run.outcome()
            same = (bool(torch.equal(latents, wanted[0])), bool((frames == wanted[1]).all()))
            log.info("latents and frames equal: %s", same)
            runs.append({"latents_equal": same[0], "frames_equal": same[1], "kills": run.kills})
    return {
        "benchmark": "resume-kills",
        "mode": mode,
        "cache": cache,
        "steps": pace.steps,
        "kills": sum(len(run["kills"]) for run in runs),
        "identical": all(run["latents_equal"] and run["frames_equal"] for run in runs),
        "runs": runs,
        **circumstances(),
    }


def _words(
    folder: Path, *, mode: str, cache: str, steps: int | None, seconds: float | None, seed: int
) -> tuple[str, ...]:
    """The command that begins a run."""
    (pair,) = planned_pairs(1, seed)
    request, _ = request_for(pair, {"preset": f"demo-{mode}", "cache": cache}, folder)
    words = ["generate", "--preset", request.preset, "--prompt", pair.prompt, "--cache", cache]
    words += ["--seed", str(pair.seed), "--out", OUT, "--save-latents", "latents.safetensors"]
    if steps is not None:
        words += ["--steps", str(steps)]
    if seconds is not None:
        words += ["--seconds", str(seconds)]
    if request.image is not None:
        words += ["--image", request.image]
    return tuple(words)


def _new(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _pace(document: dict[str, Any], taken_s: float) -> Pace:
    seconds, steps = document["seconds"], document["steps_run"]
    decode_s, steps_s = seconds["decode"], seconds["denoise"]
    return Pace(max(0.0, taken_s - decode_s - steps_s), steps_s / steps, decode_s, steps)

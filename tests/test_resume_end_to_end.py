"""The demo through the real command line: interrupted, gone on with, decoded."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import torch
from demo_runs import video_of

from kandinsky5.output.state import load_latents

K1 = Path(__file__).resolve().parent.parent / "k1.py"
JOB = ("--prompt", "a red circle", "--seed", "5", "--steps", "40", "--seconds", "0.17")
PATIENCE_S = 300


def k1(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(K1), *arguments, "--state-dir", "state"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def interrupted(folder: Path) -> str:
    """Begin the job, press Ctrl-C once steps are being done; gives what stderr said."""
    command = [sys.executable, str(K1), "generate", *JOB, "--state-dir", "state"]
    command += ["--out", "b.mp4", "--save-latents", "b.safetensors"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder)
    assert process.stderr is not None
    with process:
        said = []
        for line in process.stderr:
            said.append(line)
            if "left" in line:  # a step's line tells the time that is left
                process.send_signal(signal.SIGINT)
                break
        said += process.stderr
        assert process.wait(PATIENCE_S) == 5, said
    return "".join(said)


def test_ctrl_c_leaves_a_file_that_resume_takes_to_the_same_bits(tmp_path: Path) -> None:
    k1("generate", *JOB, "--out", "a.mp4", "--save-latents", "a.safetensors", folder=tmp_path)
    assert list((tmp_path / "state" / "states").iterdir()) == []  # nothing to go on with
    said = interrupted(tmp_path)
    assert not (tmp_path / "b.mp4").exists()
    (line,) = [line for line in said.splitlines() if "to go on" in line]
    _, *command = shlex.split(line.partition("python ")[2])
    assert command[0] == "resume" and Path(command[1]).is_file()
    done = k1(*command, "--out", "b.mp4", "--json", folder=tmp_path)
    assert json.loads(done.stdout)["evaluations_run"] == 2 * 40
    latents = [load_latents(tmp_path / name)[0] for name in ("a.safetensors", "b.safetensors")]
    assert torch.equal(*latents)
    assert video_of(tmp_path / "a.mp4") == video_of(tmp_path / "b.mp4")
    k1("decode", "a.safetensors", "--out", "c.mp4", folder=tmp_path)
    assert video_of(tmp_path / "a.mp4") == video_of(tmp_path / "c.mp4")

"""The demo model through the real command line and the real worker."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from kandinsky5.demo.adherence import first_frame_psnr, measure
from kandinsky5.demo.scenes import Scene, render
from kandinsky5.output.metadata import read_metadata, request_of, video_info
from kandinsky5.request import GenerationRequest
from kandinsky5.worker.client import WorkerClient

K1 = Path(__file__).resolve().parent.parent / "k1.py"
RESULT_KEYS = {
    "output",
    "frames",
    "width",
    "height",
    "seed",
    "steps_run",
    "evaluations_run",
    "evaluations_skipped",
    "seconds",
    "peak_vram_bytes",
    "peak_rss_bytes",
    "h2d_bytes",
    "d2h_bytes",
}
PATIENCE_S = 300


def k1(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(K1), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=PATIENCE_S,
        check=False,
    )


def frames_of(path: Path) -> np.ndarray:
    reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in reader])


def finished(client: WorkerClient, job_id: str):
    deadline = time.monotonic() + PATIENCE_S
    while (job := client.status(job_id)).state in ("queued", "running"):
        assert time.monotonic() < deadline, f"still {job.state} ({job.stage})"
        time.sleep(0.05)
    return job


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> dict:
    """One clip made by the command line: its JSON, its latents, its folder."""
    folder = tmp_path_factory.mktemp("cli")
    done = k1(
        "generate",
        *("--preset", "demo-t2v", "--prompt", "a red circle moves right", "--seed", "11"),
        *("--out", "clip.mp4", "--save-latents", "clip.safetensors", "--json"),
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "folder": folder}


def test_a_prompt_becomes_a_video_of_what_it_says(clip) -> None:
    assert clip.keys() >= RESULT_KEYS
    assert (clip["frames"], clip["width"], clip["height"], clip["seed"]) == (25, 64, 64, 11)
    assert clip["evaluations_run"] == 2 * clip["steps_run"]
    path = clip["folder"] / "clip.mp4"
    info = video_info(path)
    assert (info["frames"], info["fps"]) == (25, 24)
    seen = measure(frames_of(path))
    assert (seen.colour, seen.shape, seen.direction) == ("red", "circle", "right")


def test_the_file_holds_the_request_that_made_it(clip) -> None:
    metadata = read_metadata(clip["folder"] / "clip.mp4")
    request = request_of(metadata)
    assert (request.prompt, request.seed) == ("a red circle moves right", 11)
    assert str(clip["folder"]) not in json.dumps(metadata)


def test_memory_of_a_clip_stays_small(clip) -> None:
    assert clip["peak_rss_bytes"] <= 2.5e9


def test_the_worker_makes_the_same_latents_to_the_byte(clip, tmp_path) -> None:
    client = WorkerClient(state_dir=tmp_path / "state", out_dir=tmp_path / "out")
    client.start()
    try:
        jobs = [
            finished(
                client,
                client.submit(
                    GenerationRequest(
                        prompt="a red circle moves right",
                        seed=11,
                        save_latents=str(tmp_path / f"{run}.safetensors"),
                    )
                ),
            )
            for run in range(2)
        ]
    finally:
        client.close()
    assert [job.state for job in jobs] == ["done", "done"], [job.message for job in jobs]
    from_cli = load(clip["folder"] / "clip.safetensors")
    for run in range(2):
        assert np.array_equal(load(tmp_path / f"{run}.safetensors"), from_cli)
    assert jobs[1].result["seconds"]["load"] < jobs[0].result["seconds"]["load"]


def load(path: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    return load_file(path)["latents"]


def test_given_noise_is_where_the_run_starts(clip, tmp_path) -> None:
    noise = tmp_path / "noise.safetensors"
    from safetensors.numpy import save_file

    save_file({"latents": np.zeros((7, 8, 8, 16), np.float32)}, noise)
    common = ("generate", "--prompt", "a red circle", "--steps", "1", "--guidance", "1")
    for seed in ("1", "2"):
        done = k1(
            *common,
            *("--seed", seed, "--init-latents", str(noise), "--out", f"{seed}.mp4"),
            *("--save-latents", f"{seed}.safetensors"),
            folder=tmp_path,
        )
        assert done.returncode == 0, done.stderr
    assert np.array_equal(load(tmp_path / "1.safetensors"), load(tmp_path / "2.safetensors"))


def test_a_picture_becomes_the_first_frame_and_moves_as_told(tmp_path) -> None:
    scene = Scene("blue", "square", "up", "dark", 0.17, (0.5, 0.75), 0.4)
    picture = render(scene, 25, 64)[0]
    Image.fromarray(picture).save(tmp_path / "start.png")
    done = k1(
        "generate",
        *("--preset", "demo-i2v", "--prompt", "a blue square moves up", "--image", "start.png"),
        *("--seed", "5", "--out", "moved.mp4", "--json"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    frames = frames_of(tmp_path / "moved.mp4")
    assert first_frame_psnr(frames, picture) >= 25.0
    assert measure(frames).direction == "up"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--prompt", ""), 2, "prompt"),
        (("--prompt", "x", "--steps", "0"), 2, "steps"),
        (("--prompt", "x", "--guidance", "nan"), 2, "guidance"),
        (("--prompt", "x", "--shift", "0"), 2, "shift"),
        (("--prompt", "x", "--seed", "-5"), 2, "seed"),
        (("--prompt", "x", "--seed", str(2**70)), 2, "seed"),
        (("--prompt", "x", "--width", "1000000"), 2, "width"),
        (("--prompt", "x", "--seconds", "30"), 2, "seconds"),
        (("--prompt", "x", "--seconds", "nan"), 2, "seconds"),
        (("--prompt", "x", "--dit", "/nowhere/at all.safetensors"), 2, "dit"),
        (("--prompt", "x", "--model-dir", "/nowhere"), 2, "model_dir"),
        (("--prompt", "x", "--out", "/proc/none/x.mp4"), 2, "out"),
        (("--preset", "demo-i2v", "--prompt", "x", "--image", "none.png"), 2, "image"),
        (("--preset", "demo-i2v", "--prompt", "x"), 2, "image"),
    ],
)
def test_bad_input_is_one_line_and_exit_two(tmp_path, arguments, code, said) -> None:
    done = k1("generate", *arguments, folder=tmp_path)
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert said in lines[0]
    assert "Traceback" not in done.stderr


def test_a_model_that_is_not_here_names_path_and_command(tmp_path) -> None:
    done = k1("generate", "--preset", "lite-t2v-5s-sft", "--prompt", "x", folder=tmp_path)
    assert done.returncode == 3
    assert "download lite-t2v-5s-sft" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1

"""A worker's client without a worker: jobs are steps of a thread that ends with a small real video."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from PIL import Image

from kandinsky5.errors import UserError
from kandinsky5.request import GenerationRequest
from kandinsky5.worker.client import FileNames, Folders, JobSnapshot, asked_for


def write_video(path: Path, size_px: int = 64, frames: int = 25) -> None:
    """A red square that moves right, as H.264."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = imageio_ffmpeg.write_frames(
        str(path), (size_px, size_px), fps=24, codec="libx264", macro_block_size=2, quality=8
    )
    writer.send(None)
    for index in range(frames):
        frame = np.full((size_px, size_px, 3), 24, np.uint8)
        left = 4 + index
        frame[20:40, left : left + 20] = (220, 60, 40)
        writer.send(frame.tobytes())
    writer.close()


def write_preview(path: Path, progress: float) -> None:
    """A disc that moves right over four frames and grows sharper with the progress."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[0:48, 0:72].astype(np.float32)
    pictures = []
    for index in range(4):
        distance = np.hypot(x - 16 - 12 * index, y - 24)
        inside = np.clip((14 - distance) * (0.05 + progress) / 3 + 0.5, 0, 1)[..., None]
        frame = inside * (222, 44, 40) + (1 - inside) * (26, 28, 34)
        pictures.append(Image.fromarray(frame.astype(np.uint8)))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=167, loop=0)


class FakeClient:
    """The contract of the worker's client.

    Args:
        out_dir: where videos go.
        steps: steps of each job; each leaves a preview, a disc further to the right.
        held: jobs stand still before each step that :meth:`allow` or :meth:`release` has not let pass.

    Attributes:
        asked, told: what was asked of model files, and what is answered; None while "the worker looks".
    """

    def __init__(self, out_dir: Path, *, steps: int = 5, held: bool = False) -> None:
        self.folders = Folders(out_dir)
        self.steps = steps
        self._allowed: float = 0 if held else math.inf
        self.asked: list[FileNames] = []
        self.told: dict[str, Any] | None = None
        self._jobs: dict[str, JobSnapshot] = {}
        self._tokens: dict[str, str] = {}
        self._stopping: set[str] = set()
        self._modes: dict[str, str] = {}
        self._change = threading.Condition(threading.RLock())
        self._numbers = itertools.count(1)
        self._paused = False
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 8.0) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def hold(self) -> None:
        """Let no further step pass."""
        self.allow(0)

    def allow(self, steps: float) -> None:
        """Let this many further steps pass."""
        with self._change:
            self._allowed = steps
            self._change.notify_all()

    def release(self) -> None:
        """Let every step pass."""
        self.allow(math.inf)

    def clear(self) -> None:
        """Stop everything and forget it."""
        self.release()
        self.set_paused(False)
        for job in self.queue():
            self.stop(job.id)
        self.wait(lambda: not self.queue())
        with self._change:
            self._jobs.clear()
            self._tokens.clear()
            self._stopping.clear()
            self._modes.clear()

    def wait(self, condition: Any, timeout_s: float = 120.0) -> None:
        with self._change:
            assert self._change.wait_for(condition, timeout_s), (
                "the fake client's jobs did not get there"
            )

    def use_folders(self, folders: Folders) -> None:
        self.folders = folders

    def submit(self, request: GenerationRequest, *, token: str | None = None) -> str:
        with self._change:
            if token and token in self._tokens:
                return self._tokens[token]
            job_id = f"job{next(self._numbers)}"
            self._jobs[job_id] = JobSnapshot(
                job_id,
                "queued",
                request.to_dict(),
                created_at=time.time(),
                seed_drawn=request.seed is None,
            )
            if token:
                self._tokens[token] = job_id
            self._change.notify_all()
            return job_id

    def expand(self, request: GenerationRequest, *, token: str | None = None) -> str:
        with self._change:
            job_id = f"job{next(self._numbers)}"
            self._jobs[job_id] = JobSnapshot(
                job_id, "queued", request.to_dict(), kind="expand", created_at=time.time()
            )
            self._change.notify_all()
            return job_id

    def replace(self, job_id: str, request: GenerationRequest) -> bool:
        with self._change:
            waits = self.status(job_id).can_be_edited
            if waits:
                self._set(job_id, request=request.to_dict(), seed_drawn=request.seed is None)
            return waits

    def duplicate(self, job_id: str, *, token: str | None = None) -> str:
        return self.submit(asked_for(self.status(job_id)), token=token)

    def move(self, job_id: str, places: int) -> bool:
        with self._change:
            waiting = [job.id for job in self.queue() if job.state == "queued"]
            if job_id not in waiting:
                return False
            index = waiting.index(job_id)
            waiting.insert(max(index + places, 0), waiting.pop(index))
            self._jobs |= {name: self._jobs.pop(name) for name in waiting}
            return True

    def set_paused(self, paused: bool) -> None:
        with self._change:
            self._paused = paused
            self._change.notify_all()

    def is_paused(self) -> bool:
        return self._paused

    def delete(self, job_id: str) -> list[str]:
        with self._change:
            if self.status(job_id).place != -1:
                raise UserError("job", job_id, "stop it first")
            if output := self._jobs.pop(job_id).output:
                Path(output).unlink(missing_ok=True)
            return []

    def describe(self, names: FileNames) -> dict[str, Any] | None:
        self.asked.append(names)
        if self.told is None:
            return None
        named = {"dit": names.dit, "model_dir": names.model_dir}
        told = {name: self.told.get(name) if path else None for name, path in named.items()}
        loras = list(self.told.get("loras", ()))[: len(names.loras)]
        return {**told, "loras": loras, "missing": self.told.get("missing", [])}

    def resume(self, job_id: str) -> None:
        with self._change:
            job = self.status(job_id)
            if not job.is_resumable:
                raise UserError("job", job_id, f"it is {job.state} and has no saved state")
            self._set(job_id, state="queued", resume_from=job.saved_state, finished_at=None)

    def discard(self, job_id: str) -> None:
        with self._change:
            if self.status(job_id).is_resumable:
                self._set(job_id, saved_state=None, saved_step=None)

    def preview_path(self, job_id: str, step: int) -> Path | None:
        path = self._preview_file(job_id, step)
        return path if step in self.status(job_id).previews and path.is_file() else None

    def _preview_file(self, job_id: str, step: int) -> Path:
        return self.folders.out_dir.with_name("previews") / job_id / f"{step}.webp"

    def stop(self, job_id: str, mode: str = "discard") -> None:
        with self._change:
            self._modes[job_id] = mode
            if self._jobs[job_id].state == "queued":
                self._set(job_id, state="stopped", finished_at=time.time())
            else:
                self._stopping.add(job_id)
                self._set(job_id, is_stopping=True)
                self._change.notify_all()

    def status(self, job_id: str) -> JobSnapshot:
        with self._change:
            for job in self.queue():
                if job.id == job_id:
                    return job
            return self._jobs[job_id]

    def queue(self) -> tuple[JobSnapshot, ...]:
        with self._change:
            running = [job for job in self._jobs.values() if job.state == "running"]
            waiting = [job for job in self._jobs.values() if job.state == "queued"]
            places = itertools.count(0 if running else 1)
            return tuple(replace(job, place=next(places)) for job in running + waiting)

    def history(self, limit: int = 24, offset: int = 0) -> Sequence[JobSnapshot]:
        with self._change:
            over = [job for job in self._jobs.values() if job.state not in ("running", "queued")]
            over = [job for job in over if job.kind == "generate"]
            over.sort(key=lambda job: job.finished_at or 0, reverse=True)
            return tuple(over[offset : offset + limit])

    def history_length(self) -> int:
        return len(self.history(limit=10**6))

    def worker_pid(self) -> int | None:
        return None

    def _set(self, job_id: str, **changes: Any) -> None:
        with self._change:
            self._jobs[job_id] = replace(self._jobs[job_id], **changes)
            self._change.notify_all()

    def _next(self) -> str | None:
        with self._change:
            self._change.wait_for(lambda: self._closed or (self.queue() and not self._paused))
            return None if self._closed else self.queue()[0].id

    def _work(self) -> None:
        while (job_id := self._next()) is not None:
            run = self._write if self._jobs[job_id].kind == "expand" else self._run
            run(job_id)

    def _may_step(self, job_id: str) -> bool:
        with self._change:
            self._change.wait_for(
                lambda: self._closed or job_id in self._stopping or self._allowed > 0
            )
            self._allowed -= 1
            return not self._closed and job_id not in self._stopping

    def _write(self, job_id: str) -> None:
        """One word more with each step."""
        prompt = self._jobs[job_id].request["prompt"]
        self._set(job_id, state="running", stage="expand", started_at=time.time())
        words = f"{prompt}, in detail, on a table".split()
        for number in range(1, len(words) + 1):
            if not self._may_step(job_id):
                self._set(job_id, state="stopped", finished_at=time.time(), is_stopping=False)
                return
            self._set(job_id, expanded_prompt=" ".join(words[:number]))
        if "fail" in prompt:
            self._set(job_id, state="failed", message="weights <b>missing</b>", finished_at=1.0)
            return
        text = None if "useless" in prompt else " ".join(words)
        made = {"expanded_prompt": text, "seconds": {"total": 3.2}, "notices": ["was blank"]}
        self._set(job_id, state="done", result=made, finished_at=time.time())

    def _run(self, job_id: str) -> None:
        request = self._jobs[job_id].request
        self._stopping.discard(job_id)
        self._set(job_id, state="running", stage="load", started_at=time.time(), total=self.steps)
        for step in range(self._jobs[job_id].saved_step or 0, self.steps):
            if not self._may_step(job_id):
                saved: dict[str, Any] = {"is_stopping": False}
                mode = self._modes.get(job_id)
                if mode in ("save", "decode") and step:
                    saved |= {"saved_state": f"/states/{job_id}", "saved_step": step}
                self._set(job_id, **saved)
                if mode == "decode" and step:
                    break
                self._set(job_id, state="stopped", finished_at=time.time())
                return
            write_preview(self._preview_file(job_id, step + 1), (step + 1) / self.steps)
            left = self.steps - step - 1
            self._set(
                job_id,
                stage="denoise",
                step=step + 1,
                seconds_per_step=0.4,
                eta_s=0.4 * left,
                previews=tuple(range(1, step + 2)),
            )
        if "fail" in request["prompt"]:
            self._set(
                job_id, state="failed", message="out of memory <b>now</b>", finished_at=time.time()
            )
            return
        path = self.folders.out_dir / f"{job_id}.mp4"
        write_video(path)
        made = {
            "output": str(path),
            "frames": 25,
            "width": 64,
            "height": 64,
            "seed": request["seed"] if request["seed"] is not None else 1234567,
            "steps_run": self._jobs[job_id].step,
            "seconds": {"total": 2.0},
            "peak_vram_bytes": 0,
            "peak_rss_bytes": 700 * 2**20,
        }
        self._set(job_id, state="done", output=str(path), result=made, finished_at=time.time())

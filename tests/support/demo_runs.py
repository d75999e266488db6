"""Short runs of the demo model, and what came of them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image

from kandinsky5.events import Notice, PipelineEvent
from kandinsky5.output.autosave import Autosave, StateKeeper
from kandinsky5.output.state import load_latents
from kandinsky5.pipeline.pipeline import Pipeline
from kandinsky5.request import GenerationRequest, GenerationResult

STEPS = 4
QUICK = {
    "prompt": "a red circle moves right",
    "seed": 3,
    "steps": STEPS,
    "seconds": 1 / 6,
    "guidance": 2.0,
    "vae_tiling": "rolling",  # frame by frame, so that it can be interrupted in its middle
}


@dataclass
class Ran:
    """A run: its latents, its mp4, its result and events; what ended it early instead."""

    folder: Path
    events: list[PipelineEvent] = field(default_factory=list)
    result: GenerationResult | None = None
    error: BaseException | None = None

    @property
    def latents(self) -> torch.Tensor:
        return load_latents(self.folder / "latents.safetensors")[0]

    @property
    def frames(self) -> np.ndarray:
        """uint8 [n, 64, 64, 3] of the mp4."""
        return frames_of(self.folder / "out.mp4")

    @property
    def notices(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Notice)]

    def is_like(self, other: Ran) -> bool:
        """Whether latents and stream are the same to the bit."""
        return torch.equal(self.latents, other.latents) and video_of(
            self.folder / "out.mp4"
        ) == video_of(other.folder / "out.mp4")


def quick(**values: object) -> GenerationRequest:
    return GenerationRequest(**{**QUICK, **values})


def picture_request(folder: Path, **values: object) -> GenerationRequest:
    """As :func:`quick`, of a video that begins with a picture."""
    path = folder / "start.png"
    shades = np.arange(64, dtype=np.uint8)[:, None, None] * np.array([1, 2, 3], np.uint8)
    Image.fromarray(np.broadcast_to(shades, (64, 64, 3)).copy()).save(path)
    return quick(preset="demo-i2v", image=str(path), **values)


def ran(
    folder: Path,
    request: GenerationRequest | None = None,
    *,
    pipeline: Pipeline | None = None,
    resume: Path | None = None,
    stop_before: int | None = None,
    states: StateKeeper | None = None,
    catch: type[BaseException] | tuple[type[BaseException], ...] = (),
) -> Ran:
    """Run or resume in ``folder``.

    Args:
        stop_before: the step before which the user stops it.
        catch: errors that are kept instead of raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run, asked = Ran(folder), 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == stop_before

    pipeline = pipeline or Pipeline()
    options = {"out": folder / "out.mp4", "emit": run.events.append, "states": states}
    try:
        if resume is not None:
            run.result = pipeline.resume(
                resume, should_stop=should_stop, keep_paths=True, **options
            )
        else:
            values = {**(request or quick()).to_dict()}
            values["save_latents"] = str(folder / "latents.safetensors")
            settled = GenerationRequest.from_dict(values)
            run.result = pipeline.run(settled, should_stop=should_stop, **options)
    except catch as error:
        run.error = error
    return run


def keeper(folder: Path, *, every_steps: int | None = None) -> StateKeeper:
    """Of a run that saves itself on a stop, and every so many steps."""
    states = StateKeeper(folder, autosave=Autosave(every_minutes=None, every_steps=every_steps))
    states.ask_to_save_on_stop()
    return states


def frames_of(path: Path) -> np.ndarray:
    reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in reader])


def video_of(path: Path) -> bytes:
    """The H.264 stream; the file around it holds timings."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path)]
    command += ["-map", "0:v", "-c", "copy", "-f", "h264", "-"]
    return subprocess.run(command, capture_output=True, check=True).stdout


class Refuser:
    """An allocator that refuses at chosen calls of a function."""

    def __init__(self, function: Callable[..., object], calls: set[int]) -> None:
        self._function, self._calls, self.seen = function, calls, 0

    def __get__(self, instance: object, owner: type | None = None) -> Callable[..., object]:
        return lambda *arguments, **options: self(instance, *arguments, **options)

    def __call__(self, *arguments: object, **options: object) -> object:
        self.seen += 1
        if self.seen in self._calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self._function(*arguments, **options)

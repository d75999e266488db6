"""What made a file, written into the file: the request and its circumstances as JSON, and back again."""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from kandinsky5.errors import UserError
from kandinsky5.output import mp4
from kandinsky5.output.community import is_community, request_of_community
from kandinsky5.request import GenerationRequest

JSON_CHUNK = "k1"
READABLE_CHUNK = "parameters"
"""Names of the text chunks of a PNG."""

MAX_HEADER_BYTES = 100 * 10**6
"""The limit that the safetensors format sets for its header."""

_PATH_FIELDS = ("image", "dit", "model_dir", "init_latents", "save_latents", "out")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def describe(
    request: GenerationRequest,
    *,
    checkpoint: Path | None,
    seed: int,
    seconds: Mapping[str, float],
    peak_vram_bytes: int,
    peak_rss_bytes: int,
    expanded_prompt: str | None = None,
    early_step: int | None = None,
    attention: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything needed to make a result again, JSON-ready and without a path of this machine.

    Args:
        request: as it was carried out. Of its paths only the last part is kept.
        checkpoint: the transformer's file or folder, if there is one.
        seed: the seed used.
        seconds: wall time of each stage so far.
        peak_vram_bytes, peak_rss_bytes: most device and main memory in use so far.
        expanded_prompt: the prompt as the text encoder rewrote it, if it did.
        early_step: the step whose estimate was decoded, where the user wanted no further one.
        attention: what it was computed with, where the request leaves that to the machine.
    """
    # Not above: the package's front may import this module one day.
    from kandinsky5 import __version__

    values = request.to_dict()
    for name in _PATH_FIELDS:
        values[name] = _last_part(values[name])
    values["loras"] = [{**lora, "path": _last_part(lora["path"])} for lora in values["loras"]]
    described: dict[str, Any] = {
        "k1": __version__,
        "request": values,
        "seed": seed,
        "checkpoint": None,
        "seconds": {stage: round(time_s, 3) for stage, time_s in seconds.items()},
        "peak_vram_bytes": peak_vram_bytes,
        "peak_rss_bytes": peak_rss_bytes,
    }
    if checkpoint is not None:
        described["checkpoint"] = {
            "name": _last_part(str(checkpoint)),
            "header_sha256": header_sha256(checkpoint),
        }
    if expanded_prompt is not None:
        described["expanded_prompt"] = expanded_prompt
    if early_step is not None:
        described["stopped_at_step"] = early_step
    if attention is not None:
        described["attention"] = dict(attention)
    return described


def _last_part(path: str | None) -> str | None:
    # Windows rules on every system: a file made there is read here, and both separators count.
    return path and PureWindowsPath(path).name


def header_sha256(checkpoint: Path) -> str | None:
    """SHA-256 of a safetensors file's header JSON, in hex; of a folder's files one after the other.

    None where there is no such header. It tells checkpoints apart by names, shapes and metadata without
    reading gigabytes.
    """
    files = sorted(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else [checkpoint]
    digest = hashlib.sha256()
    try:
        for file in files:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = stream.read(length) if length <= MAX_HEADER_BYTES else b""
            if not header or len(header) != length:
                return None
            digest.update(header)
    except (OSError, struct.error):
        return None
    return digest.hexdigest() if files else None


def to_json(metadata: Mapping[str, Any]) -> str:
    """One line of JSON that UTF-8 can hold: half a surrogate pair in a prompt becomes its escape."""
    text = json.dumps(metadata, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def readable(metadata: Mapping[str, Any]) -> str:
    """The metadata as a person reads it: the prompt, what to avoid, then one line of settings."""
    request = metadata.get("request", {})
    lines = [str(request.get("prompt", ""))]
    if request.get("negative_prompt"):
        lines.append(f"Negative prompt: {request['negative_prompt']}")
    checkpoint = metadata.get("checkpoint") or {}
    width, height = request.get("width"), request.get("height")
    settings = {
        "Steps": request.get("steps"),
        "Stopped at step": metadata.get("stopped_at_step"),
        "Guidance": request.get("guidance"),
        "Shift": request.get("shift"),
        "Seed": metadata.get("seed"),
        "Size": f"{width}x{height}" if width and height else None,
        "Preset": request.get("preset"),
        "Model": checkpoint.get("name"),
        "Version": f"K1 {metadata.get('k1')}",
    }
    lines.append(
        ", ".join(f"{key}: {value}" for key, value in settings.items() if value is not None)
    )
    return "\n".join(lines).encode("utf-8", "replace").decode("utf-8")


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of an mp4 or PNG, ours or the early community program's, as it stands in the file.

    Raises:
        UserError: field ``file``: no such file, another kind of file, damaged, or without parameters.
    """
    with _opened(path) as file:
        if file.read(len(_PNG_SIGNATURE)) == _PNG_SIGNATURE:
            text = _png_picture(file, path).info.get(JSON_CHUNK)
        else:
            try:
                text = mp4.read_comment(file)
            except mp4.MalformedMp4 as error:
                raise _unreadable(path, error) from error
    try:
        metadata = json.loads(text) if text else None
    except (ValueError, RecursionError):  # somebody else's comment, or a trap
        metadata = None
    if not isinstance(metadata, dict) or not ("request" in metadata or is_community(metadata)):
        raise UserError(
            "file", str(path), "no K1 parameters in it; use a video or picture as K1 saved it"
        )
    return metadata


def request_of(metadata: Mapping[str, Any]) -> GenerationRequest:
    """The request that makes the file again, its seed included.

    Raises:
        UserError: a value was edited into something that cannot be used, or comes from a newer version.
    """
    if is_community(metadata):
        return request_of_community(metadata)
    request = GenerationRequest.from_dict(metadata.get("request"))  # type: ignore[arg-type]
    seed = metadata.get("seed")
    return request if seed is None else replace(request, seed=seed)


def video_info(path: str | Path) -> dict[str, Any]:
    """Size and length of an mp4 or PNG: ``width``, ``height`` (px), ``frames``, ``duration_s``, ``fps``.

    A picture has one frame, and 0 for the times.

    Raises:
        UserError: field ``file``: neither mp4 nor PNG, or damaged.
    """
    with _opened(path) as file:
        if file.read(len(_PNG_SIGNATURE)) == _PNG_SIGNATURE:
            width, height = _png_picture(file, path).size
            return {"width": width, "height": height, "frames": 1, "duration_s": 0.0, "fps": 0.0}
        try:
            track = mp4.read_video_track(file)
        except mp4.MalformedMp4 as error:
            raise _unreadable(path, error) from error
    return {
        "width": track.width,
        "height": track.height,
        "frames": track.frames,
        "duration_s": round(float(track.duration_s), 6),
        "fps": round(float(track.frames_per_second), 6),
    }


def _opened(path: str | Path) -> BinaryIO:
    try:
        file = Path(path).expanduser()
        if file.exists() and not file.is_file():
            raise UserError("file", str(path), "an mp4 or PNG file, not a folder or device")
        return file.open("rb")
    except (OSError, RuntimeError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError("file", str(path), f"cannot be read ({reason})") from error


def _png_picture(file: BinaryIO, path: str | Path) -> Image.Image:
    """The PNG's header and leading text chunks; no pixel is decoded."""
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file, formats=["PNG"])
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> UserError:
    return UserError("file", str(path), f"not a whole mp4 or PNG ({error})")

"""Frames to an mp4 or a PNG, with everything that made them inside.

Frames go through a pipe to the bundled ffmpeg as they are decoded; no video is ever held in memory. The same
frames and metadata give the same bytes on every machine of one architecture: threads are fixed in number,
scaling is bit-exact, and no dates are written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from kandinsky5.errors import K1Error, UserError
from kandinsky5.output import mp4
from kandinsky5.output.atomic import (
    DiskFull,
    free_bytes,
    prepare_output,
    put_in_place,
    replacing,
    write_error,
)
from kandinsky5.output.encoder import Encoder
from kandinsky5.output.metadata import JSON_CHUNK, READABLE_CHUNK, readable, to_json
from kandinsky5.output.unfinished import UnfinishedFiles

__all__ = ["DiskFull", "VideoWriter", "prepare_output", "video_bytes", "write_png"]

log = logging.getLogger(__name__)

ENCODER_THREADS = 8
"""Fixed: the number of threads changes the bytes that x264 writes."""

COMMENT_SLACK_BYTES = 1024
"""Blanks behind the comment's JSON, so that later figures fit in its place."""

_ENCODER_EXIT_S = 30
_FULL_MESSAGES = ("No space left on device", "Disk quota exceeded")
_FILTERS = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int+bitexact,"
    "format=yuv420p,setparams=color_primaries=bt709:color_trc=bt709"
)

Frame = NDArray[np.uint8]


def video_bytes(width: int, height: int, frames: int, crf: int = 16) -> int:
    """Room to have free for a video: above what nearly all take, by size in pixels, frames and CRF."""
    bytes_per_pixel = min(1.5, 0.25 * 2 ** ((16 - crf) / 6))  # x264 halves its rate every 6
    return 2**20 + int(width * height * frames * bytes_per_pixel)


class VideoWriter:
    """Writes H.264 in yuv420p to an mp4, frame by frame; the file appears when the block ends well.

        with VideoWriter(path, width=768, height=512, metadata=described) as writer:
            writer.write(frame)

    When the block ends by an exception or ffmpeg fails, nothing is left and an older file stays as it was.

    Args:
        path: the final name.
        width, height: pixels, both even.
        fps: frames a second.
        crf: quality of H.264, 0 (lossless) … 51.
        metadata: JSON-ready; goes to the file's ``comment`` tag.
        frames: how many will come, if known, to tell in time whether the disk has room.

    Attributes:
        frames: how many were written.

    Raises:
        UserError: an odd size, or a path that cannot be written.
        DiskFull: too little room before the start, or the disk filled up.
        K1Error: ffmpeg is missing or failed; its last lines are given.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        width: int,
        height: int,
        fps: float = 24,
        crf: int = 16,
        metadata: Mapping[str, Any],
        frames: int | None = None,
    ) -> None:
        for name, side in (("width", width), ("height", height)):
            if side < 2 or side % 2:
                raise UserError(name, side, "H.264 in yuv420p takes even numbers of pixels from 2")
        self.path = Path(path)
        self.frames = 0
        self._width, self._height, self._fps, self._crf = width, height, fps, crf
        self._comment = to_json(metadata)
        self._comment_bytes = len(self._comment.encode()) + COMMENT_SLACK_BYTES
        self._needed_bytes = self._comment_bytes + video_bytes(
            width, height, round(fps) if frames is None else frames, crf
        )
        self._encoder: Encoder | None = None

    def __enter__(self) -> VideoWriter:
        self.path = prepare_output(self.path, needed_bytes=self._needed_bytes)
        self._unfinished = UnfinishedFiles(self.path.parent)
        self._temporary, self._tags = self._unfinished.new(), self._unfinished.new()
        try:
            self._tags.write_text(
                _ffmetadata(self._padded_comment()), encoding="utf-8", newline="\n"
            )
            self._encoder = Encoder(self._arguments())
        except OSError as error:
            self._clean_up()
            raise write_error(self.path, error, self._needed_bytes) from error
        except K1Error:
            self._clean_up()
            raise
        return self

    def write(self, frame: Frame) -> None:
        """Append one frame, uint8 [height, width, 3] RGB.

        Raises:
            ValueError: another shape or dtype.
            DiskFull, K1Error: ffmpeg ended early.
        """
        if self._encoder is None:
            raise RuntimeError("VideoWriter.write outside of its with block")
        if frame.dtype != np.uint8 or frame.shape != (self._height, self._width, 3):
            raise ValueError(
                f"frame {frame.dtype} {list(frame.shape)}; uint8 [{self._height}, {self._width}, 3] is wanted"
            )
        try:
            self._encoder.input.write(np.ascontiguousarray(frame).data)
        except OSError as error:  # a broken pipe: ffmpeg has gone and its last lines say why
            raise self._failure(self._encoder.wait(_ENCODER_EXIT_S)) from error
        self.frames += 1

    def set_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Replace the metadata before the block ends: figures known only now, as peaks and timings.

        They take the place of the first ones if they are at most 1 KiB longer, else the first ones stay.
        """
        comment = to_json(metadata)
        if len(comment.encode()) > self._comment_bytes:
            log.warning("%s keeps its first metadata: the later ones are too long", self.path)
            return
        self._comment = comment

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._clean_up()

    def _finish(self) -> None:
        assert self._encoder is not None
        if not self.frames:
            raise K1Error(f"{self.path}: no frame was written")
        # A broken pipe here means that ffmpeg has failed, and then its exit code says so.
        with suppress(OSError):
            self._encoder.input.close()
        if code := self._encoder.wait():
            raise self._failure(code)
        try:
            self._check_whole()
            self._write_last_comment()
            put_in_place(self._temporary, self.path)
        except OSError as error:
            self._temporary.unlink(missing_ok=True)
            raise write_error(self.path, error, self._needed_bytes) from error

    def _check_whole(self) -> None:
        """ffmpeg's word is not taken for it: interrupted, it ends a shorter video as if it were whole."""
        try:
            with self._temporary.open("rb") as file:
                order = mp4.layout(file)
                track = mp4.read_video_track(file)
        except mp4.MalformedMp4 as error:
            raise K1Error(
                f"{self.path}: ffmpeg left a damaged file ({error}); try again"
            ) from error
        if track.frames != self.frames or order.index("moov") > order.index("mdat"):
            raise K1Error(
                f"{self.path}: ffmpeg wrote {track.frames} of {self.frames} frames; try again"
            )

    def _write_last_comment(self) -> None:
        with self._temporary.open("r+b") as file:
            place = mp4.find_comment(file)
            if place is None or place.size_bytes != self._comment_bytes:
                raise K1Error(f"{self.path}: ffmpeg lost the metadata; try again")
            file.seek(place.start)
            file.write(self._padded_comment().encode())

    def _padded_comment(self) -> str:
        return self._comment + " " * (self._comment_bytes - len(self._comment.encode()))

    def _failure(self, code: int) -> K1Error:
        """The error for an ffmpeg that ended with ``code``."""
        assert self._encoder is not None
        lines = self._encoder.last_lines()
        if any(message in line for line in lines for message in _FULL_MESSAGES):
            written = self._temporary.stat().st_size if self._temporary.exists() else 0
            self._temporary.unlink(missing_ok=True)
            return DiskFull(
                self.path, max(self._needed_bytes, written), free_bytes(self.path.parent)
            )
        ending = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        said = " | ".join(lines) or "it said nothing; perhaps memory ran out"
        return K1Error(f"{self.path}: ffmpeg {ending} after {self.frames} frames: {said}")

    def _clean_up(self) -> None:
        if self._encoder is not None:
            self._encoder.stop()
            self._encoder = None
        self._unfinished.close()

    def _arguments(self) -> list[str]:
        return [
            *("-hide_banner", "-nostats", "-loglevel", "warning", "-y"),
            *("-f", "rawvideo", "-pixel_format", "rgb24"),
            *("-video_size", f"{self._width}x{self._height}", "-framerate", f"{self._fps:g}"),
            *("-i", "pipe:0", "-f", "ffmetadata", "-i", f"file:{self._tags}"),
            *("-map", "0:v:0", "-map_metadata", "1", "-vf", _FILTERS),
            *("-c:v", "libx264", "-crf", str(self._crf), "-threads", str(ENCODER_THREADS)),
            *("-flags:v", "+bitexact", "-fflags", "+bitexact", "-movflags", "+faststart"),
            *("-f", "mp4", f"file:{self._temporary}"),
        ]


def _ffmetadata(comment: str) -> str:
    """ffmpeg's metadata file: a command line would be too short for long prompts."""
    for special in "\\=;#":
        comment = comment.replace(special, "\\" + special)
    return f";FFMETADATA1\ncomment={comment}\n"


def write_png(path: str | Path, frame: Frame, metadata: Mapping[str, Any]) -> None:
    """Write a picture with its metadata: chunk ``parameters`` for people, chunk ``k1`` as JSON.

    Args:
        path: the final name; it appears whole or not at all.
        frame: uint8 [H, W, 3] RGB.
        metadata: JSON-ready, from :func:`kandinsky5.output.metadata.describe`.

    Raises:
        ValueError: another shape or dtype.
        UserError: a path that cannot be written.
        DiskFull: too little room.
    """
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
        raise ValueError(f"frame {frame.dtype} {list(frame.shape)}; uint8 [H, W, 3] is wanted")
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(READABLE_CHUNK, readable(metadata))
    chunks.add_text(JSON_CHUNK, to_json(metadata))
    final = prepare_output(path, needed_bytes=frame.nbytes)
    with replacing(final, needed_bytes=frame.nbytes) as temporary, temporary.open("xb") as file:
        Image.fromarray(np.ascontiguousarray(frame)).save(file, "PNG", pnginfo=chunks)

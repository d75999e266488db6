"""Just enough of the MP4 container to read sizes, times and the comment back (ISO/IEC 14496-12).

Nothing is trusted: every box must lie within its parent, and no more is read than is asked for.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO

MAX_COMMENT_BYTES = 32 * 2**20
MAX_BOXES = 100_000
"""In one level; a fragmented stream of hours stays below."""

_CODEC_SIZE_OFFSET = 8 + 8 + 24
"""From the start of ``stsd``: its own fields, the entry's header, and what stands before width and height."""


class MalformedMp4(ValueError):
    """The bytes are not those of an MP4 file, or the file was cut short."""


@dataclass(frozen=True)
class Box:
    """A box of the file: its type and where its payload lies, in bytes from the start of the file."""

    kind: bytes
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class VideoTrack:
    """The first video track: size in pixels, number of frames, frame rate and length."""

    width: int
    height: int
    frames: int
    frames_per_second: Fraction
    duration_s: Fraction


def boxes(file: BinaryIO, start: int, end: int) -> Iterator[Box]:
    """The boxes that lie one behind the other from ``start`` to ``end``.

    Raises:
        MalformedMp4: a box is smaller than its own header or reaches beyond ``end``.
    """
    for _ in range(MAX_BOXES):
        if start >= end:
            return
        if end - start < 8 and not any(_read(file, start, end - start)):
            return  # QuickTime ends a list with four zero bytes
        size, kind = struct.unpack(">I4s", _read(file, start, 8))
        payload = start + 8
        if size == 1:
            (size,) = struct.unpack(">Q", _read(file, payload, 8))
            payload += 8
        elif size == 0:
            size = end - start
        if size < payload - start or size > end - start:
            raise MalformedMp4(f"box {kind!r} claims {size} bytes, {end - start} are left")
        yield Box(kind, payload, start + size)
        start += size
    raise MalformedMp4(f"more than {MAX_BOXES} boxes")


def layout(file: BinaryIO) -> tuple[str, ...]:
    """Types of the outermost boxes in order; raises :class:`MalformedMp4` when the file was cut short."""
    return tuple(box.kind.decode("latin-1") for box in boxes(file, 0, _size(file)))


def find_comment(file: BinaryIO) -> Box | None:
    """Where the text of the ``comment`` tag lies (moov/udta/meta/ilst/©cmt/data), or None."""
    meta = _descend(file, _moov(file), b"udta", b"meta")
    if meta is None:
        return None
    # ISO files put version and flags before the children, QuickTime's do not.
    iso = _read(file, meta.start + 4, 4) != b"hdlr"
    inside = Box(b"meta", meta.start + (4 if iso else 0), meta.end)
    data = _descend(file, inside, b"ilst", b"\xa9cmt", b"data")
    if data is None or data.size_bytes < 8:
        return None
    return Box(b"data", data.start + 8, data.end)


def read_comment(file: BinaryIO) -> bytes | None:
    """The bytes of the ``comment`` tag, or None; :class:`MalformedMp4` when there are more than 32 MiB."""
    found = find_comment(file)
    if found is None:
        return None
    if found.size_bytes > MAX_COMMENT_BYTES:
        raise MalformedMp4(f"a comment of {found.size_bytes} bytes")
    return _read(file, found.start, found.size_bytes)


def read_video_track(file: BinaryIO) -> VideoTrack:
    """Read the first video track; :class:`MalformedMp4` when there is none."""
    moov = _moov(file)
    for track in boxes(file, moov.start, moov.end):
        media = _descend(file, track, b"mdia") if track.kind == b"trak" else None
        handler = media and _descend(file, media, b"hdlr")
        if media and handler and _read(file, handler.start + 8, 4) == b"vide":
            return _track(file, media)
    raise MalformedMp4("no video track")


def _track(file: BinaryIO, media: Box) -> VideoTrack:
    timescale, duration = _media_times(file, media)
    table = _descend(file, media, b"minf", b"stbl")
    sizes = table and (_descend(file, table, b"stsz") or _descend(file, table, b"stz2"))
    codec = table and _descend(file, table, b"stsd")
    if not sizes or not codec:
        raise MalformedMp4("a video track without its tables")
    width, height = struct.unpack(">HH", _read(file, codec.start + _CODEC_SIZE_OFFSET, 4))
    (frames,) = struct.unpack(">I", _read(file, sizes.start + 8, 4))
    length = Fraction(duration, timescale)
    return VideoTrack(width, height, frames, frames / length if length else Fraction(0), length)


def _media_times(file: BinaryIO, media: Box) -> tuple[int, int]:
    """(timescale, duration) of ``mdhd``."""
    header = _descend(file, media, b"mdhd")
    if header is None:
        raise MalformedMp4("no media header")
    long = _read(file, header.start, 1) == b"\1"
    if long:
        timescale, duration = struct.unpack(">IQ", _read(file, header.start + 20, 12))
    else:
        timescale, duration = struct.unpack(">II", _read(file, header.start + 12, 8))
    if timescale == 0:
        raise MalformedMp4("a time scale of 0")
    return timescale, duration


def _moov(file: BinaryIO) -> Box:
    for box in boxes(file, 0, _size(file)):
        if box.kind == b"moov":
            return box
    raise MalformedMp4("no moov box: the recording was never finished")


def _descend(file: BinaryIO, box: Box | None, *path: bytes) -> Box | None:
    """Follow types downwards, the first of each; None where one is missing."""
    for kind in path:
        if box is None:
            return None
        box = next((child for child in boxes(file, box.start, box.end) if child.kind == kind), None)
    return box


def _size(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END)


def _read(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    data = file.read(count)
    if len(data) != count:
        raise MalformedMp4(f"cut short at byte {offset}")
    return data

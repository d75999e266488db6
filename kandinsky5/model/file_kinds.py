"""What a file is that is no .safetensors file, told from its first bytes."""

from __future__ import annotations

PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"})
PICKLE_REASON = "a pickle can run code; use .safetensors"

_IMAGE = "an image, not a checkpoint"
_ARCHIVE = "a compressed archive: unpack it and give the .safetensors inside"
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "a Git-LFS pointer, not the file itself: run git lfs pull, or download it again",
    ),
    (b"GGUF", "a GGUF file; K1 reads .safetensors: get the model in that format"),
    (b"PK\x03\x04", f"a zip archive, as pickled checkpoints are: {PICKLE_REASON}"),
    (b"\x89PNG\r\n\x1a\n", _IMAGE),
    (b"\xff\xd8\xff", _IMAGE),
    (b"GIF8", _IMAGE),
    (b"RIFF", "an image, sound or video, not a checkpoint"),
    (b"\x1f\x8b", _ARCHIVE),
    (b"7z\xbc\xaf\x27\x1c", _ARCHIVE),
    (b"Rar!", _ARCHIVE),
)


def kind_of(first: bytes) -> str | None:
    """What a file is whose first bytes are no safetensors header, or None when nothing is known of it."""
    for magic, kind in _MAGIC:
        if first.startswith(magic):
            return kind
    text = first.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            "a web page (HTML), not the file itself: log in where it is offered, download it again"
        )
    if text.startswith(b"{"):
        return "a JSON text, not a .safetensors file"
    if first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return PICKLE_REASON
    return None

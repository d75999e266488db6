"""What a file is that is no .safetensors file, told from its first bytes."""

from __future__ import annotations

import codecs
import re

PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"})
PICKLE_REASON = "a pickle can run code; use .safetensors"

_ARCHIVE = "a compressed archive: unpack it and give the .safetensors inside"
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "a GGUF file; K1 reads .safetensors: get the model in that format"),
    (b"PK\x03\x04", f"a zip archive, as pickled checkpoints are: {PICKLE_REASON}"),
    (b"\x1f\x8b", _ARCHIVE),
    (b"7z\xbc\xaf\x27\x1c", _ARCHIVE),
    (b"Rar!", _ARCHIVE),
    (b"BZh", _ARCHIVE),
    (b"\xfd7zXZ\x00", _ARCHIVE),
    (b"\x28\xb5\x2f\xfd", _ARCHIVE),
    (b"\x89HDF\r\n", "an HDF5 file; K1 reads .safetensors: get the model in that format"),
    (b"%PDF-", "a PDF document, not a checkpoint"),
)
_MEDIA: tuple[tuple[str, re.Pattern[bytes]], ...] = (
    ("an image (PNG)", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("an image (JPEG)", re.compile(rb"\xff\xd8\xff")),
    ("an image (GIF)", re.compile(rb"GIF8[79]a")),
    ("an image (WebP)", re.compile(rb"RIFF.{4}WEBP", re.DOTALL)),
    ("an image (TIFF)", re.compile(rb"II[*+]\x00|MM\x00[*+]")),
    # Two letters are few: the reserved bytes and the length of the header that follows tell a bitmap.
    (
        "an image (BMP)",
        re.compile(rb"BM.{4}\x00{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00", re.DOTALL),
    ),
    ("an image (AVIF)", re.compile(rb".{4}ftypavi[fs]", re.DOTALL)),
    ("an image (HEIF)", re.compile(rb".{4}ftyp(hei|hev|mif1|msf1)", re.DOTALL)),
    ("a video (MOV)", re.compile(rb".{4}(ftypqt  |(moov|mdat|wide|pnot).{4})", re.DOTALL)),
    ("a video (MP4)", re.compile(rb".{4}ftyp", re.DOTALL)),
    ("a video (MKV or WebM)", re.compile(rb"\x1aE\xdf\xa3")),
    ("a video (AVI)", re.compile(rb"RIFF.{4}AVI ", re.DOTALL)),
    ("a sound or video", re.compile(rb"RIFF|ID3|OggS")),
)
_PICKLE = re.compile(
    rb"\x80[\x02-\x05]"
    # Protocols 0 and 1 have no mark: containers, numbers and classes as they begin.
    rb"|\([dlt]p\d+\n|[\]})]q.|L\d+L\n\."
    rb"|\(?[ci][A-Za-z_][\w.]*\r?\n[A-Za-z_][\w.]*\r?\n[p(qtR.]"
    rb"|\([IVSFLK][^\n]{0,80}\n[IVSFL(dlt]",
    re.DOTALL,
)
_POINTER = "version https://git-lfs"
_BYTE_ORDERS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SHOWN_CHARACTERS = 60


def kind_of(first: bytes) -> str | None:
    """What a file is whose first bytes are no safetensors header, or None when nothing is known of it."""
    for magic, kind in _MAGIC:
        if first.startswith(magic):
            return kind
    for kind, pattern in _MEDIA:
        if pattern.match(first):
            return f"{kind}, not a checkpoint"
    if _PICKLE.match(first):
        return PICKLE_REASON
    return _kind_of_text(_text_of(first))


def _text_of(first: bytes) -> str:
    """The bytes as text, without blanks before it; empty when they are none."""
    encoding = next((name for mark, name in _BYTE_ORDERS if first.startswith(mark)), "utf-8")
    if first[1::2].strip(b"\x00") == b"":
        encoding = "utf-16-le"
    elif first[::2].strip(b"\x00") == b"":
        encoding = "utf-16-be"
    # The last character may be cut, of which an incremental decoder makes nothing.
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(first)
    except UnicodeDecodeError:
        return ""
    text = text.lstrip("\ufeff \t\r\n").rstrip("\0")  # a file cut off may go on in zeros
    return text if all(letter.isprintable() or letter in "\t\r\n" for letter in text) else ""


def _kind_of_text(text: str) -> str | None:
    shown = repr(" ".join(text.split())[:_SHOWN_CHARACTERS])
    if text.startswith(_POINTER):
        return "a Git-LFS pointer, not the file itself: run git lfs pull, or download it again"
    if re.match(r"(<\?xml[^>]*>\s*)?<svg", text):
        return "an image (SVG), not a checkpoint"
    if re.match(r"<[!?A-Za-z]", text):
        return (
            "a web page (HTML), not the file itself: log in where it is offered, download it again"
        )
    if re.match(r'\{|\[\s*["{\[\d\]]', text):
        return f"a JSON text (a server's error, a configuration), not a .safetensors file: {shown}"
    return f"a text, not a .safetensors file: {shown}" if text else None

"""Which checkpoint a source is, by what it holds: the same under any name, at any time, on any machine."""

from __future__ import annotations

import hashlib

from kandinsky5.model.checkpoint import Checkpoint

SAMPLE_BYTES = 64 << 10
"""Read at either end of every tensor: of Pro's 38.6 GB some 200 MB."""


def source_fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of a checkpoint's header and of both ends of every tensor, in hex.

    Whatever training or merging changes, changes it; numbers altered by hand in the middle of a large matrix
    do not. To be sure of every number, ``convert --verify`` compares them.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest = hashlib.sha256(checkpoint.header_sha256.encode("ascii"))
    sample = bytearray(SAMPLE_BYTES)
    for name in checkpoint.names_in_file_order():
        size = checkpoint.tensors[name].size_bytes
        first = min(size, SAMPLE_BYTES)
        last = min(size - first, SAMPLE_BYTES)
        for begin, count in ((0, first), (size - last, last)):
            part = memoryview(sample)[:count]
            checkpoint.read_into(name, part, begin)
            digest.update(part)
    return digest.hexdigest()

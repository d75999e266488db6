"""What a job asks of its checkpoints before it begins, told once while the files stay as they are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kandinsky5.model.checkpoint import Checkpoint, weights_of
from kandinsky5.model.dit import DiTConfig
from kandinsky5.model.file_stamp import FileStamp, file_stamp
from kandinsky5.model.reader import checked_model
from kandinsky5.model.weights import quantization_of

SAMPLED_TENSORS = 64
SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class TransformerFacts:
    """A transformer that can be loaded.

    Attributes:
        config: its dimensions.
        stored_as: its weights' format, as :attr:`kandinsky5.model.inspect.FileReport.quantization` says it.
    """

    config: DiTConfig
    stored_as: str


def transformer_facts(path: Path) -> TransformerFacts:
    """Told from headers alone.

    Args:
        path: as :class:`Checkpoint` takes it.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    found = weights_of(path)
    return _transformer_facts(found, file_stamp(found))


def fingerprint(path: Path) -> str:
    """SHA-256 of a checkpoint's header and of a few bytes of its tensors, in hex.

    Models tuned from one another have the same header and differ in nearly every tensor. All of a file's
    gigabytes are not read for it.

    Args:
        path: as :class:`Checkpoint` takes it.

    Raises:
        CheckpointError: it cannot be read.
    """
    found = weights_of(path)
    return _fingerprint(found, file_stamp(found))


@lru_cache(maxsize=8)
def _transformer_facts(path: Path, stamp: FileStamp) -> TransformerFacts:
    with Checkpoint(path) as checkpoint:
        config = checked_model(checkpoint)[0].config
        return TransformerFacts(config, quantization_of(checkpoint.tensors, checkpoint.metadata))


@lru_cache(maxsize=16)
def _fingerprint(path: Path, stamp: FileStamp) -> str:
    with Checkpoint(path) as checkpoint:
        digest = hashlib.sha256(checkpoint.header_sha256.encode("ascii"))
        names = list(checkpoint.names_in_file_order())
        for name in names[:: max(1, len(names) // SAMPLED_TENSORS)]:
            sample = bytearray(min(SAMPLE_BYTES, checkpoint.tensors[name].size_bytes))
            checkpoint.read_into(name, memoryview(sample))
            digest.update(sample)
        return digest.hexdigest()

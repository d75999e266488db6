"""What a job asks of its checkpoints before it begins, told once while the files stay as they are."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from kandinsky5.model.checkpoint import Checkpoint, weights_of
from kandinsky5.model.dit import DiTConfig
from kandinsky5.model.file_stamp import FileStamp, file_stamp
from kandinsky5.model.reader import checked_model
from kandinsky5.model.text_names import TOWER_NAMES
from kandinsky5.model.text_shapes import qwen_dimensions
from kandinsky5.model.weights import is_beside_weights, quantization_of

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


@dataclass(frozen=True)
class TextEncoderFacts:
    """Dimensions of a Qwen2.5-VL, told from the shapes of its tensors.

    Attributes:
        hidden, layers, key_value_dim, intermediate: of the language part.
        vocabulary: rows of the token table.
        vision_parameters: of the vision tower; 0 without one.
        tied: whether there is no output layer beside the table.
    """

    hidden: int
    layers: int
    key_value_dim: int
    intermediate: int
    vocabulary: int
    vision_parameters: int
    tied: bool


def text_encoder_facts(path: Path) -> TextEncoderFacts | None:
    """Told from headers alone; None where it is no such model, which whoever loads it explains.

    Args:
        path: a folder or a single file.

    Raises:
        CheckpointError: it cannot be read.
    """
    found = weights_of(path)
    return _text_encoder_facts(found, file_stamp(found))


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


@lru_cache(maxsize=8)
def _text_encoder_facts(path: Path, stamp: FileStamp) -> TextEncoderFacts | None:
    with Checkpoint(path) as checkpoint:
        stored = checkpoint.shapes
    shape = qwen_dimensions(stored)
    if shape is None:
        return None
    tower = [name for name in stored if TOWER_NAMES.match(name) and not is_beside_weights(name)]
    return TextEncoderFacts(
        **asdict(shape),
        vision_parameters=sum(math.prod(stored[name]) for name in tower),
        tied=not any(name.endswith("lm_head.weight") for name in stored),
    )


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

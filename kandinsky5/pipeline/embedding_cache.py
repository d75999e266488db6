"""What prompts came to, kept on disk: a prompt that is repeated loads no text encoder.

The key is a hash of all that decides the numbers: texts, template, limits, the picture the encoder sees, the
encoders' files as they are on disk, and what is computed in and on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kandinsky5.errors import CheckpointError
from kandinsky5.model.file_stamp import file_stamp
from kandinsky5.model.text import Conditioning
from kandinsky5.output.tensor_store import TensorStore
from kandinsky5.pipeline.denoise import Guidance
from kandinsky5.pipeline.job import PaintingJob
from kandinsky5.templates import EXPANSION_INSTRUCTIONS, PROMPT_TEMPLATES

VERSION = 1
"""Goes up when the same prompt comes to other numbers."""
MAX_TEXT_BYTES = 2**20


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/k1/embeddings``, else ``~/.cache/k1/embeddings``."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "k1" / "embeddings"


@dataclasses.dataclass(frozen=True)
class EncodedPrompts:
    """What the text encoders said of a request.

    Attributes:
        positive, negative: conditionings in main memory; negative is None without guidance.
        notices: for the user, of prompts that were cut.
    """

    positive: Conditioning
    negative: Conditioning | None
    notices: tuple[str, ...] = ()

    def guidance(self, scale: float, interval: tuple[float, float]) -> Guidance:
        """As the loop takes it."""
        if self.negative is None:
            return Guidance(self.positive)
        return Guidance(self.positive, self.negative, scale, interval=interval)


class EmbeddingCache:
    """Encoded and expanded prompts on disk.

    Args:
        store: where they are; None keeps nothing.
    """

    def __init__(self, store: TensorStore | None) -> None:
        self._store = store

    def encoded(self, key: str | None) -> EncodedPrompts | None:
        """What was kept under a key of :func:`encoding_key`, or None."""
        kept = self._load(key)
        if kept is None:
            return None
        notices = _json_of(kept.get("notices"))
        positive = _conditioning(kept, "positive")
        negative = _conditioning(kept, "negative")
        known = isinstance(notices, list) and all(isinstance(line, str) for line in notices)
        if positive is None or not known or (negative is None and "negative.text" in kept):
            return None
        return EncodedPrompts(positive, negative, tuple(notices))

    def keep_encoded(self, key: str | None, found: EncodedPrompts) -> None:
        """Keep what a key's prompts came to."""
        tensors = {"notices": _text_tensor(list(found.notices))}
        for name, part in (("positive", found.positive), ("negative", found.negative)):
            if part is not None:
                tensors |= {f"{name}.text": part.text, f"{name}.pooled": part.pooled}
        self._save(key, tensors)

    def expanded(self, key: str | None) -> str | None:
        """The rewritten prompt kept under a key of :func:`expansion_key`, or None."""
        text = _json_of((self._load(key) or {}).get("expanded"))
        return text if isinstance(text, str) and text else None

    def keep_expanded(self, key: str | None, text: str) -> None:
        """Keep a rewritten prompt."""
        self._save(key, {"expanded": _text_tensor(text)})

    def _load(self, key: str | None) -> dict[str, torch.Tensor] | None:
        return None if key is None or self._store is None else self._store.load(key)

    def _save(self, key: str | None, tensors: dict[str, torch.Tensor]) -> None:
        if key is not None and self._store is not None:
            self._store.save(key, tensors)


def encoding_key(
    job: PaintingJob, prompt: str, clip_prompt: str, picture: NDArray[np.uint8] | None
) -> str | None:
    """Of what a job's prompts come to; None where a file of the encoders is not there.

    Args:
        prompt: as it is encoded, expanded and with triggers.
        clip_prompt: as CLIP reads it.
        picture: that the encoder sees.
    """
    request, preset = job.request, job.preset
    assert request.guidance is not None
    guided = abs(request.guidance - 1.0) > 1e-6
    return _key(
        job,
        kind="encoded",
        weights=job.plan.text.encode.weights,
        template=dataclasses.astuple(PROMPT_TEMPLATES[preset.template]),
        limits=(preset.text_tokens, preset.clip_tokens),
        prompts=(prompt, clip_prompt, request.negative_prompt if guided else None),
        # what the notices of cut prompts were made of
        given=(job.expanded_prompt or request.prompt, request.clip_prompt),
        picture=_picture_hash(picture),
    )


def expansion_key(job: PaintingJob, picture: NDArray[np.uint8] | None) -> str | None:
    """Of what a job's prompt is rewritten to; None where a file of the encoder is not there."""
    return _key(
        job,
        kind="expanded",
        weights=None if job.plan.text.expand is None else job.plan.text.expand.weights,
        instruction=EXPANSION_INSTRUCTIONS[job.preset.mode],
        prompt=job.request.prompt,
        seed=job.request.seed,
        limit=job.preset.text_tokens,
        picture=_picture_hash(picture),
    )


def _key(job: PaintingJob, **parts: Any) -> str | None:
    files = job.files
    folders = (files.text_encoder, files.text_encoder_2, files.tokenizer, files.tokenizer_2)
    try:
        stamps = [(str(folder.resolve()), file_stamp(folder)) for folder in folders]
    except (CheckpointError, OSError):
        return None
    machine = (str(job.dtype), job.device.type, _device_name(job.device), torch.__version__)
    whole = {"version": VERSION, "files": stamps, "machine": machine, **parts}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _device_name(device: torch.device) -> str:
    """Another kind of card may round otherwise."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _picture_hash(picture: NDArray[np.uint8] | None) -> str | None:
    if picture is None:
        return None
    return hashlib.sha256(f"{picture.shape}".encode() + picture.tobytes()).hexdigest()


def _conditioning(kept: dict[str, torch.Tensor], name: str) -> Conditioning | None:
    """One conditioning, if it is there and is one."""
    text, pooled = kept.get(f"{name}.text"), kept.get(f"{name}.pooled")
    if text is None or pooled is None or (text.ndim, pooled.ndim) != (2, 1):
        return None
    for tensor in (text, pooled):
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            return None
    return Conditioning(text, pooled)


def _text_tensor(value: Any) -> torch.Tensor:
    """JSON as bytes, uint8; never empty."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def _json_of(tensor: torch.Tensor | None) -> Any:
    """What :func:`_text_tensor` was given; None where that is not what it is."""
    if tensor is None or tensor.dtype != torch.uint8 or tensor.numel() > MAX_TEXT_BYTES:
        return None
    try:
        return json.loads(bytes(tensor.flatten().numpy()))
    except (ValueError, RecursionError):
        return None

"""The library's configurations of text encoders, from a folder's ``config.json`` or a file's shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kandinsky5.errors import CheckpointError
from kandinsky5.model.checkpoint import Checkpoint, read_json
from kandinsky5.model.part_kinds import part_kind
from kandinsky5.model.text_shapes import clip_file_config, qwen_file_config

QWEN_TYPES = ("qwen2_5_vl", "qwen2_5_vl_text")
CLIP_TYPES = ("clip", "clip_text_model")
"""``model_type`` of the configurations that fit."""


def encoder_config(path: Path, types: tuple[str, ...]) -> Any:
    """The library's configuration of an encoder.

    Args:
        path: a folder, whose ``config.json`` tells, or a single file, whose shapes do.
        types: ``model_type`` of the configurations that fit, one of the tuples above.

    Raises:
        CheckpointError: missing, broken or of another model.
    """
    return _stated_config(path, types) if path.is_dir() else _deduced_config(path, types)


def _stated_config(folder: Path, types: tuple[str, ...]) -> Any:
    from transformers import AutoConfig

    path = folder / "config.json"
    found = read_json(path).get("model_type")
    if found not in types:
        raise CheckpointError(
            path, f"model_type {found!r}, but {' or '.join(types)} is needed here"
        )
    with quiet_library(path):
        return AutoConfig.from_pretrained(str(folder), local_files_only=True)


def _deduced_config(path: Path, types: tuple[str, ...]) -> Any:
    is_qwen = types[0] in QWEN_TYPES
    with Checkpoint(path) as checkpoint:
        config = (qwen_file_config if is_qwen else clip_file_config)(checkpoint.shapes)
        if config is None:
            found = part_kind(checkpoint.shapes)
            looks = "" if found is None else f" (looks like the {found.kind} {found.model})"
            needed = "Qwen2.5-VL" if is_qwen else "CLIP's text part"
            raise CheckpointError(checkpoint.path, f"not {needed}, which is needed here{looks}")
    return config


@contextmanager
def quiet_library(path: Path) -> Iterator[None]:
    """Keep transformers from printing; what it raises on broken files becomes one line about ``path``."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(path, f"cannot be used ({reason}); download it again") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

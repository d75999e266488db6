"""Text encoders from folders, in any layout they are published in, or single files; tokenizers from folders.

Of a single file the configuration is the published one, in the dimensions of its tensors. Weights in fp8
are multiplied by their scales as they are read.

transformers gives the classes; the weights are read by our own reader, which checks a file before it
trusts it, maps nothing into memory and holds one tensor at a time beside the model. Nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kandinsky5.errors import CheckpointError
from kandinsky5.model.checkpoint import Checkpoint, read_json
from kandinsky5.model.reader import put_tensor
from kandinsky5.model.recipes import float_rows
from kandinsky5.model.safetensors_file import shown
from kandinsky5.model.text_config import CLIP_TYPES, QWEN_TYPES, encoder_config, quiet_library
from kandinsky5.model.text_names import OUTER_NAMES, TOWER_NAMES, stored_names
from kandinsky5.model.weights import FLOAT8, FLOATS, stored_float

_PUBLISHED_PIXELS = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16384}
"""Of a picture as Qwen2.5-VL-7B-Instruct sees it; smaller and larger ones are scaled."""


def load_qwen(path: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The language part of Qwen2.5-VL as a frozen ``Qwen2_5_VLTextModel``.

    Args:
        path: a folder with config.json and weights, or a single file.
        device: where the weights go.
        dtype: of all of them, whatever the file has.

    Raises:
        CheckpointError: missing, broken or of another model.
    """
    with EncoderReader.of_qwen(path, dtype=dtype) as reader:
        return reader.load(device)


def load_vision_tower(path: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The part of Qwen2.5-VL that sees, as a frozen ``Qwen2_5_VisionTransformerPretrainedModel``.

    Arguments as for :func:`load_qwen`.

    Raises:
        CheckpointError: missing, broken, of another model, or without a vision tower.
    """
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    tower = qwen.Qwen2_5_VisionTransformerPretrainedModel
    with EncoderReader(
        tower, path, QWEN_TYPES[:1], dtype=dtype, part="vision_config", outer=TOWER_NAMES
    ) as reader:
        return reader.load(device)


def without_parts(path: Path) -> Any:
    """A ``Qwen2_5_VLModel`` of an encoder's dimensions that joins a tower and a language part.

    Args:
        path: a folder or a single file.

    Raises:
        CheckpointError: the folder's config.json, or the file, is missing, broken or of another model.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    model = _without_weights(Qwen2_5_VLModel, path, QWEN_TYPES[:1], part=None).eval()
    model.visual = model.language_model = None
    return model


def load_picture_processor(folder: Path) -> Any:
    """What makes patches of a picture, by PIL; the published settings where the folder, or file, has none.

    Raises:
        CheckpointError: its preprocessor_config.json cannot be used.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return Qwen2VLImageProcessorPil(**_PUBLISHED_PIXELS)
    read_json(path)  # on broken JSON the library's own error names no file
    with quiet_library(path):
        return Qwen2VLImageProcessorPil.from_pretrained(str(folder), local_files_only=True)


def load_clip(path: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The text part of CLIP as a frozen ``CLIPTextModel``.

    Arguments as for :func:`load_qwen`.

    Raises:
        CheckpointError: missing, broken or of another model.
    """
    from transformers import CLIPTextModel

    with EncoderReader(CLIPTextModel, path, CLIP_TYPES, dtype=dtype) as reader:
        return reader.load(device)


def load_qwen_tokenizer(folder: Path) -> Any:
    """Qwen's tokenizer.

    Raises:
        CheckpointError: a file is missing or broken, or the templates' marks are unknown to it.
    """
    from transformers import Qwen2Tokenizer

    tokenizer = _load_tokenizer(Qwen2Tokenizer, folder)
    if len(tokenizer("<|im_start|><|im_end|>")["input_ids"]) != 2:
        raise CheckpointError(
            folder, "does not know <|im_start|> and <|im_end|>; use the tokenizer of Qwen2.5-VL"
        )
    return tokenizer


def load_clip_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    from transformers import CLIPTokenizer

    return _load_tokenizer(CLIPTokenizer, folder)


def check_vocabulary(tokenizer: Any, encoder: Any, folder: Path) -> None:
    """Refuse a tokenizer, read from ``folder``, whose tokens the encoder does not have."""
    if len(tokenizer) > encoder.config.vocab_size:
        raise CheckpointError(
            folder,
            f"a tokenizer of {len(tokenizer)} tokens for a text encoder of "
            f"{encoder.config.vocab_size}; take both from the same model",
        )


def _load_tokenizer(tokenizer_class: Any, folder: Path) -> Any:
    """A tokenizer from ``tokenizer.json``, or from ``vocab.json`` and ``merges.txt``."""
    if not folder.is_dir():
        raise CheckpointError(folder, "no such folder; it should hold a tokenizer")
    whole = (folder / "tokenizer.json").is_file()
    for name in () if whole else ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise CheckpointError(folder / name, "missing; download the tokenizer's folder again")
    # The tokenizers library raises bare exceptions on broken JSON; reading it first names the file.
    for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    with quiet_library(folder):
        return tokenizer_class.from_pretrained(str(folder), local_files_only=True)


class EncoderReader:
    """A checked encoder without its weights, and the weights in their file. Close it, or use ``with``.

    Args:
        model_class: of transformers, made of the encoder's configuration.
        path: a folder with config.json and weights, or a single file.
        types: ``model_type`` of the configurations that fit.
        dtype: of the weights.
        part: of the configuration, where it has it.
        outer: matches what a saver may put before the model's own names; other tensors are not its.

    Attributes:
        model: parameters on the meta device, its few buffers as computed, on the CPU.

    Raises:
        CheckpointError: it is missing, broken or of another model.
    """

    def __init__(
        self,
        model_class: Any,
        path: Path,
        types: tuple[str, ...],
        *,
        dtype: torch.dtype,
        part: str = "text_config",
        outer: re.Pattern[str] = OUTER_NAMES,
    ) -> None:
        if not path.exists():
            raise CheckpointError(path, "no such folder; it should hold a text encoder")
        model = _without_weights(model_class, path, types, part)
        self._checkpoint = Checkpoint(path)
        self._dtype = dtype
        try:
            names = stored_names(outer, self._checkpoint.tensors)
            _check_weights(model, self._checkpoint, names)
        except BaseException:
            self.close()
            raise
        self._places = {ours: names[ours] for ours in model.state_dict()}
        for ours in self._places:
            put_tensor(model, ours, torch.empty_like(model.get_parameter(ours), dtype=dtype))
        self.model = model.eval()

    @classmethod
    def of_qwen(cls, path: Path, *, dtype: torch.dtype) -> EncoderReader:
        """The language part of Qwen2.5-VL, as :func:`load_qwen` gives it."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

        return cls(Qwen2_5_VLTextModel, path, QWEN_TYPES, dtype=dtype)

    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill tensors of main memory; several threads may do so at once.

        Args:
            targets: name in ``model.state_dict()`` → tensor of that shape and any floating dtype.

        Raises:
            CheckpointError: the file cannot be read, has become shorter or is another one by now.
        """
        done: set[str] = set()
        for name in targets:
            if name in done:
                continue
            for made, tensor in self._made_of(name).items():
                done.add(made)
                if made in targets:
                    targets[made].copy_(tensor)
        self._checkpoint.check_unchanged()

    def load(self, device: torch.device) -> Any:
        """The model with all its weights on a device, one at a time from the file."""
        expected = self.model.state_dict()
        ours = {stored: name for name, stored in self._places.items()}
        for stored in self._checkpoint.names_in_file_order():
            if name := ours.get(stored):
                for made, tensor in self._made_of(name).items():
                    there = tensor.to(device=device, dtype=expected[made].dtype)
                    put_tensor(self.model, made, there)
        return self.model.to(device)  # only its few buffers are still to move

    def _made_of(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of the model that are made of the stored one that ``name`` is made of."""
        return {name: self._stored_weight(name)}

    def _stored_weight(self, name: str) -> torch.Tensor:
        """The stored tensor that ``name`` is made of, as floats of 16 bits or more."""
        return float_weight(self._checkpoint, self._places[name], self._dtype)

    def close(self) -> None:
        """Let go of the file."""
        self._checkpoint.close()

    def __enter__(self) -> EncoderReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def float_weight(checkpoint: Checkpoint, stored: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a file as it is, or in ``dtype`` where it is float8, with or without a scale.

    Raises:
        CheckpointError: the file cannot be read, or has it in another format.
    """
    tensor = stored_float(checkpoint, stored)
    if tensor.is_plain:
        return checkpoint.read(stored)
    whole = torch.empty(tensor.info.shape, dtype=dtype)
    for first, rows in float_rows(checkpoint, tensor):
        whole[first : first + len(rows)].copy_(rows)
    return whole


def _without_weights(model_class: Any, path: Path, types: tuple[str, ...], part: str | None) -> Any:
    """The model of a folder or file: parameters on the meta device, buffers as computed.

    ``part`` names the part of the configuration it is made of; where there is none, it is made of the whole.
    """
    from accelerate import init_empty_weights

    config = encoder_config(path, types)
    named = path / "config.json" if path.is_dir() else path
    with quiet_library(named), init_empty_weights(include_buffers=False):
        return model_class(config if part is None else getattr(config, part, config))


def _check_weights(model: nn.Module, checkpoint: Checkpoint, places: dict[str, str]) -> None:
    """Refuse a checkpoint that lacks a weight or has it in another shape, before any is read."""
    needed = model.state_dict()
    if missing := sorted(set(needed) - set(places)):
        raise CheckpointError(
            checkpoint.path,
            f"{len(missing)} of {len(needed)} weights missing, {missing[0]} first; download it again",
        )
    for ours, tensor in needed.items():
        info = checkpoint.tensors[places[ours]]
        if info.shape != tuple(tensor.shape):
            raise CheckpointError(
                checkpoint.path,
                f"{shown(places[ours])} has shape {list(info.shape)}, by its configuration "
                f"{list(tensor.shape)}; download both again",
            )
        if info.dtype not in FLOATS | FLOAT8:
            raise CheckpointError(
                checkpoint.path,
                f"{shown(places[ours])} has dtype {info.dtype}; weights in bf16, fp16, fp32 or fp8 "
                "are needed",
            )
        stored_float(checkpoint, places[ours])

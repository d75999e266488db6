"""Prompts to conditioning: Qwen2.5-VL reads the templated prompt token by token, CLIP as a whole.

The published code pads the prompt to its limit on the right and masks the padding everywhere. Both
encoders are causal, so a token never sees what follows it: without the padding the numbers are the same
and the work is less. Only the language part of Qwen2.5-VL is loaded; neither its vision tower nor its
output layer take part in conditioning.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from kandinsky5.errors import CheckpointError, UserError
from kandinsky5.templates import PromptTemplate

if TYPE_CHECKING:
    from kandinsky5.model.loading import ModelFiles

QWEN_TYPES = ("qwen2_5_vl", "qwen2_5_vl_text")
CLIP_TYPES = ("clip", "clip_text_model")
"""``model_type`` of the ``config.json`` files that fit."""

LATER_QWEN_NAMES = {r"^model\.language_model\.": "model."}
"""Some savers put the language part under a name of its own; the published files do not."""


@dataclass(frozen=True)
class Conditioning:
    """What a prompt tells the transformer.

    Attributes:
        text: one vector per token, float32 [L, text_dim], L ≥ 1.
        pooled: one vector for the whole prompt, float32 [pooled_dim].
    """

    text: torch.Tensor
    pooled: torch.Tensor


@dataclass(frozen=True)
class TokenCount:
    """How long a prompt is, and how much of it the model will read."""

    tokens: int
    kept: int


class TextEncoders:
    """Both encoders with their tokenizers, ready on one device.

    Args:
        qwen: the language part of Qwen2.5-VL.
        qwen_tokenizer: its tokenizer.
        clip: the text part of CLIP.
        clip_tokenizer: its tokenizer.
    """

    def __init__(self, qwen: Any, qwen_tokenizer: Any, clip: Any, clip_tokenizer: Any) -> None:
        self._qwen, self._qwen_tokenizer = qwen, qwen_tokenizer
        self._clip, self._clip_tokenizer = clip, clip_tokenizer

    @classmethod
    def load(cls, files: ModelFiles, *, device: torch.device, dtype: torch.dtype) -> TextEncoders:
        """Read both encoders from local folders; nothing is downloaded.

        Args:
            files: folders of the encoders and of their tokenizers, which may be the same ones.
            device: where the weights go, straight from the files.
            dtype: of Qwen's weights. CLIP is small and stays float32, as published.

        Raises:
            CheckpointError: a folder or file is missing, broken or of another model.
        """
        from transformers import CLIPTextModel, CLIPTokenizer, Qwen2Tokenizer
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

        for folder, types in ((files.text_encoder, QWEN_TYPES), (files.text_encoder_2, CLIP_TYPES)):
            _check_encoder_folder(folder, types)
        qwen_tokenizer = _load_tokenizer(Qwen2Tokenizer, files.tokenizer)
        clip_tokenizer = _load_tokenizer(CLIPTokenizer, files.tokenizer_2)
        qwen = _load_encoder(
            Qwen2_5_VLTextModel,
            files.text_encoder,
            device=device,
            dtype=dtype,
            key_mapping=LATER_QWEN_NAMES,
        )
        clip = _load_encoder(
            CLIPTextModel, files.text_encoder_2, device=device, dtype=torch.float32
        )
        for tokenizer, model, folder in (
            (qwen_tokenizer, qwen, files.tokenizer),
            (clip_tokenizer, clip, files.tokenizer_2),
        ):
            if len(tokenizer) > model.config.vocab_size:
                raise CheckpointError(
                    folder,
                    f"a tokenizer of {len(tokenizer)} tokens for a text encoder of "
                    f"{model.config.vocab_size}; take both from the same model",
                )
        if len(qwen_tokenizer("<|im_start|><|im_end|>")["input_ids"]) != 2:
            raise CheckpointError(
                files.tokenizer,
                "does not know <|im_start|> and <|im_end|>; use the tokenizer of Qwen2.5-VL",
            )
        return cls(qwen, qwen_tokenizer, clip, clip_tokenizer)

    @torch.inference_mode()
    def encode(
        self,
        prompt: str,
        clip_prompt: str,
        template: PromptTemplate,
        max_tokens: int,
        clip_tokens: int = 77,
    ) -> Conditioning:
        """Conditioning of one prompt.

        Args:
            prompt: for Qwen, inside the template; cut when longer than the limit, and the end of the
                template with it, as published.
            clip_prompt: for CLIP, as it is.
            template: the preset's.
            max_tokens: limit after the template's first ``crop_start`` positions.
            clip_tokens: CLIP reads exactly so many, padded or cut.

        Returns:
            At most ``max_tokens`` vectors and the pooled one, on the encoders' device.

        Raises:
            UserError: the template leaves nothing of so short a prompt.
        """
        ids = self.qwen_ids(prompt, template, max_tokens)
        if len(ids) <= template.crop_start:
            raise UserError("prompt", prompt, "too short for this model; write a few words more")
        qwen_ids = torch.tensor([ids], device=self._qwen.device)
        hidden = self._qwen(input_ids=qwen_ids, use_cache=False).last_hidden_state
        clip_ids = self.clip_ids(clip_prompt, clip_tokens)
        clip_inputs = {
            name: torch.tensor([clip_ids[name]], device=self._clip.device)
            for name in ("input_ids", "attention_mask")
        }
        pooled = self._clip(**clip_inputs).pooler_output
        return Conditioning(hidden[0, template.crop_start :].float(), pooled[0].float())

    def qwen_ids(self, prompt: str, template: PromptTemplate, max_tokens: int) -> list[int]:
        """Token ids of prompt and template, at most ``crop_start + max_tokens``."""
        limit = template.crop_start + max_tokens
        text = template.fill(_well_formed(prompt))
        return self._qwen_tokenizer(text, truncation=True, max_length=limit)["input_ids"]

    def clip_ids(self, prompt: str, clip_tokens: int = 77) -> dict[str, list[int]]:
        """``input_ids`` and ``attention_mask`` of exactly ``clip_tokens`` positions."""
        return self._clip_tokenizer(
            _well_formed(prompt),
            truncation=True,
            max_length=clip_tokens,
            padding="max_length",
            add_special_tokens=True,
        )

    def token_count(self, prompt: str, template: PromptTemplate, max_tokens: int) -> TokenCount:
        """Qwen's tokens of the prompt itself, and how many of them come before the limit."""

        def length(text: str) -> int:
            return len(self._qwen_tokenizer(text)["input_ids"])

        tokens = length(template.fill(_well_formed(prompt))) - length(template.fill(""))
        before = length(template.text.split("{}")[0])
        return TokenCount(tokens, min(tokens, template.crop_start + max_tokens - before))


def _well_formed(prompt: str) -> str:
    """The prompt with halves of UTF-16 pairs joined, or replaced when alone; tokenizers need it."""
    return prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _check_encoder_folder(folder: Path, types: tuple[str, ...]) -> None:
    """Refuse a folder that cannot hold the encoder before anything large is read."""
    if not folder.is_dir():
        raise CheckpointError(folder, "no such folder; it should hold a text encoder")
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(config, "missing; download the text encoder's folder again")
    found = _read_json(config).get("model_type")
    if found not in types:
        raise CheckpointError(
            config, f"model_type {found!r}, but {' or '.join(types)} is needed here"
        )
    if not any(folder.glob("*.safetensors")):
        pickled = any(any(folder.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth"))
        raise CheckpointError(
            folder,
            "has only pickled weights, which can run code and are not read; get .safetensors files"
            if pickled
            else "has no .safetensors files; download the text encoder again",
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
            _read_json(folder / name)
    with _loading(folder):
        return tokenizer_class.from_pretrained(str(folder), local_files_only=True)


def _load_encoder(
    model_class: Any, folder: Path, *, device: torch.device, dtype: torch.dtype, **options: Any
) -> Any:
    """A frozen encoder with every one of its weights read from the folder."""
    if device.type != "cpu":
        options["device_map"] = {"": device}
    with _loading(folder):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        # Names and shapes are judged below: transformers would make up what is missing.
        model, report = model_class.from_pretrained(
            str(folder),
            config=getattr(config, "text_config", config),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    if report["missing_keys"]:
        name = min(report["missing_keys"])
        raise CheckpointError(
            folder,
            f"{len(report['missing_keys'])} weights missing, {name} among them; download it again",
        )
    if report["mismatched_keys"]:
        name = min(str(key) for key, *_ in report["mismatched_keys"])
        raise CheckpointError(folder, f"the shape of {name} is not what its config.json says")
    return model.eval().requires_grad_(False)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"unreadable ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(path, "not a JSON object; download it again")
    return content


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Keep transformers from printing, and turn what it raises on broken files into one line."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(folder, f"cannot be read ({reason}); download it again") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

"""Prompts to conditioning: Qwen2.5-VL reads the templated prompt token by token, CLIP as a whole.

The published code pads the prompt to its limit on the right and masks the padding everywhere. Both
encoders are causal, so a token never sees what follows it: without the padding the numbers are the same
and the work is less. Of Qwen2.5-VL the language part is loaded and, where it is to see a picture that shall
be edited, its vision tower (:mod:`kandinsky5.model.text_picture`); its output layer takes no part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kandinsky5.errors import UserError
from kandinsky5.model.text_generation import OutputLayer, Writer
from kandinsky5.model.text_loading import (
    check_vocabulary,
    load_clip,
    load_clip_tokenizer,
    load_qwen,
    load_qwen_tokenizer,
)
from kandinsky5.model.token_count import (
    TokenCount,
    Tokenize,
    clip_count,
    qwen_count,
    well_formed,
)
from kandinsky5.templates import PromptTemplate

if TYPE_CHECKING:
    from kandinsky5.model.files import ModelFiles
    from kandinsky5.model.text_picture import Sight


@dataclass(frozen=True)
class Conditioning:
    """What a prompt tells the transformer.

    Attributes:
        text: one vector per token, float32 [L, text_dim], L ≥ 1.
        pooled: one vector for the whole prompt, float32 [pooled_dim].
    """

    text: torch.Tensor
    pooled: torch.Tensor


class TextEncoders:
    """Both encoders with their tokenizers, ready on one device.

    Args:
        qwen: the language part of Qwen2.5-VL.
        qwen_tokenizer: its tokenizer.
        clip: the text part of CLIP.
        clip_tokenizer: its tokenizer.
        sight: Qwen's vision, where it is to see pictures.
    """

    def __init__(
        self,
        qwen: Any,
        qwen_tokenizer: Any,
        clip: Any,
        clip_tokenizer: Any,
        sight: Sight | None = None,
    ) -> None:
        self._qwen, self._qwen_tokenizer = qwen, qwen_tokenizer
        self._clip, self._clip_tokenizer = clip, clip_tokenizer
        self._sight = sight

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        *,
        device: torch.device,
        dtype: torch.dtype,
        qwen: Callable[[], Any] | None = None,
        sight: Sight | None = None,
    ) -> TextEncoders:
        """Read both encoders from local folders; nothing is downloaded.

        Args:
            files: folders of the encoders and of their tokenizers, which may be the same ones.
            device: where the weights go, straight from the files.
            dtype: of Qwen's weights. CLIP is small and stays float32, as published.
            qwen: gives the language part where somebody else brings its weights; None reads it.
            sight: Qwen's vision, where it is to see pictures.

        Raises:
            CheckpointError: a folder or file is missing, broken or of another model.
        """
        qwen_tokenizer = load_qwen_tokenizer(files.tokenizer)
        clip_tokenizer = load_clip_tokenizer(files.tokenizer_2)
        clip = load_clip(files.text_encoder_2, device=device, dtype=torch.float32)
        check_vocabulary(clip_tokenizer, clip, files.tokenizer_2)
        if qwen is None:
            language = load_qwen(files.text_encoder, device=device, dtype=dtype)
        else:
            language = qwen()
        check_vocabulary(qwen_tokenizer, language, files.tokenizer)
        if sight is not None:
            sight.check_tokenizer(qwen_tokenizer, files.tokenizer)
        return cls(language, qwen_tokenizer, clip, clip_tokenizer, sight)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All that has weights, for who moves them."""
        encoders = (self._qwen, self._clip)
        return encoders if self._sight is None else (*encoders, self._sight.tower)

    @torch.inference_mode()
    def encode(
        self,
        prompt: str,
        clip_prompt: str,
        template: PromptTemplate,
        max_tokens: int,
        clip_tokens: int = 77,
        picture: NDArray[np.uint8] | None = None,
    ) -> Conditioning:
        """Conditioning of one prompt.

        Args:
            prompt: for Qwen, inside the template; cut when longer than the limit, and the end of the
                template with it, as published.
            clip_prompt: for CLIP, as it is.
            template: the preset's.
            max_tokens: limit after the template's first ``crop_start`` positions.
            clip_tokens: CLIP reads exactly so many, padded or cut.
            picture: uint8 [H, W, 3] that Qwen sees after the prompt; needs ``sight``.

        Returns:
            At most ``max_tokens`` vectors, those of the picture not counted, and the pooled one, on the
            encoders' device.

        Raises:
            UserError: the template leaves nothing of so short a prompt.
        """
        hidden = self._hidden(self.qwen_ids(prompt, template, max_tokens), picture)
        if len(hidden) <= template.crop_start:
            raise UserError("prompt", prompt, "too short for this model; write a few words more")
        clip_ids = self.clip_ids(clip_prompt, clip_tokens)
        clip_inputs = {
            name: torch.tensor([clip_ids[name]], device=self._clip.device)
            for name in ("input_ids", "attention_mask")
        }
        pooled = self._clip(**clip_inputs).pooler_output
        return Conditioning(hidden[template.crop_start :].float(), pooled[0].float())

    def _hidden(self, ids: list[int], picture: NDArray[np.uint8] | None) -> torch.Tensor:
        """Qwen's last hidden state [L, hidden]."""
        if picture is not None:
            if self._sight is None:
                raise ValueError("a picture for encoders that were loaded without sight")
            return self._sight.hidden(self._qwen, self._qwen_tokenizer, ids, picture)
        qwen_ids = torch.tensor([ids], device=self._qwen.device)
        return self._qwen(input_ids=qwen_ids, use_cache=False).last_hidden_state[0]

    def writer(self, layer: OutputLayer | None, sight: Sight | None = None) -> Writer:
        """Qwen as one who answers; see :class:`~kandinsky5.model.text_generation.Writer`.

        Args:
            sight: where these encoders were loaded without.
        """
        return Writer(self._qwen, self._qwen_tokenizer, layer, self._sight or sight)

    def qwen_ids(self, prompt: str, template: PromptTemplate, max_tokens: int) -> list[int]:
        """Token ids of prompt and template, at most ``crop_start + max_tokens``."""
        limit = template.crop_start + max_tokens
        text = template.fill(well_formed(prompt))
        return self._qwen_tokenizer(text, truncation=True, max_length=limit)["input_ids"]

    def clip_ids(self, prompt: str, clip_tokens: int = 77) -> dict[str, list[int]]:
        """``input_ids`` and ``attention_mask`` of exactly ``clip_tokens`` positions."""
        return self._clip_tokenizer(
            well_formed(prompt),
            truncation=True,
            max_length=clip_tokens,
            padding="max_length",
            add_special_tokens=True,
        )

    def token_count(self, prompt: str, template: PromptTemplate, max_tokens: int) -> TokenCount:
        """Qwen's tokens of the prompt itself, and how many of them come before the limit."""
        return qwen_count(_offsets_by(self._qwen_tokenizer), prompt, template, max_tokens)

    def clip_token_count(self, prompt: str, clip_tokens: int = 77) -> TokenCount:
        """The same for CLIP, which reads ``clip_tokens`` with its marks of start and end."""
        return clip_count(_offsets_by(self._clip_tokenizer), prompt, clip_tokens)


def _offsets_by(tokenizer: Any) -> Tokenize:
    return lambda text: tokenizer(text, return_offsets_mapping=True)["offset_mapping"]

"""Qwen2.5-VL with its eyes open: what it makes of a prompt that ends in a picture.

The vision tower is read and kept apart from the language part, which may be streamed meanwhile; the
library's own model joins the two, so that placeholders, masks and three-axis positions are the library's.
The picture is prepared by the library's PIL path: torchvision is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kandinsky5.errors import CheckpointError
from kandinsky5.model.text_loading import load_picture_processor, load_vision_tower, without_parts

BEFORE, PLACEHOLDER, AFTER = "<|vision_start|>", "<|image_pad|>", "<|vision_end|><|im_end|>"
"""What stands after the prompt (kandinskylab's text embedder): the picture, and the end of the turn."""


class Sight:
    """The vision tower, and what a picture has to become for it.

    Args:
        tower: ``Qwen2_5_VisionTransformerPretrainedModel``.
        model: a ``Qwen2_5_VLModel`` without weights; it is given its parts when it is used.
        processor: makes patches of a picture.
    """

    def __init__(self, tower: nn.Module, model: Any, processor: Any) -> None:
        self.tower = tower
        self._model, self._processor = model, processor

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype) -> Sight:
        """Read the vision tower of a text encoder's folder.

        Raises:
            CheckpointError: the folder is missing, broken, or holds no vision tower.
        """
        tower = load_vision_tower(folder, device=device, dtype=dtype)
        return cls(tower, without_parts(folder), load_picture_processor(folder))

    def check_tokenizer(self, tokenizer: Any, folder: Path) -> None:
        """Refuse a tokenizer, read from ``folder``, that has no tokens for pictures.

        Raises:
            CheckpointError: one of the marks is unknown to it.
        """
        placeholder = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
        marks = tokenizer(BEFORE + PLACEHOLDER + AFTER)["input_ids"]
        if placeholder != self._model.config.image_token_id or len(marks) != 4:
            raise CheckpointError(
                folder,
                f"does not know {BEFORE} and {PLACEHOLDER}; use the tokenizer of Qwen2.5-VL",
            )

    @torch.inference_mode()
    def hidden(
        self, language: Any, tokenizer: Any, prompt_ids: list[int], picture: NDArray[np.uint8]
    ) -> torch.Tensor:
        """Last hidden state of a prompt followed by a picture.

        Args:
            language: the language part, ``Qwen2_5_VLTextModel``.
            tokenizer: its tokenizer.
            prompt_ids: token ids of the templated prompt, which leaves the turn open.
            picture: uint8 [H, W, 3], in the size that is to be seen; it is brought to the next multiples of
                28 pixels a side.

        Returns:
            [L, hidden], L = prompt + one position for each 28×28 pixels + 3 marks.
        """
        return self._read(language, tokenizer, prompt_ids, picture).last_hidden_state[0]

    @torch.inference_mode()
    def read(
        self,
        language: Any,
        tokenizer: Any,
        prompt_ids: list[int],
        picture: NDArray[np.uint8],
        *,
        then: list[int],
    ) -> tuple[Any, int]:
        """As :meth:`hidden`, with what is needed to go on writing.

        Args:
            then: token ids after the marks.

        Returns:
            The model's output with its keys and values, and how far the position of a token that follows
            is ahead of the count of tokens before it (below 0: a picture takes few positions).
        """
        read = self._read(language, tokenizer, prompt_ids, picture, then=then, use_cache=True)
        return read, int(self._model.rope_deltas)

    def _read(
        self,
        language: Any,
        tokenizer: Any,
        prompt_ids: list[int],
        picture: NDArray[np.uint8],
        *,
        then: Sequence[int] = (),
        use_cache: bool = False,
    ) -> Any:
        config = self._model.config
        marks_of_pictures = (config.image_token_id, config.video_token_id)
        # Typed into a prompt they would count as pictures that nobody gave.
        prompt_ids = [number for number in prompt_ids if number not in marks_of_pictures]
        seen = self._processor(images=picture, return_tensors="pt")
        grid = seen["image_grid_thw"]
        cells = int(grid.prod()) // self._processor.merge_size**2
        marks = tokenizer(BEFORE + PLACEHOLDER * cells + AFTER)["input_ids"]
        # A streamed language part has its token table in main memory; the tower is where it computes.
        device = next(self.tower.parameters()).device
        ids = torch.tensor([[*prompt_ids, *marks, *then]], device=device)
        model = self._model
        model.visual, model.language_model = self.tower, language
        try:
            return model(
                input_ids=ids,
                mm_token_type_ids=(ids == config.image_token_id).int(),
                pixel_values=seen["pixel_values"].to(device),
                image_grid_thw=grid.to(device),
                use_cache=use_cache,
            )
        finally:
            model.visual = model.language_model = None

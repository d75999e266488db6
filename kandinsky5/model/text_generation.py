"""Qwen2.5-VL writing: one token after another, what it has read kept as keys and values.

Of the generation library nothing is used: the loop is short, tells each token as it comes, can be stopped
between two, and draws with a generator on the CPU, so that one seed gives one text on every device that
gives the same logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kandinsky5.errors import CheckpointError
from kandinsky5.model.checkpoint import Checkpoint, read_json
from kandinsky5.model.text_loading import float_weight
from kandinsky5.model.token_count import well_formed

if TYPE_CHECKING:
    from kandinsky5.model.text_picture import Sight

CHAT_HEAD = "<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n"
END_OF_TURN = "<|im_end|>"
ANSWER = "\n<|im_start|>assistant\n"
"""Qwen's form of a conversation: what stands before the user's words, and after them."""

TEMPERATURE, CANDIDATES, REPETITION_PENALTY = 0.7, 20, 1.05
"""How a token is drawn: softened, among the likeliest, with those already written a little less likely."""

_OUTPUT_LAYER = "lm_head.weight"


class OutputLayer(nn.Module):
    """Hidden state [hidden] → logits [vocabulary], float32.

    Args:
        weight: [vocabulary, hidden].
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return logits_of(self.weight, hidden)

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype) -> OutputLayer | None:
        """Read the layer of a text encoder's folder; None where it is tied to the table of embeddings.

        Raises:
            CheckpointError: the folder holds none that could be used; :func:`can_write` tells before.
        """
        with Checkpoint(folder) as checkpoint:
            name = _name_in(checkpoint)
            if name is None:
                if _is_tied(folder):
                    return None
                raise CheckpointError(folder, "has no output layer (lm_head): it cannot write")
            weight = float_weight(checkpoint, name, dtype)
            return cls(weight.to(device=device, dtype=dtype))


def can_write(folder: Path) -> bool:
    """Whether a text encoder's folder has an output layer of its own, or one tied to its embeddings.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    with Checkpoint(folder) as checkpoint:
        return _name_in(checkpoint) is not None or _is_tied(folder)


def _name_in(checkpoint: Checkpoint) -> str | None:
    names = (name for name in checkpoint.tensors if name.endswith(_OUTPUT_LAYER))
    return next((name for name in names if len(checkpoint.tensors[name].shape) == 2), None)


def _is_tied(folder: Path) -> bool:
    if not folder.is_dir():  # a single file says nothing of it; the published model's is its own
        return False
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return bool(config.get("tie_word_embeddings", inner))


def logits_of(weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """weight [vocabulary, hidden] · hidden [hidden], float32, computed where the weight is."""
    return nn.functional.linear(hidden.to(weight), weight).float()


class Writer:
    """Qwen with its tokenizer and its way from a hidden state to a token.

    Args:
        qwen: the language part, ``Qwen2_5_VLTextModel``.
        tokenizer: its tokenizer.
        layer: the output layer; None takes the table of embeddings.
        sight: Qwen's vision, where it is to see pictures.
    """

    def __init__(
        self, qwen: Any, tokenizer: Any, layer: OutputLayer | None, sight: Sight | None = None
    ) -> None:
        self._qwen, self._tokenizer, self._layer, self._sight = qwen, tokenizer, layer, sight

    def answer(
        self,
        instruction: str,
        prompt: str,
        *,
        generator: torch.Generator,
        max_new_tokens: int,
        max_prompt_tokens: int,
        picture: NDArray[np.uint8] | None = None,
    ) -> Iterator[str]:
        """The text as far as it has come, after each token; ends with the turn or at the limit.

        Args:
            instruction: of the system, before the prompt.
            prompt: the user's; what goes beyond ``max_prompt_tokens`` is not read.
            generator: on the CPU; draws the tokens.
            max_new_tokens: most tokens that are written.
            picture: uint8 [H, W, 3] that the user shows after the prompt; needs ``sight``.
        """
        head = self._ids(CHAT_HEAD.replace("{instruction}", instruction))
        ids = [*head, *self._ids(well_formed(prompt))[:max_prompt_tokens]]
        written: list[int] = []
        for token in self._tokens(ids, picture, generator):
            written.append(token)
            yield self._tokenizer.decode(written, skip_special_tokens=True)
            if len(written) >= max_new_tokens:
                return

    @torch.inference_mode()
    def _tokens(
        self, ids: list[int], picture: NDArray[np.uint8] | None, generator: torch.Generator
    ) -> Iterator[int]:
        """Token after token until the turn ends."""
        ends = {self._tokenizer.convert_tokens_to_ids(END_OF_TURN), self._tokenizer.eos_token_id}
        read, shift = self._read(ids, picture)
        written: list[int] = []
        while True:
            logits = self._logits(read.last_hidden_state[0, -1])
            token = drawn(logits[: len(self._tokenizer)], written, generator)
            if token is None or token in ends:
                return
            yield token
            written.append(token)
            past = read.past_key_values
            at = past.get_seq_length() + shift
            device = self._qwen.device
            read = self._qwen(
                input_ids=torch.tensor([[token]], device=device),
                position_ids=torch.full((3, 1, 1), at, device=device),
                past_key_values=past,
                use_cache=True,
            )

    def _read(self, ids: list[int], picture: NDArray[np.uint8] | None) -> tuple[Any, int]:
        """What the model makes of the question, and how far positions run ahead of the tokens' count.

        A picture's tokens lie in three axes and so take fewer positions than they are.
        """
        if picture is not None:
            if self._sight is None:
                raise ValueError("a picture for a writer that was made without sight")
            then = self._ids(ANSWER)
            return self._sight.read(self._qwen, self._tokenizer, ids, picture, then=then)
        whole = [*ids, *self._ids(END_OF_TURN + ANSWER)]
        question = torch.tensor([whole], device=self._qwen.device)
        return self._qwen(input_ids=question, use_cache=True), 0

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._layer is not None:
            return self._layer(hidden)
        return logits_of(self._qwen.embed_tokens.weight, hidden)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text)["input_ids"]


def drawn(logits: torch.Tensor, written: Sequence[int], generator: torch.Generator) -> int | None:
    """A token drawn among the likeliest; None where the logits are no numbers.

    Args:
        logits: float32 [vocabulary].
        written: tokens that are made a little less likely (Keskar et al., arXiv 1909.05858, section 4.1).
        generator: on the CPU.
    """
    logits = logits.float().cpu().clone()
    if written:
        before = torch.tensor(sorted(set(written)))
        old = logits[before]
        logits[before] = torch.where(old > 0, old / REPETITION_PENALTY, old * REPETITION_PENALTY)
    best = logits.topk(min(CANDIDATES, len(logits)))
    chances = torch.softmax(best.values / TEMPERATURE, dim=0)
    if not bool(torch.isfinite(chances).all()):
        return None
    return int(best.indices[torch.multinomial(chances, 1, generator=generator)])

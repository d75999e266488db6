"""Device memory that the text encoder really allocates while it encodes or rewrites a prompt.

Counted without a device (:mod:`kandinsky5.bench.device_bytes`): the library's Qwen2.5-VL runs in its true
shapes, with this project's writer, vision and streamer. A product of NF4 weights takes what bitsandbytes
takes for it, whether that is installed or not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kandinsky5.bench.device_bytes import META, DeviceBytes, WholeNumbersKept, weights_bytes
from kandinsky5.memory.demand import PlanRequest
from kandinsky5.memory.layout import BlockLayout
from kandinsky5.memory.plan import MemoryPlan
from kandinsky5.memory.source import DiskSource
from kandinsky5.memory.streamer import Streamer
from kandinsky5.memory.text_stages import EXPANSION_TOKENS, EncoderUse
from kandinsky5.model import text_generation
from kandinsky5.model.text_generation import ANSWER, CHAT_HEAD, END_OF_TURN, OutputLayer, Writer
from kandinsky5.model.text_loading import load_picture_processor
from kandinsky5.model.text_nf4 import Nf4Linear, with_nf4_layers
from kandinsky5.model.text_picture import PLACEHOLDER, Sight
from kandinsky5.model.text_shapes import (
    QwenShape,
    Shapes,
    clip_config,
    empty_clip,
    empty_qwen,
    empty_sight,
    qwen_file_config,
)

PASSES_RUN = 3
"""Of an answer: the one that reads the question, the one behind it, and the last, whose cache is longest."""
_TOWER = {
    "patch_embed.proj.weight": (1280, 3, 2, 14, 14),
    "blocks.0.mlp.gate_proj.weight": (3420, 1280),
    "merger.mlp.0.weight": (5120, 5120),
}
_TOWER_BLOCKS = 32
"""Of Qwen2.5-VL's vision, in every size (published ``config.json``)."""


@dataclass(frozen=True)
class WritingBytes:
    """What a prompt's expansion has on the device.

    Attributes:
        weights: that are there all the time; slots count below.
        reading: most beside them until the first token has been drawn.
        writing: most beside them from then on.
    """

    weights: int
    reading: int
    writing: int

    @property
    def peak(self) -> int:
        return self.weights + max(self.reading, self.writing)


def encode_text_bytes(plan: MemoryPlan) -> int:
    """Most bytes alive while the longest prompt is encoded, weights included."""
    job = plan.job
    encoder = _Encoder(job, plan.text.encode, sees=job.encoder_sees, writes=False)
    positions = job.template_tokens + job.text_tokens
    with encoder.counted() as live:
        if encoder.sight is None:
            ids = torch.zeros(1, positions, dtype=torch.long, device=META)
            encoder.qwen(input_ids=ids, use_cache=False)
        else:
            encoder.sight.hidden(encoder.qwen, _Letters(), [0] * positions, _picture(job))
    return encoder.weights_bytes + live.peak_bytes


def expand_bytes(plan: MemoryPlan) -> int:
    """Most bytes alive while the longest prompt is rewritten, weights included."""
    return writing_bytes(plan).peak


def writing_bytes(
    plan: MemoryPlan, *, tokens: int = EXPANSION_TOKENS, every_pass: bool = False
) -> WritingBytes:
    """What is alive while an answer of full length is written.

    Args:
        tokens: of the answer, at least :data:`PASSES_RUN`.
        every_pass: run all passes, and not only some; keys and values of the others are there at once then.
            From the second one on each takes more than the one before, which has one token less.

    Raises:
        ValueError: the plan does not expand the prompt.
    """
    job, use = plan.job, plan.text.expand
    if use is None:
        raise ValueError("the plan does not expand the prompt")
    encoder = _Encoder(job, use, sees=job.picture, writes=True)
    left_out = 0 if every_pass else tokens - PASSES_RUN
    writer = Writer(encoder.qwen, _Letters(), encoder.output, encoder.sight)
    with _one_token_drawn(), encoder.counted() as live:
        peaks: list[int] = []

        def before_pass(_: nn.Module, args: Any, given: dict[str, Any]) -> None:
            peaks.append(live.peak_bytes)
            if len(peaks) == 2:
                live.peak_bytes = live.now_bytes
            if len(peaks) == PASSES_RUN and left_out:
                _lengthen(given["past_key_values"], left_out)

        encoder.qwen.register_forward_pre_hook(before_pass, with_kwargs=True)
        answer = writer.answer(
            "x" * (job.template_tokens - _chat_marks()),
            "x" * job.text_tokens,
            generator=torch.Generator(),
            max_new_tokens=tokens - left_out,
            max_prompt_tokens=job.text_tokens,
            picture=_picture(job) if job.picture else None,
        )
        for _text in answer:
            pass
    _before, reading, *_rest = peaks
    return WritingBytes(encoder.weights_bytes, reading, live.peak_bytes)


class _Encoder:
    """The text encoders without their numbers, as a plan uses them.

    Attributes:
        qwen: the language part.
        output: the output layer, where it writes and that is not the table of embeddings.
        sight: the vision tower, where it sees.
        weights_bytes: of what is on the device all the time; slots are counted while they are used.
    """

    def __init__(self, job: PlanRequest, use: EncoderUse, *, sees: bool, writes: bool) -> None:
        shape = job.models.text_encoder
        self.qwen = empty_qwen(shape)
        if use.weights == "nf4":
            with_nf4_layers(self.qwen)
        self.sight, self.output = None, None
        # A streamed one leaves its table in main memory; of its layers the slots are there.
        of_qwen = self.qwen if use.source == "resident" else self.qwen.norm
        self._use, self._models = use, [empty_clip(clip_config()), of_qwen]
        if sees:
            tower, self.sight = _empty_sight(shape)
            self._models.append(tower)
        if writes and not shape.tied:
            table = torch.empty(shape.vocabulary, shape.hidden, dtype=torch.bfloat16, device=META)
            self.output = OutputLayer(table)
            self._models.append(self.output)
        self.weights_bytes = weights_bytes(*self._models)

    @contextmanager
    def counted(self) -> Iterator[DeviceBytes]:
        """Count what is alive beside the weights, while they are where the plan has them."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(_products_of_nf4())
            live = stack.enter_context(DeviceBytes(self.qwen, *self._models))
            stack.enter_context(WholeNumbersKept())
            if self._use.source != "resident":
                layers = self.qwen.layers
                layouts = [BlockLayout.of(layer) for layer in layers]
                source = DiskSource(layouts, lambda index, slab: None, ring=1)
                stack.enter_context(Streamer(layers, source, device=META, slots=self._use.slots))
            yield live


def _empty_sight(shape: QwenShape) -> tuple[nn.Module, Sight]:
    """The vision tower on the meta device, and what uses it."""
    tower, model = empty_sight(qwen_file_config(_stored_shapes(shape)))
    _compute_one_of_a_kind(tower)
    # A path that is no folder: the published settings.
    return tower, Sight(tower, model, load_picture_processor(Path(os.devnull)))


def _stored_shapes(shape: QwenShape) -> Shapes:
    """Of the tensors in a file from which a configuration is told."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocabulary, shape.hidden),
        **{f"visual.{name}": size for name, size in _TOWER.items()},
        "visual.merger.mlp.2.weight": (shape.hidden, _TOWER["merger.mlp.0.weight"][0]),
    }
    for block in range(1, _TOWER_BLOCKS):
        found[f"visual.blocks.{block}.norm1.weight"] = (0,)
    for layer in range(shape.layers):
        start = f"model.layers.{layer}"
        found[f"{start}.self_attn.k_proj.weight"] = (shape.key_value_dim, shape.hidden)
        found[f"{start}.mlp.gate_proj.weight"] = (shape.intermediate, shape.hidden)
    return found


def _compute_one_of_a_kind(tower: Any) -> None:
    """Let the tower's blocks hand on what they are given, but one that sees windows and one that sees all."""
    computed = {0, tower.fullatt_block_indexes[0]}
    for index, block in enumerate(tower.blocks):
        if index not in computed:
            block.forward = lambda hidden_states, **others: hidden_states


def _lengthen(past: Any, positions: int) -> None:
    """Add so many positions to every layer's keys and values at once."""
    for index, layer in enumerate(past.layers):
        shape = list(layer.keys.shape)
        shape[-2] = positions
        past.update(layer.keys.new_empty(shape), layer.values.new_empty(shape), index)


@contextmanager
def _products_of_nf4() -> Iterator[None]:
    """bitsandbytes' product of several rows unpacks the weight first; its kernels for one row do not.

    Version 0.50, ``backends/cuda/ops.py``; on some devices kernels without it take up to 1536 rows.
    """

    def forward(layer: Nf4Linear, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // layer.in_features
        if rows == 1:
            return x.new_empty(*x.shape[:-1], layer.out_features)
        weight = x.new_empty(layer.out_features, layer.in_features)
        return F.linear(x, weight, layer.bias)

    with _replaced(Nf4Linear, "forward", forward):
        yield


@contextmanager
def _one_token_drawn() -> Iterator[None]:
    """The same token each time, which ends nothing: logits have no numbers here."""
    with _replaced(text_generation, "drawn", lambda logits, written, generator: _Letters.LETTER):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _Letters:
    """A tokenizer of one token a letter or mark."""

    LETTER, MARK, IMAGE = 0, 1, 151655
    eos_token_id = MARK

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.convert_tokens_to_ids(p) for p in _PIECES.findall(text)]}

    def __len__(self) -> int:
        return self.IMAGE + 1

    def convert_tokens_to_ids(self, piece: str) -> int:
        if piece == PLACEHOLDER:
            return self.IMAGE
        return self.LETTER if len(piece) == 1 else self.MARK

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return "x" * len(ids)


_PIECES = re.compile(r"<\|\w+\|>|.", re.DOTALL)


def _chat_marks() -> int:
    """Positions around instruction and prompt."""
    frame = CHAT_HEAD.replace("{instruction}", "") + END_OF_TURN + ANSWER
    return len(_Letters()(frame)["input_ids"])


def _picture(job: PlanRequest) -> Any:
    """An input picture as the encoder sees it (``kandinsky5.pipeline.image.as_seen``), black."""
    return torch.zeros(job.height_px // 2, job.width_px // 2, 3, dtype=torch.uint8).numpy()

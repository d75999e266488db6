"""The same streamer runs the language model's layers, which come from another library."""

from __future__ import annotations

import pytest
import torch

from kandinsky5.memory.layout import BlockLayout
from kandinsky5.memory.source import DiskSource, PinnedSource
from kandinsky5.memory.streamer import Streamer
from tests.memory.streaming_models import emptied, fill_from


@pytest.fixture(scope="module")
def qwen():
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    torch.manual_seed(0)
    config = Qwen2_5_VLTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Qwen2_5_VLTextModel(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", [PinnedSource, DiskSource])
@pytest.mark.parametrize("resident", [(), (0, 3)])
def test_the_streamed_language_model_gives_the_same_numbers_to_the_bit(
    qwen, kind, resident
) -> None:
    tokens = torch.arange(3, 20).unsqueeze(0)
    expected = qwen(input_ids=tokens).last_hidden_state
    whole = qwen.layers
    layouts = [BlockLayout.of(layer) for layer in whole]
    source = kind(layouts, fill_from(whole, layouts))
    qwen.layers = emptied(whole)
    try:
        device = torch.device("cpu")
        with Streamer(qwen.layers, source, device=device, resident=resident) as streamer:
            for _ in range(2):
                assert torch.equal(qwen(input_ids=tokens).last_hidden_state, expected)
                streamer.end_step()
    finally:
        qwen.layers = whole
        source.close()

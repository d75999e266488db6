"""The text encoders in their published shapes, without weights."""

from __future__ import annotations

from typing import Any, Protocol

import torch

HEAD_DIM = 128
"""Of Qwen2.5-VL in every size."""


class QwenShape(Protocol):
    """Dimensions of Qwen's language part, as :class:`kandinsky5.family.TextEncoderShape` has them."""

    @property
    def hidden(self) -> int: ...

    @property
    def layers(self) -> int: ...

    @property
    def key_value_dim(self) -> int: ...

    @property
    def intermediate(self) -> int: ...

    @property
    def vocabulary(self) -> int: ...


def qwen_config(shape: QwenShape) -> Any:
    """The library's configuration of Qwen's language part."""
    from transformers import Qwen2_5_VLTextConfig

    heads = shape.hidden // HEAD_DIM
    return Qwen2_5_VLTextConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, shape.key_value_dim // HEAD_DIM),
        vocab_size=shape.vocabulary,
        bos_token_id=0,
        eos_token_id=0,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [HEAD_DIM // 8, 3 * HEAD_DIM // 16, 3 * HEAD_DIM // 16],
        },
    )


def clip_config() -> Any:
    """The library's configuration of CLIP-L's text part."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )


def empty_qwen(shape: QwenShape) -> Any:
    """Qwen's language part in bf16 on the meta device."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    with torch.device("meta"):
        return Qwen2_5_VLTextModel(qwen_config(shape)).to(torch.bfloat16).eval()


def empty_clip(config: Any) -> Any:
    """CLIP's text part in float32 on the meta device."""
    from transformers import CLIPTextModel

    with torch.device("meta"):
        return CLIPTextModel(config).eval()

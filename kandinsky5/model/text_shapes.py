"""The text encoders' configurations: in their published shapes, and of the shapes that a file has.

What shapes cannot tell stands in tables here, from the published ``config.json`` (Qwen2.5-VL-7B-Instruct,
clip-vit-large-patch14).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kandinsky5.model.text_names import OUTER_NAMES, TOWER_NAMES, stored_names

Shapes = Mapping[str, tuple[int, ...]]

HEAD_DIM = 128
"""Of Qwen2.5-VL in every size."""
CLIP_HEAD_DIM = 64

_QWEN_TEXT = {"rms_norm_eps": 1e-6, "max_position_embeddings": 128_000}
_QWEN_VISION = {
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
_QWEN_MARKS = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}
_CLIP = {"bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
"""The number of the last token is wrong, as published: the library then pools at the highest token."""


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


@dataclass(frozen=True)
class QwenDimensions:
    """Of the language part of a Qwen2.5-VL; see :class:`QwenShape`."""

    hidden: int
    layers: int
    key_value_dim: int
    intermediate: int
    vocabulary: int


def qwen_dimensions(stored: Shapes) -> QwenDimensions | None:
    """Told from the shapes in a file; None where these are not Qwen's tensors."""
    shapes = _shapes_of(OUTER_NAMES, stored)
    names = ("embed_tokens", "layers.0.self_attn.k_proj", "layers.0.mlp.gate_proj")
    matrices = [shapes.get(f"{name}.weight", ()) for name in names]
    if any(len(shape) != 2 for shape in matrices):
        return None
    (vocabulary, hidden), (key_value_dim, _), (intermediate, _) = matrices
    return QwenDimensions(
        hidden=hidden,
        layers=_count(shapes, "layers."),
        key_value_dim=key_value_dim,
        intermediate=intermediate,
        vocabulary=vocabulary,
    )


def qwen_file_config(stored: Shapes) -> Any | None:
    """The library's configuration of a whole Qwen2.5-VL in one file, or None where it is none."""
    from transformers import Qwen2_5_VLConfig

    shape = qwen_dimensions(stored)
    if shape is None or shape.hidden % HEAD_DIM or shape.key_value_dim % HEAD_DIM:
        return None
    vision = _vision_values(_shapes_of(TOWER_NAMES, stored))
    return Qwen2_5_VLConfig(
        text_config=qwen_config(shape).to_dict(), vision_config=vision, **_QWEN_MARKS
    )


def clip_file_config(stored: Shapes) -> Any | None:
    """The library's configuration of CLIP's text part in one file, or None where it is none."""
    from transformers import CLIPTextConfig

    shapes = _shapes_of(OUTER_NAMES, stored)
    names = (
        "embeddings.token_embedding",
        "embeddings.position_embedding",
        "encoder.layers.0.mlp.fc1",
    )
    matrices = [shapes.get(f"{name}.weight", ()) for name in names]
    if any(len(shape) != 2 for shape in matrices):
        return None
    (vocabulary, hidden), (positions, _), (intermediate, _) = matrices
    if hidden % CLIP_HEAD_DIM:
        return None
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=_count(shapes, "encoder.layers."),
        num_attention_heads=hidden // CLIP_HEAD_DIM,
        max_position_embeddings=positions,
        **_CLIP,
    )


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
        **_QWEN_TEXT,
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


def empty_sight(config: Any) -> tuple[Any, Any]:
    """Qwen's vision tower in bf16 on the meta device, and a ``Qwen2_5_VLModel`` without its parts.

    Args:
        config: of the whole, as :func:`qwen_file_config` gives it.
    """
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as library

    with torch.device("meta"):
        tower = library.Qwen2_5_VisionTransformerPretrainedModel(config.vision_config)
        model = library.Qwen2_5_VLModel(config).eval()
    model.visual = model.language_model = None
    return tower.to(torch.bfloat16).eval(), model


def _vision_values(shapes: Shapes) -> dict[str, Any]:
    """Of the vision tower's configuration; nothing without one."""
    patches = shapes.get("patch_embed.proj.weight", ())
    names = ("blocks.0.mlp.gate_proj", "merger.mlp.0", "merger.mlp.2")
    matrices = [shapes.get(f"{name}.weight", ()) for name in names]
    if len(patches) != 5 or any(len(shape) != 2 for shape in matrices):
        return {}
    hidden, channels, frames, side, _ = patches
    (intermediate, _), (merged, _), (out_hidden, _) = matrices
    return {
        **_QWEN_VISION,
        "depth": _count(shapes, "blocks."),
        "hidden_size": hidden,
        "in_channels": channels,
        "temporal_patch_size": frames,
        "patch_size": side,
        "intermediate_size": intermediate,
        "spatial_merge_size": math.isqrt(merged // max(1, hidden)),
        "out_hidden_size": out_hidden,
    }


def _shapes_of(outer: Any, stored: Shapes) -> dict[str, tuple[int, ...]]:
    """Name in the model → shape."""
    return {ours: stored[name] for ours, name in stored_names(outer, stored).items()}


def _count(shapes: Shapes, start: str) -> int:
    """How many numbers follow ``start`` in the names."""
    return len({name[len(start) :].split(".")[0] for name in shapes if name.startswith(start)})

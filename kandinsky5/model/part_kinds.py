"""Which part of a model a set of tensors is, other than a transformer: told from names and shapes alone.

Names of files say nothing here. What shapes cannot tell: the VAE of Stable Diffusion 3 has the very shapes of
FLUX.1's, and every CLIP-L those of OpenAI's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kandinsky5.model import vae_names
from kandinsky5.model.text_names import OUTER_NAMES, TOWER_NAMES, stored_names

Shapes = Mapping[str, tuple[int, ...]]

VAE, TEXT_ENCODER = "vae", "text encoder"
FLUX_LATENTS = 16
CLIP_POSITIONS = 77
_OTHER_CLIPS = {1024: "clip-h", 1280: "clip-g"}
_T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"
_WAN = ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma")


@dataclass(frozen=True)
class PartKind:
    """What part of a model a file is.

    Attributes:
        kind: ``vae`` or ``text encoder``.
        model: ``hunyuan``, ``flux``, ``qwen2.5-vl``, ``clip``: those that Kandinsky 5 uses; ``wan``,
            ``stable diffusion``, ``clip-g``, ``clip-h``, ``long clip``, ``t5``; ``unknown``.
        width: channels it gives: of latents, or of text; 0 where that is not known.
        naming: of a VAE's tensors, ``diffusers`` or ``original``.
    """

    kind: str
    model: str
    width: int = 0
    naming: str | None = None


def part_kind(shapes: Shapes) -> PartKind | None:
    """What these tensors are; None where they are neither a VAE nor a text encoder that is known here."""
    return _vae_kind(shapes) or _text_kind(shapes)


def _vae_kind(shapes: Shapes) -> PartKind | None:
    names = vae_names.stored_names(shapes)
    if any(name in names for name in _WAN):
        return PartKind(VAE, "wan")
    found = vae_names.model_shapes(shapes, names)
    for suffix, axes in ((".conv.weight", 5), (".weight", 4)):
        first, last = found.get(f"encoder.conv_in{suffix}"), found.get(f"decoder.conv_in{suffix}")
        if first is None or last is None or len(first) != axes or len(last) != axes:
            continue
        latents, has_moments = last[1], "quant_conv.weight" in found
        if axes == 5:
            model = "hunyuan" if has_moments else "unknown"
        elif has_moments:
            model = "stable diffusion"
        else:
            model = "flux" if latents == FLUX_LATENTS else "unknown"
        return PartKind(VAE, model, latents, vae_names.naming_of(names))
    return None


def _text_kind(shapes: Shapes) -> PartKind | None:
    language = stored_names(OUTER_NAMES, shapes)
    if _T5 in shapes:
        return PartKind(TEXT_ENCODER, "t5")
    if "patch_embed.proj.weight" in (tower := stored_names(TOWER_NAMES, shapes)):
        is_25 = "blocks.0.mlp.gate_proj.weight" in tower
        is_25 = is_25 and "layers.0.self_attn.k_proj.bias" in language
        table = shapes.get(language.get("embed_tokens.weight", ""), ())
        width = table[1] if len(table) == 2 else 0
        return PartKind(TEXT_ENCODER, "qwen2.5-vl" if is_25 and width else "unknown", width)
    table = shapes.get(language.get("embeddings.token_embedding.weight", ""), ())
    positions = shapes.get(language.get("embeddings.position_embedding.weight", ""), ())
    if len(table) != 2 or len(positions) != 2 or "encoder.layers.0.mlp.fc1.weight" not in language:
        return None
    is_long = positions[0] > CLIP_POSITIONS
    model = "long clip" if is_long else _OTHER_CLIPS.get(table[1], "clip")
    return PartKind(TEXT_ENCODER, model, table[1])

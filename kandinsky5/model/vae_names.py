"""What the tensors of a VAE are called: by diffusers, as here, and in the original checkpoints.

The original names are those of CompVis' latent diffusion, in which FLUX.1's ``ae.safetensors`` is published
and ComfyUI keeps HunyuanVideo's VAE as well (there every convolution is wrapped: ``.conv`` follows). They
count the decoder's levels from the picture's side, diffusers from the latent's; their attention consists of
1×1 convolutions, whose weights are those of linear layers with axes of length 1 behind.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

PREFIXES = ("first_stage_model.", "vae.")
"""What some programs put before every name."""
LEVELS = 4
"""Of the published VAEs: a latent cell is eight pixels wide, which everything else reckons with."""

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_ORIGINAL = re.compile(
    r"(?P<half>encoder|decoder)\.(?:"
    r"(?:down|up)\.(?P<level>\d+)\.(?:block\.(?P<block>\d+)|(?P<sample>(?:down|up)sample))"
    r"|mid\.block_(?P<middle>[12])"
    r"|mid\.attn_1\.(?P<attention>norm|q|k|v|proj_out)"
    r"|(?P<last>norm_out)"
    r")\.(?P<rest>.+)"
)
_LINEAR = re.compile(r"(encoder|decoder)\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight")


def stored_names(names: Collection[str]) -> dict[str, str]:
    """Name as in diffusers → name in the file, in its order; names that are neither stay as they are."""
    prefix = _prefix_of(names)
    return {_diffusers_name(name.removeprefix(prefix)): name for name in names}


def model_shape(name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor of diffusers' ``name`` has in the model, of that in the file."""
    is_convolution = len(stored) > 2 and set(stored[2:]) == {1}
    return stored[:2] if is_convolution and _LINEAR.fullmatch(name) else stored


def model_shapes(
    shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str]
) -> dict[str, tuple[int, ...]]:
    """Name as in diffusers → shape in the model.

    Args:
        shapes: in the file.
        names: of :func:`stored_names`.
    """
    return {ours: model_shape(ours, shapes[stored]) for ours, stored in names.items()}


def naming_of(names: Mapping[str, str]) -> str:
    """``original`` or ``diffusers``, of what :func:`stored_names` gave."""
    is_original = any(not stored.endswith(ours) for ours, stored in names.items())
    return "original" if is_original else "diffusers"


def _prefix_of(names: Collection[str]) -> str:
    for prefix in PREFIXES:
        if names and all(name.startswith(prefix) for name in names):
            return prefix
    return ""


def _diffusers_name(name: str) -> str:
    found = _ORIGINAL.fullmatch(name)
    if found is None:
        return name
    half, rest = found["half"], found["rest"]
    if found["middle"]:
        place = f"mid_block.resnets.{int(found['middle']) - 1}"
    elif found["attention"]:
        place = f"mid_block.attentions.0.{_ATTENTION[found['attention']]}"
    elif found["last"]:
        place = "conv_norm_out"
    else:
        place = _level_name(half, found)
    return f"{half}.{place}.{rest.replace('nin_shortcut', 'conv_shortcut')}"


def _level_name(half: str, found: re.Match[str]) -> str:
    level = int(found["level"])
    way, index = ("down", level) if half == "encoder" else ("up", LEVELS - 1 - level)
    inner = f"resnets.{found['block']}" if found["block"] else f"{way}samplers.0"
    return f"{way}_blocks.{index}.{inner}"

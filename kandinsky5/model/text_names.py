"""What the tensors of a text encoder are called: its model's own names behind what savers put before them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SAVERS = r"(text_encoders\.)?((clip_l|qwen25_7b)\.)?(cond_stage_model\.)?(transformer\.)?"
"""ComfyUI's own checkpoints, and those before it."""
OUTER_NAMES = re.compile(_SAVERS + r"(model\.)?(language_model\.)?(model\.)?(text_model\.)?")
"""What savers of different versions put before the names of the language part."""
TOWER_NAMES = re.compile(_SAVERS + r"(model\.)?visual\.")
"""The same for the vision tower."""


def stored_names(outer: re.Pattern[str], names: Iterable[str]) -> dict[str, str]:
    """Name in the model → name in the file, of those that ``outer`` fits."""
    return {name[found.end() :]: name for name in names if (found := outer.match(name))}

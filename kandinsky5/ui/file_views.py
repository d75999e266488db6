"""What model files are, in a line each, as fragments of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kandinsky5.presets import MODES, Preset
from kandinsky5.ui.fields import BY_NAME
from kandinsky5.ui.views import safe

if TYPE_CHECKING:
    from kandinsky5.ui.model_files import FilesTold

MODELS = {"lite": "Lite 2B", "image": "Image 6B", "pro": "Pro 19B", "demo": "the demo's model"}
LOOKING = "looking at it…"


def file_line(told: FilesTold, *names: str) -> str:
    """A line for each file named in these fields; nothing where none is.

    Args:
        names: of fields; one that is named while the worker still looks is said to be looked at.
    """
    lines = "".join(_line(told.said[name], name, names) for name in names if name in told.said)
    if told.pending:
        lines += f'<p class="k1-file" data-state="looking">{LOOKING}</p>'
    return f'<div class="k1-files-said" role="status">{lines}</div>' if lines else ""


def missing_line(preset: Preset, missing: Sequence[str]) -> str:
    """What of a preset's model is not here, and the command that fetches it; nothing where all is."""
    if not missing:
        return ""
    command = f"<code>python k1.py download {safe(preset.name)}</code>"
    what = (
        "Its weights are" if "transformer" in missing else f"Of it {safe(', '.join(missing))} are"
    )
    what = what if len(missing) > 1 else f"Its {safe(missing[0])} is"
    return (
        f'<div class="k1-files-said" role="status"><p class="k1-file" data-state="doubtful">'
        f"{what} not here yet. Fetch with {command}, or name files of your own under “Model &amp; memory”."
        "</p></div>"
    )


def _line(said: Mapping[str, Any], name: str, names: Sequence[str]) -> str:
    if "problem" in said:
        which = f"{BY_NAME[name].label}: " if len(names) > 1 else ""
        return f'<p class="k1-file" data-state="refused">{safe(which)}{safe(said["problem"])}</p>'
    warnings = "".join(f"<i>{safe(text)}</i>" for text in said.get("notices", ()))
    state = "doubtful" if warnings or said.get("unmatched") else "known"
    return f'<p class="k1-file" data-state="{state}">{safe(_words(said))}{warnings}</p>'


def _words(said: Mapping[str, Any]) -> str:
    if "supplies" in said:
        return f"{said['name']}: {said['supplies']}"
    return _lora_words(said) if "variant" in said else _transformer_words(said)


def _transformer_words(said: Mapping[str, Any]) -> str:
    """Such as “Pro 19B, int8, text → video or image → video”."""
    size = f"{said['parameters'] / 1e6:,.1f} million parameters"
    model = MODELS.get(said["model"], f"of this architecture, {size}")
    words = [model, said["quantization"].replace("-", " ")]
    tasks = [MODES[task] for task in said["task_hint"].split(" or ") if task in MODES]
    if tasks:
        words.append(" or ".join(tasks))
    return f"{said['name']}: {', '.join(words)}"


def _lora_words(said: Mapping[str, Any]) -> str:
    words = f"{said['name']}: LoRA ({said['variant']}), "
    if said["matched"] is None:
        return f"{words}{said['tensors']} tensors; matched when the model is known"
    words += f"{said['matched']} of {said['tensors']} tensors match"
    if said["unmatched"]:
        words += f", not {said['unmatched']}"
    if said["trigger"]:
        words += f"; its trigger goes before the prompt: {said['trigger']}"
    return words

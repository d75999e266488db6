"""“Video info”: what a result says of itself, and its settings sent back to the form. Nothing is decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from kandinsky5.errors import UserError
from kandinsky5.output.metadata import is_community, read_metadata, request_of, video_info
from kandinsky5.presets import PRESETS
from kandinsky5.request import GenerationRequest
from kandinsky5.ui.fields import BY_NAME
from kandinsky5.ui.form import DEFAULTS
from kandinsky5.ui.views import duration_text, gigabytes, problem, safe

EMPTY = (
    '<p class="k1-none">Drop an mp4 or PNG that K1 made, or the early community program, to see how it was'
    " made.</p>"
)
SHOWN_ABOVE = (
    "prompt",
    "negative_prompt",
    "clip_prompt",
    "expanded_prompt",
    "expand",
    "preset",
    "seed",
    "width",
    "height",
    "seconds",
    "out",
)
"""Fields of a request that are shown by another name, or say nothing of how a result was made."""


@dataclass(frozen=True)
class Sent:
    """What of a result goes back to the form."""

    request: GenerationRequest
    expanded_prompt: str | None


def looked_into(path: str | None) -> tuple[str, Sent | None, Any]:
    """What is told of a dropped file, what can be sent to the form, and whether the button is shown."""
    if not path:
        return EMPTY, None, gr.update(visible=False)
    try:
        facts, metadata = video_info(path), read_metadata(path)
        request = request_of(metadata)
    except UserError as error:
        return problem("", f"{Path(path).name}: {error.allowed}."), None, gr.update(visible=False)
    written = metadata.get("expanded_prompt")
    sent = Sent(request, written if isinstance(written, str) else None)
    return _told(facts, metadata, sent), sent, gr.update(visible=True)


def _told(facts: Mapping[str, Any], metadata: Mapping[str, Any], sent: Sent) -> str:
    texts = [("Prompt", sent.request.prompt), ("Expanded prompt", sent.expanded_prompt)]
    texts += [("Negative prompt", sent.request.negative_prompt)]
    texts += [("CLIP prompt", sent.request.clip_prompt)]
    said = "".join(f"<dt>{name}</dt><dd>{safe(text)}</dd>" for name, text in texts if text)
    rows = "".join(
        f"<tr><th scope=row>{safe(name)}</th><td>{safe(value)}</td></tr>"
        for name, value in (*_of_file(facts), *_of_run(metadata), *_settings(sent.request))
    )
    return (
        f'<section class="k1-info"><dl>{said}</dl>'
        f'<div class="k1-info-table"><table><tbody>{rows}</tbody></table></div></section>'
    )


def _of_file(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    told = [("Size", f"{facts['width']} × {facts['height']}")]
    if facts["frames"] > 1:
        length = f"{duration_text(facts['duration_s'])}, {facts['fps']:g} frames a second"
        told += [("Frames", str(facts["frames"])), ("Length", length)]
    return told


def _of_run(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the program that made it says of the run; anything may stand in a file."""
    if is_community(metadata):
        return [("Made by", "the early community program")]
    told = [("Made by", f"K1 {metadata.get('k1', '')}"), ("Seed", str(metadata.get("seed")))]
    checkpoint, seconds = metadata.get("checkpoint"), metadata.get("seconds")
    if isinstance(checkpoint, dict):
        told.append(("Checkpoint", str(checkpoint.get("name"))))
        told.append(("SHA-256 of its header", str(checkpoint.get("header_sha256"))[:16]))
    if isinstance(seconds, dict):
        taken = [value for name, value in seconds.items() if name != "total"]
        if taken and all(type(value) in (int, float) for value in taken):
            told.append(("Took", duration_text(sum(taken))))
    for name, label in (("peak_vram_bytes", "VRAM"), ("peak_rss_bytes", "Memory")):
        if type(size := metadata.get(name)) is int and size > 0:
            told.append((label, gigabytes(size)))
    return told


def _settings(request: GenerationRequest) -> list[tuple[str, str]]:
    """Settings of the request that are not left to the program."""
    told = [("Preset", PRESETS[request.preset].title)]
    for name, default in DEFAULTS.items():
        value = getattr(request, name)
        if name in SHOWN_ABOVE or value == default:
            continue
        if name == "loras":
            used = ", ".join(f"{item.path} × {item.strength:g}" for item in request.loras)
            told.append(("LoRAs", used))
            continue
        label = BY_NAME[name].label if name in BY_NAME else name.replace("_", " ").capitalize()
        told.append((label, f"{value:g}" if isinstance(value, float) else str(value)))
    return told

"""Where things stand on the page: what to make on the left, what happens on the right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gradio as gr

from kandinsky5.ui import (
    expansion,
    form,
    preview_views,
    settings_page,
    system_info,
    user_presets_page,
    video_info,
    views,
)
from kandinsky5.ui.fields import BY_NAME, FIELDS, LORA_FIELDS

HEADER = """<header class="k1-head"><svg viewBox="0 0 40 28" aria-hidden="true">
<circle cx="11" cy="14" r="9" fill="#dc5333"/><path d="M20 23 29 5l9 18z" fill="#2f6f9f" opacity=".92"/>
<rect x="16" y="9" width="10" height="10" fill="#e8b23a" opacity=".95"/></svg>
<h1>K1</h1><p>Kandinsky 5 studio</p></header>"""
ON_TILE = """element.addEventListener('click', e => { const b = e.target.closest('[data-job]');
if (b && b.tagName === 'BUTTON') trigger('click', {job: b.dataset.job}); });"""
ON_PROGRESS = """element.addEventListener('click', e => {
const acts = ['stop', 'resume', 'drop', 'go'], b = e.target.closest('button'); if (!b) return;
const act = acts.find(name => name in b.dataset); if (!act) return;
trigger('click', {act, job: b.dataset[act]}); });
const tell = () => window.k1 && window.k1.progressChanged(element); tell(); watch('value', tell);"""
ON_PREVIEW = """const tell = () => window.k1 && window.k1.previewChanged && window.k1.previewChanged(element);
tell(); watch('value', tell);"""
ON_PROBLEM = (
    """const tell = () => window.k1 && window.k1.problemChanged(element); watch('value', tell);"""
)
if TYPE_CHECKING:
    from kandinsky5.ui.options import StudioOptions

Presets = Callable[[str], list[tuple[str, str]]]


@dataclass
class Left:
    """The form and what is said of it.

    Attributes:
        controls: by the names of their fields, in the order of the table.
        lora_rows: each row of a LoRA.
        said: lines about the files, by ``preset``, ``dit``, ``model_dir``, ``loras``.
        dice, last_seed: draw a seed; take the one of the last job.
        expand_button: has the prompt rewritten.
        tokens: lines on how long the prompts are, by their fields' names.
        swap, size_line: width and height the other way round; what is said of them.
        crop: the picture as the model will see it.
        batch: how many jobs there will be.
        expand_line: what becomes of the prompt.
        own: the user's own presets.
        plan: the memory plan.
    """

    controls: dict[str, Any]
    lora_rows: list[gr.Row] = field(default_factory=list)
    said: dict[str, gr.HTML] = field(default_factory=dict)
    dice: Any = None
    last_seed: Any = None
    tokens: dict[str, gr.HTML] = field(default_factory=dict)
    swap: Any = None
    size_line: Any = None
    crop: Any = None
    batch: Any = None
    expand_button: Any = None
    expand_line: Any = None
    own: Any = None
    plan: Any = None


def left(presets: Presets) -> Left:
    """The controls, the files and the memory plan."""
    made: dict[str, Any] = {}
    parts = Left({})

    def place(*names: str) -> None:
        for name in names:
            made[name] = form.component(BY_NAME[name], presets)

    place("mode", "preset")
    parts.said["preset"] = _html("k1-said-preset")
    _counted(place, parts, "prompt")
    with gr.Row(elem_classes=["k1-row"], elem_id="k1-expand-row"):
        place("expand")
        parts.expand_button = gr.Button(
            expansion.BUTTON, elem_id="k1-expand-now", min_width=120, scale=0, interactive=False
        )
    _counted(place, parts, "expanded_prompt")
    parts.expand_line = _html("k1-expand-line")
    place("image")
    parts.crop = _html("k1-crop")
    with gr.Row(elem_classes=["k1-row"]):
        for name in ("negative_prompt", "clip_prompt"):
            with gr.Column(min_width=220, elem_classes=["k1-counted"]):
                _counted(place, parts, name)
    _sizes(place, parts)
    _row(place, "seconds", "steps", "guidance", "shift")
    with gr.Row(elem_classes=["k1-row", "k1-seed-row"]):
        place("seed")
        parts.dice = gr.Button("Random", elem_id="k1-dice", min_width=84, scale=0)
        parts.last_seed = gr.Button("Reuse last", elem_id="k1-last-seed", min_width=96, scale=0)
    with gr.Accordion("Several at once", open=False, elem_id="k1-several"):
        _row(place, "count", "per_line")
        place("images")
    parts.batch = _html("k1-batch")
    with gr.Accordion("Model & memory", open=False, elem_id="k1-files"):
        _files(place, parts)
        _choices(place)
    parts.own = user_presets_page.section()
    parts.plan = _html("k1-plan")
    parts.controls = {item.name: made[item.name] for item in FIELDS}
    return parts


def _counted(place: Callable[..., None], parts: Left, name: str) -> None:
    """A prompt with the line on how long it is."""
    place(name)
    parts.tokens[name] = _html(f"k1-tokens-{name}")


def _sizes(place: Callable[..., None], parts: Left) -> None:
    """The trained sizes as buttons, and free ones."""
    place("size")
    with gr.Row(elem_classes=["k1-row"], elem_id="k1-size-row"):
        with gr.Row(elem_classes=["k1-row"], elem_id="k1-sides"):
            place("width")
            parts.swap = gr.Button("Swap", elem_id="k1-swap", min_width=64, scale=0)
            place("height")
        place("scale")
    parts.size_line = _html("k1-size-line")


def _files(place: Callable[..., None], parts: Left) -> None:
    """One's own files, each with a line on what it is."""
    place("dit")
    parts.said["dit"] = _html("k1-said-dit")
    place("model_dir")
    parts.said["model_dir"] = _html("k1-said-model_dir")
    for number, row in enumerate(LORA_FIELDS):
        classes = ["k1-row", "k1-lora-row"]
        with gr.Row(elem_classes=classes, visible=number == 0) as shown:
            place(*(item.name for item in row))
        parts.lora_rows.append(shown)
    parts.said["loras"] = _html("k1-said-loras")


def _choices(place: Callable[..., None]) -> None:
    """What is decided by the program unless somebody says otherwise."""
    _heading("Memory")
    _row(place, "weights", "text_weights")
    _row(place, "vram", "ram")
    _row(place, "source", "resident_blocks", "slots")
    _row(place, "chunk_tokens", "chunk_heads")
    _row(place, "vae_tiling", "vae_tile")
    _heading("Speed")
    _row(place, "attention", "cache", "dtype")
    _row(place, "nabla_p", "nabla_wt", "nabla_wh", "nabla_ww")
    _row(place, "cache_threshold", "cache_retention")
    _heading("Guidance and output")
    _row(place, "guidance_start", "guidance_end", "crf")
    place("preview")


def _row(place: Callable[..., None], *names: str) -> None:
    with gr.Row(elem_classes=["k1-row"]):
        place(*names)


def _heading(text: str) -> None:
    gr.HTML(f'<h3 class="k1-h3">{text}</h3>', js_on_load=None, apply_default_css=False)


def _html(name: str, text: str = "") -> gr.HTML:
    return gr.HTML(text, elem_id=name, js_on_load=None, apply_default_css=False)


@dataclass
class Aside:
    """The tabs beside Create.

    Attributes:
        file, told, send: a dropped result, what it says of itself, and the button that fills the form.
        checks, log, text: what the doctor says, the end of the worker's log, both as text.
        system: the tab itself, looked at when it is chosen.
        again: the button that looks once more.
        settings: the user's.
    """

    file: Any = None
    told: Any = None
    send: Any = None
    checks: Any = None
    log: Any = None
    text: Any = None
    system: Any = None
    again: Any = None
    settings: Any = None


def aside(options: StudioOptions) -> Aside:
    """“Video info” and “System”."""
    parts = Aside()
    with gr.Tab("Video info", id="info"), gr.Column(elem_classes=["k1-sheet"]):
        parts.file = form.FileInput(
            label="A result",
            file_types=[".mp4", ".png"],
            type="filepath",
            height=150,
            elem_id="k1-info-file",
        )
        parts.send = gr.Button("Send to Create", elem_id="k1-info-send", visible=False)
        parts.told = _html("k1-info-told", video_info.EMPTY)
    with gr.Tab("System", id="system") as parts.system, gr.Column(elem_classes=["k1-sheet"]):
        _heading("Settings")
        parts.settings = settings_page.section(options)
        _heading("This machine")
        parts.checks = _html("k1-system-checks", system_info.LOOKING)
        _heading("Worker")
        parts.log = _html("k1-system-log")
        with gr.Accordion("Diagnostics to copy", open=False):
            parts.text = gr.Textbox(
                lines=10, max_lines=20, interactive=False, show_label=False, buttons=["copy"]
            )
        parts.again = gr.Button("Look again", elem_id="k1-system-again")
    return parts


def right() -> dict[str, Any]:
    """The parts of the page that tell what happens."""
    parts: dict[str, Any] = {}
    with gr.Row(elem_id="k1-actions"):
        parts["generate"] = gr.Button("Generate", variant="primary", elem_id="k1-generate", scale=3)
        parts["replace"] = gr.Button(
            "Replace the waiting job",
            variant="primary",
            elem_id="k1-replace",
            scale=3,
            visible=False,
        )
        parts["stop"] = gr.Button(
            "Stop", elem_id="k1-stop", scale=1, min_width=90, interactive=False
        )
    parts["problem"] = gr.HTML("", elem_id="k1-problem", js_on_load=ON_PROBLEM)
    parts["progress"] = gr.HTML(
        views.progress(None, ()),
        elem_id="k1-progress",
        js_on_load=ON_PROGRESS,
        apply_default_css=False,
    )
    _html("k1-preview", preview_views.FRAME)
    parts["preview"] = gr.HTML("", elem_id="k1-preview-data", js_on_load=ON_PREVIEW)
    parts["player"] = _html("k1-player", views.player(None))
    parts["use"] = gr.Button("Use these settings", elem_id="k1-use", size="md", visible=False)
    gr.HTML('<h2 class="k1-h2">Results</h2>', js_on_load=None, apply_default_css=False)
    parts["gallery"] = gr.HTML(
        views.gallery((), None), elem_id="k1-gallery", js_on_load=ON_TILE, apply_default_css=False
    )
    return parts

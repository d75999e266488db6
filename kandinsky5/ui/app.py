"""The studio's page, and the application that serves it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import gradio as gr
from fastapi import FastAPI

from kandinsky5.ui import choices, form, preview_views, theme, views
from kandinsky5.ui.handlers import Handlers
from kandinsky5.ui.machine_notice import MachineNotice
from kandinsky5.ui.options import StudioOptions
from kandinsky5.ui.planning import PLAN_FIELDS, Planner
from kandinsky5.ui.remembered import KEPT_NAMES
from kandinsky5.ui.routes import result_routes, with_door

if TYPE_CHECKING:
    from kandinsky5.worker.client import WorkerClient

POLL_S = 1.0
QUEUE_SLEEP_S = 0.02
"""Between two looks into gradio's own queue, which nothing of the page is put into: each costs a wake-up."""
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
HEADER = """<header class="k1-head"><svg viewBox="0 0 40 28" aria-hidden="true">
<circle cx="11" cy="14" r="9" fill="#dc5333"/><path d="M20 23 29 5l9 18z" fill="#2f6f9f" opacity=".92"/>
<rect x="16" y="9" width="10" height="10" fill="#e8b23a" opacity=".95"/></svg>
<h1>K1</h1><p>Kandinsky 5 studio</p></header>"""
ON_TILE = """element.addEventListener('click', e => { const b = e.target.closest('[data-job]');
if (b && b.tagName === 'BUTTON') trigger('click', {job: b.dataset.job}); });"""
ON_PROGRESS = """element.addEventListener('click', e => {
const b = e.target.closest('button[data-stop], button[data-resume], button[data-drop]'); if (!b) return;
const act = ['stop', 'resume', 'drop'].find(name => name in b.dataset);
trigger('click', {act, job: b.dataset[act]}); });
const tell = () => window.k1 && window.k1.progressChanged(element); tell(); watch('value', tell);"""
ON_PREVIEW = """const tell = () => window.k1 && window.k1.previewChanged && window.k1.previewChanged(element);
tell(); watch('value', tell);"""
ON_PROBLEM = (
    """const tell = () => window.k1 && window.k1.problemChanged(element); watch('value', tell);"""
)


def build(
    client: WorkerClient, options: StudioOptions, machine: MachineNotice | None = None
) -> gr.Blocks:
    """The page: what to make on the left, what happens on the right."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(options.uploads_dir)
    planner = Planner(machine, options.device, client.worker_pid)
    is_here = choices.weights_in(options.models_dirs)
    handlers = Handlers(client, options.out_dir, is_here, planner)
    with gr.Blocks(title="K1", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(HEADER, js_on_load=None)
        notice = gr.HTML("", elem_id="k1-notice", js_on_load=None, apply_default_css=False)
        with gr.Row(elem_id="k1-create", equal_height=False):
            with gr.Column(scale=5, min_width=320, elem_id="k1-left"):
                controls, dice, plan = _left(handlers)
            with gr.Column(scale=6, min_width=320, elem_id="k1-right"):
                parts = _right()
        _connect_form(handlers, controls, dice)
        _connect_memory(page, handlers, controls)
        _connect_jobs(handlers, controls, parts)
        planned = [controls[name] for name in PLAN_FIELDS]
        _connect_plan(page, handlers, planned, plan, parts["player"])
        if machine is not None:
            _connect_machine(machine, handlers, planned, notice, plan)
        for function in (
            handlers.submit,
            handlers.status,
            handlers.stop,
            handlers.resume,
            handlers.discard,
            handlers.queue,
        ):
            gr.api(function, api_name=function.__name__, queue=False)
    _calm(page)
    return page


def _calm(page: gr.Blocks) -> None:
    """Let gradio's queue sleep longer; by default it burns 7 % of a core while nothing happens."""
    queue: Any = getattr(page, "_queue", None)
    if hasattr(queue, "sleep_when_free"):
        queue.sleep_when_free = QUEUE_SLEEP_S


def _connect_machine(
    machine: MachineNotice, handlers: Handlers, planned: list[Any], notice: Any, plan: Any
) -> None:
    """A line under the header, and the plan, once the doctor has said what this machine is."""
    timer = gr.Timer(POLL_S)

    def look(*values: Any) -> tuple[Any, Any, Any]:
        text = machine.text()
        if text is None:
            return gr.skip(), gr.skip(), gr.skip()
        return views.notice(text), handlers.plan(*values), gr.Timer(active=False)

    timer.tick(look, planned, [notice, plan, timer], **QUIET)


def _connect_plan(
    page: gr.Blocks, handlers: Handlers, planned: list[Any], plan: Any, player: Any
) -> None:
    """The plan follows the form, and what a finished job has told of times."""
    changes = [control.change for control in (*planned, player)]
    gr.on([page.load, *changes], handlers.plan, planned, plan, trigger_mode="always_last", **QUIET)


def _left(handlers: Handlers) -> tuple[dict[str, Any], gr.Button, gr.HTML]:
    """The controls by the names of their fields, the dice, and the memory plan."""
    made: dict[str, Any] = {}

    def place(*names: str) -> None:
        for name in names:
            made[name] = form.component(form.BY_NAME[name], handlers.presets)

    place("mode", "preset", "prompt", "expand", "image", "negative_prompt")
    with gr.Row(elem_classes=["k1-row"]):
        place("size", "width", "height")
    with gr.Row(elem_classes=["k1-row"]):
        place("seconds", "steps", "guidance", "shift")
    with gr.Row(elem_classes=["k1-row", "k1-seed-row"]):
        place("seed")
        dice = gr.Button("Random", elem_id="k1-dice", min_width=90, scale=0)
    with gr.Accordion("Model & memory", open=False, elem_id="k1-files"):
        place("dit", "model_dir")
        with gr.Row(elem_classes=["k1-row"]):
            place("weights", "text_weights")
        with gr.Row(elem_classes=["k1-row"]):
            place("vram", "ram")
    plan = gr.HTML("", elem_id="k1-plan", js_on_load=None, apply_default_css=False)
    return {field.name: made[field.name] for field in form.FIELDS}, dice, plan


def _right() -> dict[str, Any]:
    """The parts of the page that tell what happens."""
    parts: dict[str, Any] = {}
    with gr.Row(elem_id="k1-actions"):
        parts["generate"] = gr.Button("Generate", variant="primary", elem_id="k1-generate", scale=3)
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
    gr.HTML(preview_views.FRAME, elem_id="k1-preview", js_on_load=None, apply_default_css=False)
    parts["preview"] = gr.HTML("", elem_id="k1-preview-data", js_on_load=ON_PREVIEW)
    parts["player"] = gr.HTML(
        views.player(None), elem_id="k1-player", js_on_load=None, apply_default_css=False
    )
    parts["use"] = gr.Button("Use these settings", elem_id="k1-use", size="md", visible=False)
    gr.HTML('<h2 class="k1-h2">Results</h2>', js_on_load=None, apply_default_css=False)
    parts["gallery"] = gr.HTML(
        views.gallery((), None), elem_id="k1-gallery", js_on_load=ON_TILE, apply_default_css=False
    )
    return parts


def _connect_form(handlers: Handlers, controls: dict[str, Any], dice: gr.Button) -> None:
    """Controls that change other controls."""
    every = list(controls.values())
    size, width, height = controls["size"], controls["width"], controls["height"]
    controls["mode"].input(handlers.mode_chosen, controls["mode"], every, **QUIET)
    controls["preset"].input(handlers.preset_chosen, controls["preset"], every, **QUIET)
    size.input(choices.size_of, [size, width, height], [width, height], **QUIET)
    for side in (width, height):
        side.input(lambda: choices.CUSTOM_SIZE, None, size, **QUIET)
    dice.click(None, None, controls["seed"], js="() => window.k1.dice()", **QUIET)


def _connect_memory(page: gr.Blocks, handlers: Handlers, controls: dict[str, Any]) -> None:
    """The browser keeps what is typed and gives it back when the page is loaded again."""
    kept = [controls[name] for name in KEPT_NAMES]
    names = json.dumps(KEPT_NAMES)
    gr.on(
        [control.change for control in kept],
        None,
        kept,
        None,
        js=f"(...values) => {{ window.k1.remember({names}, values); return []; }}",
        **QUIET,
    )
    page.load(
        handlers.restored,
        gr.Textbox(visible=False),
        list(controls.values()),
        js="() => [window.k1.remembered()]",
        **QUIET,
    ).then(None, None, None, js="() => { window.k1.startRemembering(); return []; }", **QUIET)


def _connect_jobs(handlers: Handlers, controls: dict[str, Any], parts: dict[str, Any]) -> None:
    """Generate, Stop, the timer and the results."""
    watched, pinned, shown = gr.State(None), gr.State(None), gr.State({})
    token = gr.Textbox(visible=False)
    every = list(controls.values())
    look: dict[str, Any] = {
        "fn": handlers.refresh,
        "inputs": [watched, pinned, shown],
        "outputs": [
            *(parts[name] for name in ("progress", "player", "gallery", "stop", "use", "preview")),
            shown,
        ],
        **QUIET,
    }
    parts["generate"].click(
        handlers.generate,
        [watched, token, *every],
        [watched, pinned, parts["problem"]],
        js="(watched, token, ...values) => [watched, window.k1.token(), ...values]",
        **QUIET,
    ).then(**look)
    controls["image"].upload(
        handlers.picture_given, controls["image"], [controls["image"], parts["problem"]], **QUIET
    )
    parts["stop"].click(
        handlers.stop_watched,
        [watched, gr.Textbox(visible=False)],
        None,
        js="(watched, mode) => [watched, window.k1.stopMode()]",
        **QUIET,
    ).then(**look)
    parts["progress"].click(
        handlers.progress_pressed, None, [watched, parts["problem"]], **QUIET
    ).then(**look)
    parts["gallery"].click(handlers.choose, None, pinned, **QUIET).then(**look)
    parts["use"].click(handlers.use_settings, [pinned, shown], every, **QUIET)
    gr.Timer(POLL_S).tick(**look)


def studio_app(
    client: WorkerClient, options: StudioOptions, machine: MachineNotice | None = None
) -> FastAPI:
    """The whole of what the server serves: the door, the results, the page."""
    page = build(client, options, machine)
    app = FastAPI(title="K1", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(result_routes(client, options.out_dir))
    with_door(app, options)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        blocked_paths=[],
        show_error=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        max_file_size="64mb",
        theme=theme.studio_theme(),
        css_paths=[theme.STYLE_FILE],
        head="".join(
            f"<script>{file.read_text(encoding='utf-8')}</script>" for file in theme.SCRIPT_FILES
        ),
    )
    # gradio checks that a file named by a caller was really uploaded only on pages it "launched" itself.
    page.has_launched = True
    return app

"""The studio's page, and the application that serves it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import gradio as gr
from fastapi import FastAPI

from kandinsky5.ui import choices, layout, theme, views
from kandinsky5.ui.expansion import Expansion
from kandinsky5.ui.fields import STEERING
from kandinsky5.ui.form_handlers import OUTLOOK_FIELDS, FormHandlers
from kandinsky5.ui.handlers import Handlers
from kandinsky5.ui.machine_notice import MachineNotice
from kandinsky5.ui.options import StudioOptions
from kandinsky5.ui.planning import Planner
from kandinsky5.ui.remembered import KEPT_NAMES
from kandinsky5.ui.routes import result_routes, with_door
from kandinsky5.ui.system_info import SystemInfo
from kandinsky5.ui.video_info import Sent, looked_into

if TYPE_CHECKING:
    from kandinsky5.worker.client import WorkerClient

POLL_S = 1.0
QUEUE_SLEEP_S = 0.02
"""Between two looks into gradio's own queue, which nothing of the page is put into: each costs a wake-up."""
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
ASK_AGAIN_S = 0.4
"""Between two looks at what the worker says of a file, or at a prompt that it rewrites."""


def build(
    client: WorkerClient, options: StudioOptions, machine: MachineNotice | None = None
) -> gr.Blocks:
    """The page: what to make on the left, what happens on the right."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(options.uploads_dir)
    planner = Planner(machine, options.device, client.worker_pid)
    handlers = Handlers(client, options.out_dir)
    of_form = FormHandlers(client, choices.weights_in(options.models_dirs), planner)
    with gr.Blocks(title="K1", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(layout.HEADER, js_on_load=None)
        notice = gr.HTML("", elem_id="k1-notice", js_on_load=None, apply_default_css=False)
        with gr.Tabs(selected="create", elem_id="k1-tabs") as tabs:
            with gr.Tab("Create", id="create"), gr.Row(elem_id="k1-create", equal_height=False):
                with gr.Column(scale=5, min_width=320, elem_id="k1-left"):
                    left = layout.left(of_form.presets)
                with gr.Column(scale=6, min_width=320, elem_id="k1-right"):
                    parts = layout.right()
            aside = layout.aside()
        parts |= {"pinned": gr.State(None), "shown": gr.State({})}
        _connect_form(of_form, left, parts)
        _connect_memory(page, of_form, left.controls)
        _connect_expansion(page, Expansion(client), left, parts)
        _connect_jobs(handlers, left.controls, parts)
        _connect_info(of_form, left.controls, aside, tabs)
        system = _connect_system(SystemInfo(machine, options.state_dir / "worker.log"), aside)
        outlook = _connect_outlook(page, of_form, left, parts["player"])
        if machine is not None:
            _connect_machine(machine, notice, outlook, system)
        for function in (
            handlers.submit,
            handlers.expand,
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


def _connect_machine(machine: MachineNotice, notice: Any, *looks: dict[str, Any]) -> None:
    """A line under the header, the plan and the checks, once the doctor has said what this machine is."""
    timer = gr.Timer(POLL_S)

    def look() -> tuple[Any, Any]:
        text = machine.text()
        if text is None:
            return gr.skip(), gr.skip()
        return views.notice(text), gr.Timer(active=False)

    told = timer.tick(look, None, [notice, timer], **QUIET)
    for look_too in looks:
        told.then(**look_too)


def _connect_outlook(
    page: gr.Blocks, of_form: FormHandlers, left: layout.Left, player: Any
) -> dict[str, Any]:
    """What is said of memory and files follows the form, and what a finished job has told of times."""
    watched = [left.controls[name] for name in OUTLOOK_FIELDS]
    timer = gr.Timer(ASK_AGAIN_S, active=False)
    look: dict[str, Any] = {
        "fn": of_form.outlook,
        "inputs": watched,
        "outputs": [
            left.plan,
            *(left.said[name] for name in ("preset", "dit", "model_dir", "loras")),
            *left.lora_rows,
            timer,
        ],
        "trigger_mode": "always_last",
        **QUIET,
    }
    gr.on([page.load, timer.tick, *(item.change for item in (*watched, player))], **look)
    return {name: value for name, value in look.items() if name != "trigger_mode"}


def _connect_form(of_form: FormHandlers, left: layout.Left, parts: dict[str, Any]) -> None:
    """Controls that change other controls."""
    controls = left.controls
    every = list(controls.values())
    steering = [controls[name] for name in STEERING]
    size, width, height = controls["size"], controls["width"], controls["height"]
    controls["mode"].input(of_form.mode_chosen, [controls["mode"], *steering], every, **QUIET)
    controls["preset"].input(of_form.preset_chosen, steering, every, **QUIET)
    steers = [controls[name].input for name in STEERING if name != "preset"]
    gr.on(steers, of_form.steered, steering, every, **QUIET)
    size.input(choices.size_of, [size, width, height], [width, height], **QUIET)
    for side in (width, height):
        side.input(lambda: choices.CUSTOM_SIZE, None, size, **QUIET)
    left.dice.click(None, None, controls["seed"], js="() => window.k1.dice()", **QUIET)
    controls["image"].upload(
        of_form.picture_given, controls["image"], [controls["image"], parts["problem"]], **QUIET
    )
    shown = parts["pinned"], parts["shown"]
    parts["use"].click(of_form.use_settings, [*shown], every, **QUIET)


def _connect_expansion(
    page: gr.Blocks, expansion: Expansion, left: layout.Left, parts: dict[str, Any]
) -> None:
    """“Expand now” and the text that it streams."""
    controls, running, written_for = left.controls, gr.State(None), gr.State(None)
    timer = gr.Timer(ASK_AGAIN_S, active=False)
    form = [controls[name] for name in ("preset", "expand", "expanded_prompt", "prompt")]
    box, button = controls["expanded_prompt"], left.expand_button
    outputs = [running, box, left.expand_line, button, timer, written_for]
    button.click(
        expansion.pressed,
        [running, gr.Textbox(visible=False), *controls.values()],
        [*outputs, parts["problem"]],
        js="(running, token, ...values) => [running, window.k1.newId(), ...values]",
        **QUIET,
    )
    timer.tick(expansion.look, [running, controls["preset"]], outputs, **QUIET)
    gr.on(
        [page.load, *(control.change for control in form)],
        expansion.changed,
        [running, *form, written_for],
        [left.expand_line, button],
        trigger_mode="always_last",
        **QUIET,
    )
    page.load(expansion.found, None, [running, timer], **QUIET)


def _connect_memory(page: gr.Blocks, of_form: FormHandlers, controls: dict[str, Any]) -> None:
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
        of_form.restored,
        gr.Textbox(visible=False),
        list(controls.values()),
        js="() => [window.k1.remembered()]",
        **QUIET,
    ).then(None, None, None, js="() => { window.k1.startRemembering(); return []; }", **QUIET)


def _connect_info(
    of_form: FormHandlers, controls: dict[str, Any], aside: layout.Aside, tabs: gr.Tabs
) -> None:
    """A dropped result tells how it was made, and its settings fill the form."""
    sent = gr.State(None)
    aside.file.change(looked_into, aside.file, [aside.told, sent, aside.send], **QUIET)

    def send(found: Sent | None) -> list[Any]:
        if found is None:
            return [gr.skip() for _ in (*controls, tabs)]
        filled = of_form.filled_with(found.request, found.expanded_prompt)
        return [*filled, gr.Tabs(selected="create")]

    aside.send.click(send, sent, [*controls.values(), tabs], **QUIET)


def _connect_system(info: SystemInfo, aside: layout.Aside) -> dict[str, Any]:
    """What the doctor says and the log, read when somebody looks."""
    outputs = [aside.checks, aside.log, aside.text]
    look: dict[str, Any] = {"fn": info.look, "inputs": None, "outputs": outputs, **QUIET}
    gr.on([aside.system.select, aside.again.click], **look)
    return look


def _connect_jobs(handlers: Handlers, controls: dict[str, Any], parts: dict[str, Any]) -> None:
    """Generate, Stop, the timer and the results."""
    watched, pinned, shown = gr.State(None), parts["pinned"], parts["shown"]
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
        max_file_size=options.upload_bytes,
        theme=theme.studio_theme(),
        css_paths=[theme.STYLE_FILE],
        head="".join(
            f"<script>{file.read_text(encoding='utf-8')}</script>" for file in theme.SCRIPT_FILES
        ),
    )
    # gradio checks that a file named by a caller was really uploaded only on pages it "launched" itself.
    page.has_launched = True
    return app

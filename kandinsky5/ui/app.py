"""The studio's page, and the application that serves it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from fastapi import FastAPI

from kandinsky5.ui import choices, layout, queue_tab, settings_page, theme, user_presets_page, views
from kandinsky5.ui.expansion import Expansion
from kandinsky5.ui.form_events import (
    QUIET,
    connect_batch,
    connect_form,
    connect_sizes,
    connect_tokens,
)
from kandinsky5.ui.form_handlers import OUTLOOK_FIELDS, FormHandlers
from kandinsky5.ui.handlers import Handlers
from kandinsky5.ui.job_events import POLL_S, connect_jobs
from kandinsky5.ui.machine_notice import MachineNotice
from kandinsky5.ui.options import StudioOptions
from kandinsky5.ui.planning import Planner
from kandinsky5.ui.prompt_tokens import PromptTokens, Tokenizers
from kandinsky5.ui.queue_calls import QueueCalls
from kandinsky5.ui.queue_handlers import QueueHandlers
from kandinsky5.ui.remembered import KEPT_NAMES
from kandinsky5.ui.routes import result_routes, with_door
from kandinsky5.ui.settings import StudioSettings
from kandinsky5.ui.settings_events import connect_settings, connect_user_presets
from kandinsky5.ui.settings_page import SettingsHandlers
from kandinsky5.ui.system_info import SystemInfo
from kandinsky5.ui.user_presets import UserPresets
from kandinsky5.ui.user_presets_page import UserPresetHandlers
from kandinsky5.ui.video_info import Sent, looked_into

if TYPE_CHECKING:
    from kandinsky5.worker.client import WorkerClient

QUEUE_SLEEP_S = 0.02
"""Between two looks into gradio's own queue, which nothing of the page is put into: each costs a wake-up."""
ASK_AGAIN_S = 0.4
"""Between two looks at what the worker says of a file, or at a prompt that it rewrites."""


def build(
    client: WorkerClient,
    settings: StudioSettings,
    presets: UserPresets,
    machine: MachineNotice | None = None,
) -> gr.Blocks:
    """The page: what to make on the left, what happens on the right."""
    options = settings.options
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(options.uploads_dir)
    planner = Planner(machine, options.device, client.worker_pid)
    handlers = Handlers(client, settings)

    def models_dirs() -> Sequence[Path]:
        return settings.folders.models_dirs

    of_form = FormHandlers(client, choices.weights_in(models_dirs), planner, settings)
    with gr.Blocks(title="K1", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(layout.HEADER, js_on_load=None)
        for text in filter(None, (*settings.notices, presets.notice)):
            gr.HTML(views.notice(text), js_on_load=None, apply_default_css=False)
        notice = gr.HTML("", elem_id="k1-notice", js_on_load=None, apply_default_css=False)
        with gr.Tabs(selected="create", elem_id="k1-tabs") as tabs:
            with gr.Tab("Create", id="create"):
                editing_line = queue_tab.editing_line()
                with gr.Row(elem_id="k1-create", equal_height=False):
                    with gr.Column(scale=5, min_width=320, elem_id="k1-left"):
                        left = layout.left(of_form.presets)
                    with gr.Column(scale=6, min_width=320, elem_id="k1-right"):
                        parts = layout.right()
            queue = queue_tab.build()
            aside = layout.aside(options)
        parts |= {"pinned": gr.State(None), "shown": gr.State({}), "editing": gr.State(None)}
        parts["editing_line"] = editing_line
        connect_form(of_form, left, parts)
        connect_sizes(page, of_form, left)
        connect_tokens(page, PromptTokens(client, Tokenizers(models_dirs)), left)
        connect_batch(page, left, parts["generate"])
        _connect_memory(page, of_form, left.controls)
        _connect_expansion(page, Expansion(client), left, parts)
        of_queue, every = QueueHandlers(client, of_form.filled_with), list(left.controls.values())
        tell_editing = queue_tab.connect_editing(of_queue, parts)
        connect_jobs(handlers, every, parts, tell_editing=tell_editing)
        queue_tab.connect(
            of_queue,
            queue,
            tabs=tabs,
            form=every,
            editing=parts["editing"],
            tell_editing=tell_editing,
        )
        _connect_info(of_form, left.controls, aside, tabs)
        system = _connect_system(SystemInfo(machine, options.state_dir / "worker.log"), aside)
        outlook = _connect_outlook(page, of_form, left, parts["player"])
        own = UserPresetHandlers(presets, of_form)
        connect_user_presets(page, left.own, own, left.controls)
        changing = SettingsHandlers(settings, client, of_form)
        connect_settings(page, aside.settings, changing, left.controls, then=outlook)
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
            *QueueCalls(handlers).functions,
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
        js="async () => [await window.k1.remembered()]",
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


def studio_app(
    client: WorkerClient,
    options: StudioOptions,
    machine: MachineNotice | None = None,
    settings: StudioSettings | None = None,
) -> FastAPI:
    """The whole of what the server serves: the door, the results, the page."""
    settings, presets = settings or StudioSettings(options), UserPresets(options.state_dir)
    page = build(client, settings, presets, machine)
    app = FastAPI(title="K1", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(result_routes(client))
    app.include_router(settings_page.page_route(settings))
    app.include_router(user_presets_page.export_route(presets))
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

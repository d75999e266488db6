"""The tab “Queue & history”: where its parts stand, and what connects them with their handlers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from kandinsky5.ui import history_views, queue_views
from kandinsky5.ui.form_events import QUIET
from kandinsky5.ui.queue_handlers import PAUSE, QueueHandlers

TITLE = "Queue & history"
LOOK_EVERY_S = 1.0
ON_LIST = "window.k1.wireJobs(element, trigger, watch);"
ON_RUNNING = (
    """const tell = () => window.k1.runningChanged(element); tell(); watch('value', tell);"""
)
ON_EDITING = """element.addEventListener('click', e => {
if (e.target.closest('[data-act]')) trigger('click', {}); });"""


@dataclass
class QueueTab:
    """The parts of the tab.

    Attributes:
        tab: looked at while it is chosen.
        pause, stop: of the queue, and of the job that runs.
        problem: why something was not done.
        notice, running, waiting, history: what is shown of a pause and of jobs.
    """

    tab: gr.Tab
    pause: gr.Button
    stop: gr.Button
    problem: gr.HTML
    notice: gr.HTML
    running: gr.HTML
    waiting: gr.HTML
    history: gr.HTML


def build() -> QueueTab:
    """The tab, empty."""
    with gr.Tab(TITLE, id="queue") as tab:
        with gr.Column(elem_classes=["k1-sheet"], elem_id="k1-queue"):
            with gr.Row(elem_id="k1-queue-head"):
                _html("k1-queue-title", '<h2 class="k1-h2">Queue</h2>')
                pause = gr.Button(PAUSE, elem_id="k1-pause", scale=0, min_width=150)
                stop = gr.Button(
                    "Stop", elem_id="k1-queue-stop", scale=0, min_width=90, interactive=False
                )
            problem, notice = _html("k1-queue-problem"), _html("k1-queue-notice")
            with gr.Row(elem_id="k1-now-row"):
                _html("k1-now-picture", '<div class="k1-stage"></div>')
                running = _html("k1-now", script=ON_RUNNING)
            waiting = _html("k1-waits", queue_views.EMPTY, script=ON_LIST)
        with gr.Column(elem_classes=["k1-sheet"], elem_id="k1-history"):
            _html("k1-history-title", '<h2 class="k1-h2">History</h2>')
            history = _html("k1-past", history_views.EMPTY, script=ON_LIST)
    return QueueTab(tab, pause, stop, problem, notice, running, waiting, history)


def editing_line() -> gr.HTML:
    """The place above the form that says which waiting job it changes."""
    return _html("k1-editing", script=ON_EDITING)


def _html(name: str, text: str = "", script: str | None = None) -> gr.HTML:
    return gr.HTML(text, elem_id=name, js_on_load=script, apply_default_css=False)


def connect_editing(handlers: QueueHandlers, create: dict[str, Any]) -> dict[str, Any]:
    """What is said of the waiting job that the form changes, and the button that stands for Generate then.

    Args:
        create: parts of the tab “Create”.

    Returns:
        The event that says it, to follow whatever makes it another job or none.
    """
    editing, line, said = create["editing"], create["editing_line"], gr.State("")
    timer = gr.Timer(LOOK_EVERY_S, active=False)
    tell: dict[str, Any] = {
        "fn": handlers.editing,
        "inputs": [editing, said],
        "outputs": [line, create["generate"], create["replace"], timer, said],
        **QUIET,
    }
    timer.tick(**tell)
    line.click(lambda: None, None, editing, **QUIET).then(**tell)
    return tell


def connect(
    handlers: QueueHandlers,
    parts: QueueTab,
    *,
    tabs: gr.Tabs,
    form: list[Any],
    editing: gr.State,
    tell_editing: dict[str, Any],
) -> None:
    """Buttons, lists and the timer, which runs while the tab is looked at.

    Args:
        form: the form's controls.
        editing: the waiting job that the form changes.
        tell_editing: says what is being changed, once that is another job or none.
    """
    offset, shown, timer = gr.State(0), gr.State({}), gr.Timer(LOOK_EVERY_S, active=False)
    look: dict[str, Any] = {
        "fn": handlers.look,
        "inputs": [offset, shown],
        "outputs": [
            parts.pause,
            parts.stop,
            parts.notice,
            parts.running,
            parts.waiting,
            parts.history,
            offset,
            shown,
        ],
        **QUIET,
    }
    timer.tick(**look)
    parts.tab.select(**look)
    tabs.select(_looks, None, timer, **QUIET)
    parts.pause.click(handlers.pause_pressed, shown, None, **QUIET).then(**look)
    parts.stop.click(
        handlers.stop_running,
        [shown, gr.Textbox(visible=False)],
        None,
        js="(shown, mode) => [shown, window.k1.stopMode()]",
        **QUIET,
    ).then(**look)
    for part in (parts.waiting, parts.history):
        part.click(handlers.pressed, offset, [offset, parts.problem], **QUIET).then(**look)
        part.select(
            handlers.to_form,
            None,
            [*form, tabs, editing, parts.problem, timer],
            **QUIET,
        ).then(**tell_editing)


def _looks(chosen: gr.SelectData) -> gr.Timer:
    return gr.Timer(active=chosen.value == TITLE)

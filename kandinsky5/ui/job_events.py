"""Generate, Stop, the timer and the results of the tab “Create”: what runs when, and what it changes."""

from __future__ import annotations

from typing import Any

import gradio as gr

from kandinsky5.ui.form_events import QUIET
from kandinsky5.ui.handlers import Handlers

POLL_S = 1.0
SHOWN = ("progress", "player", "gallery", "stop", "use", "preview")
"""Parts of which a look at the jobs says what is new."""


def connect_jobs(
    handlers: Handlers, form: list[Any], parts: dict[str, Any], *, tell_editing: dict[str, Any]
) -> None:
    """Connect them.

    Args:
        form: the form's controls.
        parts: of the page, with the state ``editing``: the waiting job that the form changes.
        tell_editing: says what is being changed, once that is another job or none.
    """
    watched, pinned, shown = gr.State(None), parts["pinned"], parts["shown"]
    look: dict[str, Any] = {
        "fn": handlers.refresh,
        "inputs": [watched, pinned, shown],
        "outputs": [*(parts[name] for name in SHOWN), shown],
        **QUIET,
    }
    token = gr.Textbox(visible=False)
    parts["generate"].click(
        handlers.generate,
        [watched, token, *form],
        [watched, pinned, parts["problem"]],
        js="(watched, token, ...values) => [watched, window.k1.token(), ...values]",
        **QUIET,
    ).then(**look)
    editing = parts["editing"]
    parts["replace"].click(
        handlers.replace_waiting,
        [editing, watched, token, *form],
        [watched, pinned, parts["problem"], editing],
        js="(job, watched, token, ...values) => [job, watched, window.k1.token(), ...values]",
        **QUIET,
    ).then(**tell_editing).then(**look)
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

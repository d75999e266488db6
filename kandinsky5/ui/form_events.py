"""Which handler reads and writes which control when something of the form is changed or pressed."""

from __future__ import annotations

from typing import Any

import gradio as gr

from kandinsky5.ui import layout
from kandinsky5.ui.batches import BATCH_FIELDS, batch_told
from kandinsky5.ui.fields import STEERING
from kandinsky5.ui.form_handlers import FormHandlers
from kandinsky5.ui.prompt_tokens import BOXES, TOKEN_FIELDS, PromptTokens
from kandinsky5.ui.sizes import SIZE_FIELDS

QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}


def connect_form(of_form: FormHandlers, left: layout.Left, parts: dict[str, Any]) -> None:
    """Controls that change other controls."""
    controls = left.controls
    every = list(controls.values())
    steering = [controls[name] for name in STEERING]
    controls["mode"].input(of_form.mode_chosen, [controls["mode"], *steering], every, **QUIET)
    controls["preset"].input(of_form.preset_chosen, steering, every, **QUIET)
    steers = [controls[name].input for name in STEERING if name != "preset"]
    gr.on(steers, of_form.steered, steering, every, **QUIET)
    left.dice.click(None, None, controls["seed"], js="() => window.k1.dice()", **QUIET)
    left.last_seed.click(of_form.last_seed, None, controls["seed"], **QUIET)
    controls["image"].upload(
        of_form.picture_given, controls["image"], [controls["image"], parts["problem"]], **QUIET
    )
    shown = parts["pinned"], parts["shown"]
    parts["use"].click(of_form.use_settings, [*shown], every, **QUIET)


def connect_sizes(page: gr.Blocks, of_form: FormHandlers, left: layout.Left) -> None:
    """Buttons, numbers and slider of the size, what is said of it, and the crop."""
    controls, kept = left.controls, gr.State(None)
    watched = [controls[name] for name in SIZE_FIELDS]
    size, width, height = (controls[name] for name in ("size", "width", "height"))
    scale = controls["scale"]
    size.input(of_form.size_chosen, [size, *watched], [width, height, scale], **QUIET)
    for side in (width, height):
        side.input(of_form.side_typed, watched, [size, scale], **QUIET)
    left.swap.click(of_form.swapped, watched, [width, height, size], **QUIET)
    scale.input(
        of_form.scaled,
        [scale, kept, *watched],
        [kept, width, height, size],
        trigger_mode="always_last",
        **QUIET,
    )
    gr.on(
        [page.load, *(control.change for control in watched)],
        of_form.sized,
        watched,
        [left.size_line, left.crop],
        trigger_mode="always_last",
        **QUIET,
    )


def connect_tokens(page: gr.Blocks, tokens: PromptTokens, left: layout.Left) -> None:
    """The prompts are counted while they are typed."""
    watched = [left.controls[name] for name in TOKEN_FIELDS]
    gr.on(
        [page.load, *(control.change for control in (*watched, left.said["loras"]))],
        tokens.told,
        watched,
        [left.tokens[name] for name in BOXES],
        trigger_mode="always_last",
        **QUIET,
    )


def connect_batch(page: gr.Blocks, left: layout.Left, generate: gr.Button) -> None:
    """How many jobs there will be is said before Generate is pressed, and on it."""
    watched = [left.controls[name] for name in BATCH_FIELDS]
    gr.on(
        [page.load, *(control.change for control in watched)],
        batch_told,
        [generate, *watched],
        [left.batch, generate],
        trigger_mode="always_last",
        **QUIET,
    )

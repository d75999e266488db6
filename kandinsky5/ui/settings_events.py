"""Which handler reads and writes which control of the settings and of the user's presets."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from kandinsky5.ui.form_events import QUIET
from kandinsky5.ui.settings_page import FORM_FIELDS, LABELS, SettingsHandlers, SettingsPart
from kandinsky5.ui.user_presets_page import EXPORT_PATH, UserPresetHandlers, UserPresetsPart


def connect_settings(
    page: gr.Blocks,
    part: SettingsPart,
    handlers: SettingsHandlers,
    controls: dict[str, Any],
    *,
    then: dict[str, Any],
) -> None:
    """The section of the settings.

    Args:
        controls: the form's.
        then: the event that looks once more at what the form's files are.
    """
    shown, own = gr.State(None), [part.controls[name] for name in LABELS]
    folders = [part.controls[name] for name in ("models_dirs", "out_dir")]
    in_form = [controls[name] for name in FORM_FIELDS]
    page.load(handlers.shown, None, [*own, shown], **QUIET)
    gr.on(
        [folder.change for folder in folders],
        handlers.looked_at,
        folders,
        [part.models_said, part.out_said],
        trigger_mode="always_last",
        **QUIET,
    )
    part.save.click(
        handlers.saved,
        [controls["mode"], shown, *own],
        [part.line, *own, shown, *in_form],
        **QUIET,
    ).then(**then)


def connect_user_presets(
    page: gr.Blocks,
    part: UserPresetsPart,
    handlers: UserPresetHandlers,
    controls: dict[str, Any],
) -> None:
    """The row of the user's presets; ``controls`` are the form's, in the order of its fields."""
    every, asked = list(controls.values()), gr.State(None)
    told = [asked, part.line, part.yes, part.no, part.chosen, part.row, part.box]
    listed = [page.load, part.box.expand, part.chosen.focus]
    gr.on(listed, handlers.listed, None, [part.chosen, part.row, part.box], **QUIET)
    part.load.click(handlers.loaded, part.chosen, [*every, part.line], **QUIET)
    part.export.click(
        handlers.exported,
        part.chosen,
        part.line,
        js=f"(name) => window.k1.fetchFile({json.dumps(EXPORT_PATH)}, name)",
        **QUIET,
    )
    saving = [part.save.click, part.name.submit]
    gr.on(saving, handlers.saved, [part.name, part.with_prompts, *every], told, **QUIET)
    part.delete.click(handlers.delete_pressed, part.chosen, told, **QUIET)
    part.yes.click(handlers.confirmed, [asked, part.with_prompts, *every], told, **QUIET)
    part.no.click(handlers.declined, None, told, **QUIET)
    part.take_in.upload(handlers.taken_in, part.take_in, told, **QUIET)

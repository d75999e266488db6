"""The user's own presets on the page: a row below the form, and what its buttons do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response

from kandinsky5.errors import K1Error, UserError
from kandinsky5.ui import form, user_presets
from kandinsky5.ui.fields import FIELDS
from kandinsky5.ui.form_handlers import FormHandlers
from kandinsky5.ui.settings_file import reason_of
from kandinsky5.ui.user_presets import Imported, NameTaken, UserPreset, UserPresets, checked_name
from kandinsky5.ui.views import safe

TITLE = "Your presets"
EXPORT_PATH = "/k1/user-preset"
ON_LINE = """watch('value', () => setTimeout(() => { const no = document.getElementById('k1-own-no');
if (no && element.querySelector('.k1-own-question')) no.focus(); }, 50));"""
MAX_LISTED = 4
"""Presets that a line names; the others are counted."""


@dataclass
class UserPresetsPart:
    """The row's components.

    Attributes:
        box: what opens; its label counts the presets.
        row: the list with its buttons, shown once there is a preset.
        chosen, load, export, delete: the list and what is done with the chosen one.
        name, with_prompts, save, take_in: of a new one.
        line, yes, no: what came of it; the buttons of a question.
    """

    box: Any
    row: Any = None
    chosen: Any = None
    load: Any = None
    export: Any = None
    delete: Any = None
    name: Any = None
    with_prompts: Any = None
    save: Any = None
    take_in: Any = None
    line: Any = None
    yes: Any = None
    no: Any = None


def section() -> UserPresetsPart:
    """Make the components where they stand on the page."""
    with gr.Accordion(TITLE, open=False, elem_id="k1-own") as box:
        part = UserPresetsPart(box)
        with gr.Row(elem_classes=["k1-row", "k1-own-row"], visible=False) as part.row:
            part.chosen = gr.Dropdown(
                [],
                label="Saved",
                elem_id="k1-own-chosen",
                elem_classes=["k1-field"],
                filterable=False,
                interactive=True,
                min_width=200,
                scale=3,
            )
            part.load = _button("Load", "load")
            part.export = _button("Export", "export")
            part.delete = _button("Delete", "delete")
        with gr.Row(elem_classes=["k1-row", "k1-own-row"]):
            part.name = gr.Textbox(
                label="Save the form as",
                placeholder="a name",
                max_length=user_presets.MAX_NAME_CHARACTERS,
                elem_id="k1-own-name",
                elem_classes=["k1-field"],
                min_width=200,
                scale=3,
            )
            part.save = _button("Save", "save")
            part.take_in = gr.UploadButton(
                "Import…",
                file_types=[".json"],
                type="filepath",
                elem_id="k1-own-import",
                min_width=84,
                scale=0,
            )
        part.with_prompts = gr.Checkbox(
            True, label="With the prompts", elem_id="k1-own-prompts", elem_classes=["k1-field"]
        )
        part.line = gr.HTML("", elem_id="k1-own-line", js_on_load=ON_LINE, apply_default_css=False)
        with gr.Row(elem_classes=["k1-own-ask"]):
            part.yes = gr.Button(
                "Delete", elem_id="k1-own-yes", visible=False, scale=0, min_width=84
            )
            part.no = gr.Button(
                "Keep it", elem_id="k1-own-no", visible=False, scale=0, min_width=84
            )
    return part


def _button(text: str, name: str) -> gr.Button:
    return gr.Button(text, elem_id=f"k1-own-{name}", min_width=84, scale=0)


@dataclass(frozen=True)
class Question:
    """What the two buttons answer: ``what`` is to become of the preset ``name``."""

    what: str
    name: str


class UserPresetHandlers:
    """What the row's buttons do; they hold no state of a page.

    Args:
        presets: of this studio.
        of_form: fills the form.
    """

    def __init__(self, presets: UserPresets, of_form: FormHandlers) -> None:
        self._presets = presets
        self._of_form = of_form

    def listed(self, **chosen: str | None) -> tuple[Any, Any, Any]:
        """The list as it is by now, its row, and the box with the count.

        Args:
            chosen: ``value=`` lets the list stand there.
        """
        names = list(self._presets.names)
        label = f"{TITLE} ({len(names)})" if names else TITLE
        return (
            gr.update(choices=names, **chosen),
            gr.update(visible=bool(names)),
            gr.update(label=label),
        )

    def loaded(self, name: str | None) -> list[Any]:
        """The form filled with a preset as with a result's settings, and what came of it."""
        try:
            preset = self._presets.get(_chosen(name))
            if "crf" in preset.leaves:
                preset = dataclasses.replace(preset, request=self._with_default_crf(preset))
            filled = self._of_form.filled_with(preset.request, None)
        except UserError as error:
            return [*(gr.skip() for _ in FIELDS), _problem(error)]
        return [*_without(filled, preset.leaves), _line(f"Loaded “{name}”.")]

    def _with_default_crf(self, preset: UserPreset) -> Any:
        return dataclasses.replace(preset.request, crf=self._of_form.settings().crf)

    def saved(self, name: str, with_prompts: bool, *values: Any) -> tuple[Any, ...]:
        """Keep the form under a name; asks first where there is one of that name."""
        return self._save(name, with_prompts, values, replace=False)

    def _save(
        self, name: str, with_prompts: bool, values: Sequence[Any], *, replace: bool
    ) -> tuple[Any, ...]:
        try:
            name = checked_name(name)
            kept = kept_of(dict(zip(_NAMES, values, strict=True)), with_prompts=with_prompts)
            replaced = self._presets.save(name, kept, replace=replace)
        except NameTaken:
            return self._asks(
                Question("replace", name), f"“{name}” is there already.", "Replace it"
            )
        except K1Error as error:
            return self._told(_problem(error))
        done = "Replaced" if replaced else "Saved"
        return self._told(_line(f"{done} “{name}”."), value=name)

    def delete_pressed(self, name: str | None) -> tuple[Any, ...]:
        """Ask before a preset goes."""
        try:
            known = _chosen(name)
        except UserError as error:
            return self._told(_problem(error))
        return self._asks(Question("delete", known), f"Delete “{known}” for good?", "Delete it")

    def confirmed(
        self, question: Question | None, with_prompts: bool, *values: Any
    ) -> tuple[Any, ...]:
        """Do what was asked about."""
        if question is None:
            return self._told("")
        if question.what == "replace":
            return self._save(question.name, with_prompts, values, replace=True)
        try:
            self._presets.delete(question.name)
        except K1Error as error:
            return self._told(_problem(error))
        return self._told(_line(f"Deleted “{question.name}”."), value=None)

    def declined(self) -> tuple[Any, ...]:
        """Leave everything as it is."""
        return self._told("")

    def exported(self, name: str | None) -> str:
        """Say what becomes of the export, which the browser fetches by itself."""
        try:
            self._presets.exported(_chosen(name))
        except UserError as error:
            return _problem(error)
        return _line(f"Your browser saves “{name}” as {file_name_of(str(name))}.")

    def taken_in(self, path: str | None) -> tuple[Any, ...]:
        """Add the presets of a file from anywhere."""
        try:
            content, file_name = _content_of(path)
            imported = self._presets.take_in(content, file_name=file_name)
        except K1Error as error:
            return self._told(_problem(error))
        last = {"value": imported.names[-1]} if imported.names else {}
        return self._told(_imported_line(imported), **last)

    def _asks(self, question: Question, text: str, button: str) -> tuple[Any, ...]:
        shown = gr.update(visible=True)
        return (
            question,
            f'<p class="k1-own-question" role="alert">{safe(text)}</p>',
            gr.update(visible=True, value=button),
            shown,
            *self.listed(),
        )

    def _told(self, line: str, **chosen: str | None) -> tuple[Any, ...]:
        """What came of it, with the list as it is now; ``chosen`` as for :meth:`listed`."""
        hidden = gr.update(visible=False)
        return None, line, hidden, hidden, *self.listed(**chosen)


_NAMES = tuple(field.name for field in FIELDS)


def kept_of(values: Mapping[str, Any], *, with_prompts: bool) -> dict[str, Any]:
    """What is kept of a filled form; its prompt may be empty, its picture stays out.

    Raises:
        UserError: naming the field that cannot be used.
    """
    prompt = user_presets.draft_prompt(values["prompt"])
    request = form.draft_request({**values, "prompt": prompt, "image": None})
    leave = ["crf"] if not str(values["crf"] or "").strip() else []
    if not str(values["prompt"] or "").strip():
        leave.append("prompt")
    return user_presets.request_kept(request, with_prompts=with_prompts, leave=tuple(leave))


def _without(updates: list[Any], leaves: Sequence[str]) -> list[Any]:
    """Updates of the form's controls that leave some values, and the picture, as they stand."""
    left = {*leaves, "image"} - {"crf"}
    return [
        {key: value for key, value in update.items() if key != "value"}
        if field.request_field in left and isinstance(update, dict)
        else update
        for field, update in zip(FIELDS, updates, strict=True)
    ]


def _chosen(name: str | None) -> str:
    if not name:
        raise UserError("name", "", "choose a saved one first")
    return str(name)


def _content_of(path: str | None) -> tuple[bytes, str]:
    file = Path(path or "")
    try:
        with file.open("rb") as opened:
            return opened.read(user_presets.MAX_FOREIGN_BYTES + 1), file.name
    except OSError as error:
        raise UserError("file", file.name, f"a file that can be read ({error.strerror})") from error


def _line(text: str) -> str:
    return f'<p class="k1-hint" role="status">{safe(text)}</p>'


def _problem(error: K1Error) -> str:
    text = form.problem_text(error) if isinstance(error, UserError) else reason_of(error)
    return f'<p class="k1-problem" role="alert">{safe(text)}</p>'


def _imported_line(imported: Imported) -> str:
    lines = []
    if imported.names:
        text = f"Imported {_listed([f'“{name}”' for name in imported.names])}."
        if imported.left_out:
            text += f" Left out, as no preset holds them: {', '.join(imported.left_out)}."
        lines.append(_line(text))
    if imported.refused:
        reasons = [f"“{name}”: {_short(reason)}" for name, reason in imported.refused]
        lines.append(
            f'<p class="k1-problem" role="alert">Not imported: {safe(_listed(reasons))}</p>'
        )
    return "".join(lines) or _line("The file holds no presets.")


def _listed(items: Sequence[str]) -> str:
    more = len(items) - MAX_LISTED
    return ", ".join(items[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:159]}…"


def file_name_of(name: str) -> str:
    """The name of the file that a preset is exported to."""
    plain = re.sub(r"[^\w-]+", "-", name).strip("-")
    return f"k1-preset-{plain or 'unnamed'}.json"


def export_route(presets: UserPresets) -> APIRouter:
    """``GET /k1/user-preset?name=…``: one preset as a file."""
    router = APIRouter()

    @router.get(EXPORT_PATH)
    def exported(name: str) -> Response:
        try:
            content = presets.exported(name)
        except UserError:
            return PlainTextResponse("No such preset.", 404)
        disposition = f"attachment; filename*=UTF-8''{quote(file_name_of(name))}"
        headers = {"Content-Disposition": disposition, "Cache-Control": "no-store"}
        return Response(content, media_type="application/json", headers=headers)

    return router

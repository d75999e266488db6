"""The settings on the page: a section of “System”, and what Save does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from fastapi import APIRouter
from fastapi.responses import JSONResponse

from kandinsky5.errors import K1Error, UserError
from kandinsky5.request import RANGES
from kandinsky5.ui.settings import THEMES, Settings, StudioSettings
from kandinsky5.ui.settings_file import reason_of
from kandinsky5.ui.settings_folders import FolderTold, models_folders, outputs_folder
from kandinsky5.ui.views import safe
from kandinsky5.worker.client import check_writable

if TYPE_CHECKING:
    from kandinsky5.ui.form_handlers import FormHandlers
    from kandinsky5.ui.options import StudioOptions
    from kandinsky5.worker.client import WorkerClient

LABELS = {
    "models_dirs": "Folders for models",
    "out_dir": "Outputs folder",
    "crf": "Default video CRF",
    "preview": "Live preview in a new form",
    "theme": "Theme",
    "remember_form": "Remember the form in the browser",
}
"""The settings that the page edits, in its order."""
PAGE_PATH = "/k1/page"
FORM_FIELDS = ("crf", "preview", "preset")
"""Fields of the form that show what a setting comes to."""
ON_SAVED = """const tell = () => window.k1 && window.k1.settingsSaved && window.k1.settingsSaved(element);
watch('value', tell);"""


@dataclass
class SettingsPart:
    """The section's components.

    Attributes:
        controls: by the names of the settings.
        models_said, out_said: what the folders are.
        save, line: the button, and what came of it.
    """

    controls: dict[str, Any]
    models_said: Any = None
    out_said: Any = None
    save: Any = None
    line: Any = None


def section(options: StudioOptions) -> SettingsPart:
    """Make the components where they stand on the page."""
    low, high = (int(bound) for bound in RANGES["crf"])
    part = SettingsPart({})
    with gr.Column(elem_id="k1-settings"):
        _models_and_outputs(part, options)
        with gr.Row(elem_classes=["k1-row"]):
            part.controls["crf"] = _control(
                gr.Textbox, "crf", info=f"{low} (lossless) to {high}, from now on", max_lines=1
            )
            part.controls["theme"] = _control(
                gr.Radio,
                "theme",
                choices=[(title, name) for name, title in THEMES.items()],
                info="of this studio in every browser, from now on",
            )
        part.controls["preview"] = _control(
            gr.Checkbox, "preview", info="what the tick stands at when a form is opened anew"
        )
        part.controls["remember_form"] = _control(
            gr.Checkbox,
            "remember_form",
            info="off: nothing typed outlives a reload, and what was kept is forgotten",
        )
        part.save = gr.Button("Save settings", elem_id="k1-settings-save")
        part.line = gr.HTML(
            "", elem_id="k1-settings-line", js_on_load=ON_SAVED, apply_default_css=False
        )
    return part


def _models_and_outputs(part: SettingsPart, options: StudioOptions) -> None:
    also = ", ".join(map(str, options.models_dirs))
    part.controls["models_dirs"] = _control(
        gr.Textbox,
        "models_dirs",
        info="one a line; looked through from the next job on"
        + (f", after --models-dir {also}" if also else ""),
        placeholder="~/ComfyUI/models",
        lines=2,
        max_lines=8,
    )
    part.models_said = _html("k1-settings-models-said")
    from_outside = options.out_dir is not None
    part.controls["out_dir"] = _control(
        gr.Textbox,
        "out_dir",
        info=f"this time --outdir {options.out_dir} decides"
        if from_outside
        else "from the next job on; results made before stay in the list",
        placeholder=f"{Path('outputs').absolute()}",
        max_lines=1,
    )
    part.out_said = _html("k1-settings-out-said")


def _control(kind: Any, name: str, **more: Any) -> Any:
    return kind(
        label=LABELS[name],
        elem_id=f"k1-s-{name}",
        elem_classes=["k1-field"],
        interactive=True,
        **more,
    )


def _html(name: str) -> gr.HTML:
    return gr.HTML("", elem_id=name, js_on_load=None, apply_default_css=False)


class SettingsHandlers:
    """What the section shows and saves.

    Args:
        settings: of this studio.
        client: is told of other folders.
        of_form: knows which presets are here.
    """

    def __init__(
        self, settings: StudioSettings, client: WorkerClient, of_form: FormHandlers
    ) -> None:
        self._settings = settings
        self._client = client
        self._of_form = of_form

    def shown(self) -> tuple[Any, ...]:
        """The value of each control, and these values once more: what was shown."""
        values = _texts(self._settings())
        return (*values.values(), values)

    def looked_at(self, models_dirs: str, out_dir: str) -> tuple[str, str]:
        """What the folders are that stand there."""
        told = [outputs_folder(out_dir)] if self._settings.options.out_dir is None else []
        return _said(models_folders(models_dirs)), _said(told)

    def saved(self, mode: str, shown: Mapping[str, Any] | None, *values: Any) -> tuple[Any, ...]:
        """Save what was changed on this page; what another tab saved meanwhile stays.

        Args:
            mode: of the form.
            shown: what the page showed before.

        Returns:
            What came of it, the value of each control, these values once more; and for the form: CRF, live
            preview and presets.
        """
        typed = dict(zip(LABELS, values, strict=True))
        changed = {
            name: value for name, value in typed.items() if shown is None or shown[name] != value
        }
        try:
            before = self._settings()
            folders = self._settings.folders
            now = self._settings.change(
                {name: self._read(name, value) for name, value in changed.items()}
            )
        except K1Error as error:
            return _problem(error), *(gr.skip() for _ in (*LABELS, "shown", *FORM_FIELDS))
        if self._settings.folders != folders:
            self._client.use_folders(self._settings.folders)
        texts = _texts(now)
        in_form = (
            gr.update(placeholder=str(now.crf)),
            gr.skip() if now.preview == before.preview else now.preview,
            gr.update(choices=self._of_form.presets(mode)),
        )
        return _saved_line(before, now), *texts.values(), texts, *in_form

    def _read(self, name: str, value: Any) -> Any:
        """The setting that a control stands for.

        Raises:
            UserError: naming the setting.
        """
        if name == "models_dirs":
            return self._read_models_dirs(value)
        if name == "out_dir":
            told = outputs_folder(value)
            if told.state == "refused":
                raise UserError(name, told.typed, told.text)
            if told.taken is not None:
                _check_outputs(told.taken)
            return "" if told.taken is None else str(told.taken)
        if name == "crf":
            text = str(value or "").strip()
            return int(text) if text.isdecimal() and len(text) < 9 else value
        return value

    def _read_models_dirs(self, text: str) -> tuple[str, ...]:
        """The folders named; one that was saved before may be gone for a while, with its disk."""
        known = self._settings().models_dirs
        folders = []
        for told in models_folders(text):
            if told.taken is None and told.typed not in known:
                raise UserError("models_dirs", told.typed, told.text)
            folders.append(told.typed if told.taken is None else str(told.taken))
        return tuple(folders)


def _check_outputs(folder: Path) -> None:
    try:
        check_writable(folder)
    except UserError as error:
        raise UserError("out_dir", str(folder), "no file can be written there") from error


def _texts(settings: Settings) -> dict[str, Any]:
    """What each control shows."""
    values = {name: getattr(settings, name) for name in LABELS}
    return {
        **values,
        "models_dirs": "\n".join(settings.models_dirs),
        "crf": str(settings.crf),
    }


def _said(folders: Sequence[FolderTold]) -> str:
    return "".join(
        f'<p class="k1-file" data-state="{told.state}"><b>{safe(told.typed)}</b> {safe(told.text)}</p>'
        for told in folders
        if told.text
    )


def _problem(error: K1Error) -> str:
    if not isinstance(error, UserError):
        return f'<p class="k1-problem" role="alert">Not saved: {safe(error)}</p>'
    label = LABELS.get(error.field, error.field)
    given = str(error.given or "")
    shown = f" “{given if len(given) <= 80 else given[:79] + '…'}”:" if given.strip() else ""
    text = f"Not saved. {label}:{shown} {reason_of(error)}."
    return f'<p class="k1-problem" role="alert" data-setting="{safe(error.field)}">{safe(text)}</p>'


def _saved_line(before: Settings, now: Settings) -> str:
    """What was saved and from when on it counts, with what the browser is to do."""
    folders = ("models_dirs", "out_dir")
    if before == now:
        text = "Nothing to save: all this is saved already."
    elif any(getattr(before, name) != getattr(now, name) for name in folders):
        text = "Saved. The folders count from the next job on."
    else:
        text = "Saved."
    look = json.dumps(page_settings(now))
    return f'<p class="k1-hint" role="status" data-look="{safe(look)}">{text}</p>'


def page_settings(settings: Settings) -> dict[str, Any]:
    """What a browser has to know before the page is there."""
    return {"theme": settings.theme, "rememberForm": settings.remember_form}


def page_route(settings: StudioSettings) -> APIRouter:
    """``GET /k1/page``: :func:`page_settings`, asked by every page before it shows itself."""
    router = APIRouter()

    @router.get(PAGE_PATH)
    def page() -> JSONResponse:
        return JSONResponse(page_settings(settings()), headers={"Cache-Control": "no-store"})

    return router

"""What controls do to other controls, and what is said of what the form holds. Nothing here computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import gradio as gr

from kandinsky5.errors import UserError
from kandinsky5.presets import PRESETS, Preset
from kandinsky5.request import GenerationRequest
from kandinsky5.ui import choices, form, plan_views, remembered, views
from kandinsky5.ui.crops import crop_view
from kandinsky5.ui.fields import (
    FIELDS,
    LORA_ROWS,
    STEERING,
    is_shown,
    placeholder_of,
    shown_lora_rows,
)
from kandinsky5.ui.file_views import file_line, missing_line
from kandinsky5.ui.model_files import FILE_FIELDS, LORA_NAMES, FilesTold, files_told, missing_parts
from kandinsky5.ui.pictures import check_picture
from kandinsky5.ui.planning import PLAN_FIELDS
from kandinsky5.ui.settings import Settings
from kandinsky5.ui.sizes import Frame, Scaled, percent_of, size_line

if TYPE_CHECKING:
    from kandinsky5.ui.planning import Planner
    from kandinsky5.worker.client import WorkerClient

HISTORY_LENGTH = 36
OF_THE_IMAGE = "the size follows from the image"
OUTLOOK_FIELDS = tuple(dict.fromkeys((*PLAN_FIELDS, *FILE_FIELDS)))
"""Fields on which it depends what is said of memory and of files."""


class FormHandlers:
    """The handlers of one studio's form.

    Args:
        client: of the worker.
        is_here: whether a preset's weights are on this machine.
        planner: makes the memory plan; None shows none.
        settings: gives the user's settings of the moment.
    """

    def __init__(
        self,
        client: WorkerClient,
        is_here: Callable[[Preset], bool],
        planner: Planner | None = None,
        settings: Callable[[], Settings] = Settings,
    ) -> None:
        self.client = client
        self.is_here = is_here
        self.planner = planner
        self.settings = settings

    def presets(self, mode: str) -> list[tuple[str, str]]:
        """Choices of presets for a mode."""
        return choices.preset_choices(mode, self.is_here)

    def outlook(self, *values: Any) -> tuple[Any, ...]:
        """What is said of the form as it stands.

        Args:
            values: of the controls of :data:`OUTLOOK_FIELDS`.

        Returns:
            The memory plan, a line on the preset's files, on the checkpoint, on the model folder and on the
            LoRAs, whether each row of LoRAs is shown, and whether to ask again in a moment.
        """
        named = dict(zip(OUTLOOK_FIELDS, values, strict=True))
        files = files_told(self.client, named)
        shown = shown_lora_rows(named)
        rows = [gr.update(visible=number <= shown) for number in range(1, LORA_ROWS + 1)]
        waits = {
            name: files.pending and bool(named[name]) for name in ("dit", "model_dir", "lora_1")
        }

        def line(*names: str) -> str:
            told = FilesTold(files.said, pending=waits[names[0]])
            return file_line(told, *names)

        preset = PRESETS.get(named["preset"])
        missing: tuple[str, ...] | None = ()
        if preset and not preset.is_builtin and not str(named["model_dir"] or "").strip():
            missing = missing_parts(self.client, preset.name)
            if named["dit"]:
                missing = missing and tuple(part for part in missing if part != "transformer")
        return (
            self._plan({name: named[name] for name in PLAN_FIELDS}, files),
            missing_line(preset, missing or ()) if preset else "",
            line("dit"),
            line("model_dir"),
            line(*LORA_NAMES),
            *rows,
            gr.Timer(active=files.pending or missing is None),
        )

    def _plan(self, named: dict[str, Any], files: FilesTold) -> str:
        if self.planner is None:
            return ""
        try:
            preset = PRESETS.get(named["preset"])
            if preset is None:
                raise UserError("preset", named["preset"], "one of the list")
            settings = form.settings_of(named, preset)
            history = self.client.history(limit=HISTORY_LENGTH)
            return plan_views.plan_view(self.planner.outlook(settings, history, files))
        except UserError as error:
            return plan_views.no_plan(form.problem_text(error))

    def picture_given(self, path: str | None) -> tuple[Any, str]:
        """Keep a picture that can be read; otherwise empty the control and say why."""
        try:
            if path:
                check_picture(path)
        except UserError as error:
            return None, views.problem(error.field, form.problem_text(error))
        return gr.skip(), ""

    def last_seed(self) -> Any:
        """The seed of the job that was queued last, be it over or not; nothing happens without one."""
        jobs = (*self.client.queue(), *self.client.history(limit=1))
        if not jobs:
            return gr.skip()
        job = max(jobs, key=lambda job: job.created_at or 0.0)
        seed = (job.result or {}).get("seed", job.request.get("seed"))
        return gr.skip() if seed is None else str(seed)

    def sized(self, *values: Any) -> tuple[str, str]:
        """What is said of the size, and the crop of the picture.

        Args:
            values: of the controls of :data:`~kandinsky5.ui.sizes.SIZE_FIELDS`.
        """
        try:
            frame = Frame.of(*values)
            size, notices = frame.settled()
            if size is None:
                return size_line(OF_THE_IMAGE), ""
            crop = crop_view(frame.picture, size, frame.others) if frame.picture else ""
        except UserError as error:
            return size_line(form.problem_text(error)), ""
        said = "; ".join(notices)
        if not said and not frame.width and not frame.height:
            said = f"{size[0]} × {size[1]}, as the image asks for"
        return size_line(said), crop

    def size_chosen(self, name: str, *values: Any) -> tuple[Any, Any, int]:
        """Width and height of a size that was chosen by its button, and where the slider stands.

        Args:
            values: here and below, of the controls of :data:`~kandinsky5.ui.sizes.SIZE_FIELDS`.
        """
        frame = Frame.of(*values)
        width, height = choices.size_of(name, frame.width, frame.height)
        return width, height, percent_of(frame.preset, width, height)

    def side_typed(self, *values: Any) -> tuple[str, int]:
        """The button of the size that was typed, and where the slider stands."""
        frame = Frame.of(*values)
        sides = frame.width, frame.height
        return choices.size_name(frame.preset, *sides), percent_of(frame.preset, *sides)

    def scaled(self, percent: Any, kept: Scaled | None, *values: Any) -> tuple[Any, ...]:
        """The slider moved: what it made so far, width, height and the button of the size."""
        frame = Frame.of(*values)
        made = frame.scaled(float(percent or 0), kept)
        return made, *made.size_px, choices.size_name(frame.preset, *made.size_px)

    def swapped(self, *values: Any) -> tuple[Any, ...]:
        """Width and height the other way round, and the button of the size."""
        frame = Frame.of(*values)
        size = frame.swapped()
        return *size, choices.size_name(frame.preset, *size)

    def use_settings(self, pinned: str | None, shown: dict[str, str]) -> list[Any]:
        """Fill the form with what made the shown result, its seed and its expanded prompt included."""
        try:
            job = self.client.status(pinned or shown.get("result") or "")
        except KeyError:
            return [gr.skip() for _ in FIELDS]
        made = job.result or {}
        request = GenerationRequest.from_dict(job.request)
        if request.seed is None and made.get("seed") is not None:
            request = dataclasses.replace(request, seed=made["seed"])
        return self.filled_with(request, made.get("expanded_prompt"))

    def filled_with(self, request: GenerationRequest, expanded_prompt: str | None) -> list[Any]:
        """The form filled with a request, and with what its prompt was rewritten to."""
        try:
            values = form.values_of(request)
        except UserError as error:
            raise gr.Error(form.problem_text(error), print_exception=False) from error
        if expanded_prompt:
            values["expanded_prompt"] = expanded_prompt
        values["crf"] = "" if request.crf == self.settings().crf else str(request.crf)
        return self._updates(values, PRESETS[request.preset])

    def restored(self, kept: str | None) -> list[Any]:
        """The form as the browser kept it; a new one when it kept nothing readable."""
        values = remembered.values_from(kept)
        if values is None:
            settings = self.settings()
            new = {
                "preview": gr.update(value=settings.preview),
                "crf": gr.update(placeholder=str(settings.crf)),
            }
            return [new.get(field.name, gr.skip()) for field in FIELDS]
        return self._updates(values, PRESETS[values["preset"]])

    def mode_chosen(self, mode: str, *steering: Any) -> list[Any]:
        """The first preset of the mode, with its defaults.

        Args:
            steering: values of the controls of :data:`kandinsky5.ui.fields.STEERING`.
        """
        preset = PRESETS[self.presets(mode)[0][1]]
        return self._chosen(preset, steering)

    def preset_chosen(self, *steering: Any) -> list[Any]:
        """The defaults of the preset; ``steering`` as for :meth:`mode_chosen`."""
        return self._chosen(PRESETS[steering[0]], steering)

    def _chosen(self, preset: Preset, steering: tuple[Any, ...]) -> list[Any]:
        given = dict(zip(STEERING, steering, strict=True))
        values = {"preset": preset.name, **choices.preset_values(preset)}
        return self._updates(values, preset, {**given, "preset": preset.name})

    def steered(self, *steering: Any) -> list[Any]:
        """Show the controls that take part now; their values stay."""
        given = dict(zip(STEERING, steering, strict=True))
        preset = PRESETS[given["preset"]]
        return [gr.update(visible=is_shown(field, preset, given)) for field in FIELDS]

    def _updates(
        self, values: dict[str, Any], preset: Preset, steering: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """An update for each control: its value where one is given, its choices, whether it is shown."""
        updates = []
        for field in FIELDS:
            shown = is_shown(field, preset, values if steering is None else steering)
            change: dict[str, Any] = {"visible": shown}
            if field.name in values:
                change["value"] = values[field.name]
            if field.name == "preset":
                change["choices"] = self.presets(preset.mode)
            elif field.name == "size":
                change["choices"] = choices.size_choices(preset)
            elif field.name == "crf":
                change["placeholder"] = str(self.settings().crf)
            elif field.name == "scale" and "width" in values:
                change["value"] = percent_of(preset, values["width"], values["height"])
            elif field.name.startswith("nabla_"):
                change["placeholder"] = placeholder_of(field, preset)
            updates.append(gr.update(**change))
        return updates

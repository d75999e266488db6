"""“Expand now”: the worker rewrites the prompt, and the text can be read and edited before it is used."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from kandinsky5.errors import K1Error, UserError
from kandinsky5.presets import PRESETS
from kandinsky5.ui import form, views
from kandinsky5.ui.fields import FIELDS

if TYPE_CHECKING:
    from kandinsky5.worker.client import JobSnapshot, WorkerClient

NAMES = tuple(field.name for field in FIELDS)
BUTTON, STOP_BUTTON = "Expand now", "Stop writing"
MUTE = "The demo's text encoder does not write: the prompt is used as it is."
IDLE = (
    "Rewritten in more detail when the job runs; or now, to be read and edited before it is used."
)
IN_USE = "What stands above is used in the prompt's place; empty it to have it written anew."
OF_ANOTHER = "What stands above was written for another prompt: expand again, or empty it."
OFF = "The prompt is used as it is."


@dataclass(frozen=True)
class Shown:
    """What of the form the line under the box depends on.

    Attributes:
        written_for: the prompt that the text in the box was written for, as far as this page knows.
    """

    preset: str
    expand: bool
    text: str
    prompt: str
    written_for: str | None = None

    @property
    def line(self) -> str:
        """What becomes of the prompt as the form stands."""
        if PRESETS[self.preset].is_builtin:
            return _line(MUTE)
        if not self.expand:
            return _line(OFF)
        if not str(self.text or "").strip():
            return _line(IDLE)
        moved_on = self.written_for and self.written_for != str(self.prompt or "").strip()
        return _line(OF_ANOTHER if moved_on else IN_USE)


class Expansion:
    """Its handlers; they hold no state of a page.

    Args:
        client: of the worker.
    """

    def __init__(self, client: WorkerClient) -> None:
        self.client = client

    def pressed(self, running: str | None, token: str, *values: Any) -> tuple[Any, ...]:
        """Have the prompt rewritten; while it is, stop that.

        Args:
            running: the job that rewrites for this page.
            values: of all controls.

        Returns:
            As :meth:`look`, and the problem to show.
        """
        named = dict(zip(NAMES, values, strict=True))
        preset, problem = named["preset"], ""
        try:
            if running:
                self.client.stop(running, "discard")
            else:
                request = form.request_from(named)
                asked = dataclasses.replace(request, expand=True, expanded_prompt=None)
                running = self.client.expand(asked, token=token or None)
        except UserError as error:
            problem = views.problem(error.field, form.problem_text(error))
        except K1Error as error:
            problem = views.problem("", str(error))
        return (*self.look(running, preset), problem)

    def look(self, running: str | None, preset: str) -> tuple[Any, ...]:
        """How the rewriting goes.

        Args:
            running: the job that does it for this page.
            preset: that stands in the form.

        Returns:
            The job to look at again or None, the box, the line under it, the button, the timer, and the
            prompt that the text was written for.
        """
        job = self._job(running)
        if job is None:
            return None, gr.skip(), gr.skip(), _button(preset), gr.Timer(active=False), gr.skip()
        if views.is_active(job):
            box = gr.update(value=job.expanded_prompt or "", interactive=False)
            button = gr.update(value=STOP_BUTTON, interactive=not job.is_stopping)
            return job.id, box, _line(_progress(job)), button, gr.Timer(active=True), gr.skip()
        box, line = _outcome(job)
        prompt = str(job.request.get("prompt", "")).strip()
        return None, box, _line(line), _button(preset), gr.Timer(active=False), prompt

    def changed(self, running: str | None, *shown: Any) -> tuple[Any, Any]:
        """The line and the button after an edit of what they depend on.

        Args:
            shown: in the order of :class:`Shown`.
        """
        if running:
            return gr.skip(), gr.skip()
        return Shown(*shown).line, _button(shown[0])

    def found(self) -> tuple[Any, Any]:
        """For a page that was loaded again: the job that rewrites now, and the timer."""
        for job in self.client.queue():
            if job.kind == "expand":
                return job.id, gr.Timer(active=True)
        return None, gr.skip()

    def _job(self, job_id: str | None) -> JobSnapshot | None:
        try:
            return self.client.status(job_id) if job_id else None
        except KeyError:
            return None


def _outcome(job: JobSnapshot) -> tuple[Any, str]:
    """The box and the line once a job is over."""
    made = job.result or {}
    if job.state == "stopped":
        return gr.update(interactive=True), "Stopped; what was written so far can be used."
    if job.state != "done":
        return gr.update(interactive=True), f"Not expanded: {job.message or 'the log says more'}"
    if text := made.get("expanded_prompt"):
        return gr.update(value=text, interactive=True), IN_USE
    notices = made.get("notices") or ["the text encoder wrote nothing of use"]
    return gr.update(value="", interactive=True), str(notices[-1])


def _progress(job: JobSnapshot) -> str:
    if job.state == "queued":
        return "Waits for the job that runs…"
    words = len((job.expanded_prompt or "").split())
    if words and job.stage == "expand":
        return f"Writing… {words} word{'s' * (words > 1)}"
    return f"{views.STAGE_WORDS.get(job.stage or '', 'Starting')}…"


def _button(preset: str) -> Any:
    return gr.update(value=BUTTON, interactive=not PRESETS[preset].is_builtin)


def _line(text: str) -> str:
    return f'<p class="k1-hint" role="status">{views.safe(text)}</p>'

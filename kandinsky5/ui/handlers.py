"""What the controls do: put jobs in the queue, read how they fare. Nothing here computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from kandinsky5.errors import K1Error, UserError
from kandinsky5.request import GenerationRequest
from kandinsky5.ui import form, preview_views, views
from kandinsky5.ui.fields import FIELDS
from kandinsky5.ui.form_handlers import HISTORY_LENGTH
from kandinsky5.ui.model_files import files_told

if TYPE_CHECKING:
    from kandinsky5.worker.client import JobSnapshot, WorkerClient

GALLERY_LENGTH = 12
RESUMABLE_LENGTH = 3
"""Jobs that were cut short, listed below the progress; older ones stay in the history."""
SETTING_NAMES = tuple(field.name for field in FIELDS)


class Handlers:
    """The handlers of one studio; they hold no state of a page, which lives in its ``gr.State``.

    Args:
        client: of the worker.
        out_dir: where results go; a request may name no file outside.
    """

    def __init__(self, client: WorkerClient, out_dir: Path) -> None:
        self.client = client
        self.out_dir = out_dir.expanduser().resolve()

    def generate(self, watched: str | None, token: str, *values: Any) -> tuple[Any, Any, str]:
        """Queue what the form says.

        Returns:
            The job to watch, None as the job to show instead of the newest, and the problem to show.
        """
        try:
            named = dict(zip(SETTING_NAMES, values, strict=True))
            request = form.request_from(named)
            if (wrong := files_told(self.client, named).problem) is not None:
                raise UserError(wrong[0], named[wrong[0]], wrong[1])
            job_id = self.client.submit(request, token=token or None)
        except UserError as error:
            return watched, gr.skip(), views.problem(error.field, form.problem_text(error))
        except K1Error as error:
            return watched, gr.skip(), views.problem("", str(error))
        return job_id, None, ""

    def refresh(
        self, watched: str | None, pinned: str | None, shown: dict[str, str]
    ) -> tuple[Any, Any, Any, Any, Any, Any, dict[str, str]]:
        """What changed since the last look.

        Args:
            watched: the job this page started last.
            pinned: the result chosen in the gallery, instead of the newest.
            shown: what the page shows by now, by name of the part.

        Returns:
            Progress, player, gallery, Stop button, "use these settings" button, the preview's data, and
            ``shown`` anew.
        """
        queue = self.client.queue()
        past = self.client.history(limit=HISTORY_LENGTH)
        done = [job for job in past if job.state == "done" and job.output]
        result = self._job(pinned) or next(iter(done), None)
        focus = self._focus(watched, queue)
        if focus is None and past:
            focus = past[0]
        resumable = [job for job in past if job.is_resumable][:RESUMABLE_LENGTH]
        parts = {
            "progress": views.progress(focus, queue, resumable),
            "player": views.player(result),
            "gallery": views.gallery(done[:GALLERY_LENGTH], result.id if result else None),
            "stop": "yes" if focus is not None and views.can_be_stopped(focus) else "",
            "result": result.id if result else "",
            "preview": preview_views.preview_data(focus, beside_result=bool(pinned)),
        }
        new = {name: text for name, text in parts.items() if shown.get(name) != text}
        return (
            new.get("progress", gr.skip()),
            new.get("player", gr.skip()),
            new.get("gallery", gr.skip()),
            gr.update(interactive=bool(new["stop"])) if "stop" in new else gr.skip(),
            gr.update(visible=bool(new["result"])) if "result" in new else gr.skip(),
            new.get("preview", gr.skip()),
            parts,
        )

    def _focus(self, watched: str | None, queue: tuple[JobSnapshot, ...]) -> JobSnapshot | None:
        """The job whose progress a page shows: its own while that is on, else whatever runs."""
        own = self._job(watched)
        if own is not None and views.is_active(own):
            return own
        return queue[0] if queue else own

    def _job(self, job_id: str | None) -> JobSnapshot | None:
        if not job_id:
            return None
        try:
            return self.client.status(job_id)
        except KeyError:
            return None

    def stop_watched(self, watched: str | None, mode: str = "save") -> None:
        """Stop the job whose progress the page shows; by default it can be resumed."""
        job = self._focus(watched, self.client.queue())
        if job is not None and views.is_active(job):
            self.client.stop(job.id, mode or "save")

    def progress_pressed(self, event: gr.EventData) -> tuple[Any, str]:
        """A button in the progress card: stop a listed job, resume one that was cut short, or drop it.

        Returns:
            The job to watch, and the problem to show.
        """
        act, job_id = str(event._data.get("act", "stop")), str(event._data.get("job", ""))
        try:
            if act == "resume":
                self.client.resume(job_id)
                return job_id, ""
            if act == "drop":
                self.client.discard(job_id)
            else:
                self.stop_listed(event)
        except KeyError:
            return gr.skip(), views.problem("", "This job is no longer there.")
        except K1Error as error:
            return gr.skip(), views.problem("", str(error))
        return gr.skip(), ""

    def stop_listed(self, event: gr.EventData) -> None:
        """Stop a job of the list under the progress."""
        if self._job(job_id := str(event._data.get("job", ""))) is not None:
            self.client.stop(job_id, "save")

    def choose(self, event: gr.EventData) -> str | None:
        """The result whose tile was pressed."""
        job = self._job(str(event._data.get("job", "")))
        return job.id if job else None

    def submit(self, request: dict, token: str = "") -> str:
        """Queue a request (the fields of ``k1.py generate``) and return its job's id."""
        return self._queued(self.client.submit, request, token)

    def expand(self, request: dict, token: str = "") -> str:
        """Queue the rewriting of a request's prompt alone; /status tells ``expanded_prompt`` as it grows."""
        return self._queued(self.client.expand, request, token)

    def _queued(self, put: Callable[..., str], request: dict, token: str) -> str:
        try:
            values = json.loads(request) if isinstance(request, str) else request
            made = GenerationRequest.from_dict(values)
            for name in ("out", "save_latents"):
                self._refuse_outside(name, getattr(made, name))
            return put(made, token=token or None)
        except json.JSONDecodeError as error:
            raise gr.Error(f"request: not JSON: {error}", print_exception=False) from error
        except K1Error as error:
            raise gr.Error(str(error), print_exception=False) from error

    def _refuse_outside(self, name: str, path: str | None) -> None:
        if path and not Path(path).expanduser().resolve().is_relative_to(self.out_dir):
            raise UserError(name, path, f"a file in {self.out_dir}")

    def status(self, job_id: str) -> dict:
        """How a job fares: state, stage, step, total, seconds_per_step, eta_s, place, output, message, …"""
        return snapshot_dict(self._known(job_id))

    def stop(self, job_id: str, mode: str = "discard") -> str:
        """Stop a job; returns the state it had."""
        state = self._known(job_id).state
        try:
            self.client.stop(job_id, mode)
        except K1Error as error:
            raise gr.Error(str(error), print_exception=False) from error
        return state

    def resume(self, job_id: str) -> str:
        """Let a job that ended without a result go on from its saved state; returns the state it had."""
        state = self._known(job_id).state
        try:
            self.client.resume(job_id)
        except K1Error as error:
            raise gr.Error(str(error), print_exception=False) from error
        return state

    def discard(self, job_id: str) -> str:
        """Drop what was saved of a job that is over; returns its state."""
        state = self._known(job_id).state
        self.client.discard(job_id)
        return state

    def queue(self) -> list:
        """Jobs that run or wait, in order."""
        return [snapshot_dict(job) for job in self.client.queue()]

    def _known(self, job_id: str) -> JobSnapshot:
        job = self._job(job_id)
        if job is None:
            raise gr.Error(f"job_id: got {job_id!r}; no such job", print_exception=False)
        return job


def snapshot_dict(job: JobSnapshot) -> dict[str, Any]:
    """A snapshot as JSON for programs; ``eta`` is ``eta_s`` under its promised name."""
    names = (
        "id",
        "kind",
        "state",
        "stage",
        "step",
        "total",
        "seconds_per_step",
        "eta_s",
        "place",
        "expanded_prompt",
        "output",
        "message",
        "request",
        "result",
        "created_at",
        "started_at",
        "finished_at",
        "saved_step",
        "saved_at",
    )
    values = {name: getattr(job, name) for name in names}
    return {
        **values,
        "eta": job.eta_s,
        "notices": list(job.notices),
        "previews": list(job.previews),
        "resumable": job.is_resumable,
    }

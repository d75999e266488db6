"""What the controls do: put jobs in the queue, read how they fare. Nothing here computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import gradio as gr

from kandinsky5.errors import K1Error, UserError
from kandinsky5.request import GenerationRequest
from kandinsky5.ui import batches, form, preview_views, views
from kandinsky5.ui.fields import FIELDS
from kandinsky5.ui.form_handlers import HISTORY_LENGTH
from kandinsky5.ui.model_files import files_told
from kandinsky5.ui.settings import Settings

if TYPE_CHECKING:
    from kandinsky5.worker.client import JobSnapshot, WorkerClient

GALLERY_LENGTH = 12
RESUMABLE_LENGTH = 3
"""Jobs that were cut short, listed below the progress; older ones stay in the history."""
SETTING_NAMES = tuple(field.name for field in FIELDS)
Told = TypeVar("Told")


class Handlers:
    """The handlers of one studio; they hold no state of a page, which lives in its ``gr.State``.

    Args:
        client: of the worker.
        settings: gives the user's settings of the moment.
    """

    def __init__(self, client: WorkerClient, settings: Callable[[], Settings] = Settings) -> None:
        self.client = client
        self.settings = settings

    def generate(self, watched: str | None, token: str, *values: Any) -> tuple[Any, Any, str]:
        """Queue what the form says, be it one job or several.

        Returns:
            The (first) job to watch, None as the job to show instead of the newest, and the problem to show.
        """
        try:
            job_id = batches.submitted(self.client, self._requests(values), token)
        except K1Error as error:
            return watched, gr.skip(), _problem(error)
        return job_id, None, ""

    def _requests(self, values: Sequence[Any]) -> list[GenerationRequest]:
        """What the form says, one request or several.

        Raises:
            UserError: naming the field that cannot be used.
        """
        typed = dict(zip(SETTING_NAMES, values, strict=True))
        named = self.settings().with_defaults(typed)
        requests = batches.requests_from(named)
        if (wrong := files_told(self.client, named).problem) is not None:
            raise UserError(wrong[0], named[wrong[0]], wrong[1])
        return requests

    def replace_waiting(
        self, editing: str | None, watched: str | None, token: str, *values: Any
    ) -> tuple[Any, Any, str, str | None]:
        """Let a waiting job make what the form says; what the form says beyond one job is queued behind.

        Args:
            editing: the waiting job; where it has begun meanwhile, new ones are queued. None after the first
                of two presses: nothing is done.

        Returns:
            As :meth:`generate`, and the job that is still being changed.
        """
        if editing is None:
            return watched, gr.skip(), "", None
        try:
            first, *rest = self._requests(values)
            if not self.client.replace(editing, first):
                raise KeyError(editing)
            if rest:
                batches.submitted(self.client, rest, token)
        except KeyError:
            return (*self.generate(watched, token, *values), None)
        except K1Error as error:
            return watched, gr.skip(), _problem(error), editing
        return editing, None, "", None

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
            "progress": views.progress(focus, queue, resumable, self.client.is_paused()),
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
        """A button in the progress card: stop a listed job, resume one that was cut short, drop it, or let
        a paused queue go on.

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
            elif act == "go":
                self.client.set_paused(False)
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
        made = self.request_of(request)
        return told(lambda: put(made, token=token or None))

    def request_of(self, given: dict | str) -> GenerationRequest:
        """The request that a program sent; it may name no file to be written outside the outputs.

        Raises:
            gr.Error: it cannot be used; says why in one line.
        """

        def read() -> GenerationRequest:
            values = json.loads(given) if isinstance(given, str) else given
            made = GenerationRequest.from_dict(values)
            for name in ("out", "save_latents"):
                self._refuse_outside(name, getattr(made, name))
            return made

        try:
            return told(read)
        except json.JSONDecodeError as error:
            raise gr.Error(f"request: not JSON: {error}", print_exception=False) from error

    def _refuse_outside(self, name: str, path: str | None) -> None:
        out_dir = self.client.folders.out_dir.resolve()
        if path and not Path(path).expanduser().resolve().is_relative_to(out_dir):
            raise UserError(name, path, f"a file in {out_dir}")

    def status(self, job_id: str) -> dict:
        """How a job fares: state, stage, step, total, seconds_per_step, eta_s, place, output, message, …"""
        return snapshot_dict(self.known(job_id))

    def stop(self, job_id: str, mode: str = "discard") -> str:
        """Stop a job; returns the state it had."""
        state = self.known(job_id).state
        told(lambda: self.client.stop(job_id, mode))
        return state

    def resume(self, job_id: str) -> str:
        """Let a job that ended without a result go on from its saved state; returns the state it had."""
        state = self.known(job_id).state
        told(lambda: self.client.resume(job_id))
        return state

    def discard(self, job_id: str) -> str:
        """Drop what was saved of a job that is over; returns its state."""
        state = self.known(job_id).state
        self.client.discard(job_id)
        return state

    def queue(self) -> list:
        """Jobs that run or wait, in order."""
        return [snapshot_dict(job) for job in self.client.queue()]

    def known(self, job_id: str) -> JobSnapshot:
        """A job that a program names.

        Raises:
            gr.Error: there is none of this name.
        """
        job = self._job(job_id)
        if job is None:
            raise gr.Error(f"job_id: got {job_id!r}; no such job", print_exception=False)
        return job


def told(act: Callable[[], Told]) -> Told:
    """What an act gives; what it refuses becomes an error that a program is shown in one line."""
    try:
        return act()
    except K1Error as error:
        raise gr.Error(str(error), print_exception=False) from error


def _problem(error: K1Error) -> str:
    """What is wrong with the form, at its field where there is one."""
    if isinstance(error, UserError):
        return views.problem(error.field, form.problem_text(error))
    return views.problem("", str(error))


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
        "seed_drawn",
    )
    values = {name: getattr(job, name) for name in names}
    return {
        **values,
        "eta": job.eta_s,
        "notices": list(job.notices),
        "previews": list(job.previews),
        "resumable": job.is_resumable,
    }

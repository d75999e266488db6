"""What the controls of “Queue & history” do: put jobs in another order, read how they fare."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gradio as gr

from kandinsky5.errors import K1Error
from kandinsky5.request import GenerationRequest
from kandinsky5.ui import history_views, queue_views, views
from kandinsky5.ui.fields import FIELDS
from kandinsky5.ui.history_views import PAGE_LENGTH, page_start
from kandinsky5.ui.queue_views import editing_line
from kandinsky5.worker.client import asked_for

if TYPE_CHECKING:
    from kandinsky5.worker.client import JobSnapshot, WorkerClient

GONE = "This job is no longer there."
BEGUN = "This job has begun, or is over: it can no longer be changed."
STAYED = "The job is deleted, but {}."
PAUSE, GO_ON = "Pause the queue", "Go on"
Filled = Callable[[GenerationRequest, str | None], list[Any]]


class QueueHandlers:
    """The handlers of one studio's tab; they hold no state of a page, which lives in its ``gr.State``.

    Args:
        client: of the worker.
        filled_with: updates of the form's controls for a request and its expanded prompt.
    """

    def __init__(self, client: WorkerClient, filled_with: Filled) -> None:
        self.client = client
        self._filled_with = filled_with
        self._acts: dict[str, Callable[[str, str], str]] = {
            "up": lambda job, _: self._moved(job, -1),
            "down": lambda job, _: self._moved(job, 1),
            "duplicate": self._duplicated,
            "cancel": self._cancelled,
            "resume": self._resumed,
            "delete": self._deleted,
        }

    def look(self, offset: int, shown: dict[str, Any]) -> tuple[Any, ...]:
        """What changed since the last look.

        Args:
            offset: jobs before the page of the history.
            shown: what the page shows by now, by name of the part.

        Returns:
            Pause button, Stop button, what a pause means, what runs, what waits, the history, the offset of a
            page that there is, and ``shown`` anew.
        """
        queue, paused = self.client.queue(), self.client.is_paused()
        total = self.client.history_length()
        offset = page_start(offset, total)
        past = self.client.history(PAGE_LENGTH, offset)
        runs = next((job for job in queue if job.state == "running"), None)
        stoppable = runs is not None and views.can_be_stopped(runs)
        parts: dict[str, Any] = {
            "paused": paused,
            "stop": runs.id if runs is not None and stoppable else "",
            "notice": queue_views.pause_line(queue, paused=paused),
            "running": queue_views.running(queue),
            "waiting": queue_views.waiting(queue),
            "history": history_views.history(past, offset=offset, total=total),
        }
        new = {name for name, value in parts.items() if shown.get(name) != value}
        label = GO_ON if paused else PAUSE
        pause = gr.update(value=label, variant="primary" if paused else "secondary")
        stop = gr.update(interactive=stoppable)
        return (
            pause if "paused" in new else gr.skip(),
            stop if "stop" in new else gr.skip(),
            *(
                parts[name] if name in new else gr.skip()
                for name in ("notice", "running", "waiting", "history")
            ),
            offset,
            parts,
        )

    def pause_pressed(self, shown: dict[str, Any]) -> None:
        """Pause or go on, as the button of the page that was pressed says."""
        self.client.set_paused(not shown.get("paused", False))

    def stop_running(self, shown: dict[str, Any], mode: str = "save") -> None:
        """Stop the job that the page shows as running, and no other that has begun meanwhile."""
        if job := self._job(str(shown.get("stop") or "")):
            self.client.stop(job.id, mode or "save")

    def pressed(self, offset: int, event: gr.EventData) -> tuple[int, str]:
        """A button of a job, or one that turns the page.

        Returns:
            The offset of the history's page, and the problem to show.
        """
        act, job_id = str(event._data.get("act", "")), str(event._data.get("job", ""))
        if act == "page":
            return offset + (PAGE_LENGTH if job_id == "1" else -PAGE_LENGTH), ""
        if act not in self._acts:
            return offset, ""
        try:
            said = self._acts[act](job_id, str(event._data.get("token", "")))
        except KeyError:
            said = GONE
        except K1Error as error:
            said = str(error)
        return offset, views.problem("", said) if said else ""

    def _moved(self, job_id: str, places: int) -> str:
        return "" if self.client.move(job_id, places) else BEGUN

    def _duplicated(self, job_id: str, token: str) -> str:
        self.client.duplicate(job_id, token=token or None)
        return ""

    def _cancelled(self, job_id: str, _: str) -> str:
        if self.client.status(job_id).state != "queued":
            return BEGUN
        self.client.stop(job_id, "save")
        return ""

    def _resumed(self, job_id: str, _: str) -> str:
        self.client.resume(job_id)
        return ""

    def _deleted(self, job_id: str, _: str) -> str:
        kept = self.client.delete(job_id)
        return STAYED.format("; ".join(kept)) if kept else ""

    def to_form(self, event: gr.EventData) -> tuple[Any, ...]:
        """Fill the form with the settings of a job: to make it again, or to change a waiting one.

        Returns:
            Updates of the controls, the tabs, the job that is being changed, the problem to show, and the
            timer, which runs only while the tab is looked at.
        """
        act, job_id = str(event._data.get("act", "")), str(event._data.get("job", ""))
        edits = act == "edit"
        try:
            job = self.client.status(job_id)
            if edits and not job.can_be_edited:
                raise K1Error(BEGUN)
            filled = self._filled_with(*_settings(job, as_asked=edits))
        except (KeyError, K1Error, gr.Error) as error:
            said = GONE if isinstance(error, KeyError) else str(error)
            stays = (gr.skip() for _ in range(len(FIELDS) + 2))
            return (*stays, views.problem("", said), gr.skip())
        to_create = gr.Tabs(selected="create")
        return (*filled, to_create, job_id if edits else None, "", gr.Timer(active=False))

    def editing(self, job_id: str | None, shown: str) -> tuple[Any, ...]:
        """What is said of the job that is being changed.

        Args:
            job_id: it; None when none is.
            shown: what the page says of it by now.

        Returns:
            The line above the form, Generate and the button that stands in its place, the timer that looks
            again, and ``shown`` anew.
        """
        job = self._job(job_id or "")
        text = "" if job_id is None else editing_line(job)
        if text == shown:
            return (*(gr.skip() for _ in range(4)), shown)
        waits = job is not None and job.can_be_edited
        looks = gr.Timer(active=job_id is not None)
        return text, gr.update(visible=not waits), gr.update(visible=waits), looks, text

    def _job(self, job_id: str) -> JobSnapshot | None:
        try:
            return self.client.status(job_id)
        except KeyError:
            return None


def _settings(job: JobSnapshot, *, as_asked: bool) -> tuple[GenerationRequest, str | None]:
    """The request of a job and its expanded prompt: as it was asked for, or with what came of it."""
    if as_asked:
        return asked_for(job), None
    made = job.result or {}
    return GenerationRequest.from_dict(job.request), made.get("expanded_prompt")

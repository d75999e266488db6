"""The queue for programs: what the tab “Queue & history” does, under names that ``gradio_client`` calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from kandinsky5.ui.handlers import Handlers, snapshot_dict, told

MAX_HISTORY = 200
"""Jobs in one answer."""


class QueueCalls:
    """Calls about the queue and the jobs that are over.

    Args:
        handlers: of the studio.
    """

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        self._client = handlers.client

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """Every call; its name is the function's."""
        return (
            self.pause,
            self.move,
            self.replace,
            self.duplicate,
            self.delete,
            self.history,
        )

    def pause(self, paused: bool = True) -> bool:
        """Let no further job begin, or with false go on; returns whether the queue is paused."""
        self._client.set_paused(bool(paused))
        return self._client.is_paused()

    def move(self, job_id: str, places: int) -> list:
        """Move a waiting job so many places back, or forward when negative; returns the queue."""
        self._handlers.known(job_id)
        if type(places) is not int:
            raise gr.Error(f"places: got {places!r}; a whole number", print_exception=False)
        if not self._client.move(job_id, places):
            raise gr.Error(f"job_id: got {job_id!r}; this job does not wait", print_exception=False)
        return self._handlers.queue()

    def replace(self, job_id: str, request: dict) -> str:
        """Let a waiting job make what this request says, in its place; returns its id."""
        self._handlers.known(job_id)
        made = self._handlers.request_of(request)
        if not told(lambda: self._client.replace(job_id, made)):
            allowed = "a job that waits and goes on from nothing saved"
            raise gr.Error(f"job_id: got {job_id!r}; {allowed}", print_exception=False)
        return job_id

    def duplicate(self, job_id: str, token: str = "") -> str:
        """Queue the same once more, as the last, a drawn seed drawn anew; returns the new job's id."""
        self._handlers.known(job_id)
        return told(lambda: self._client.duplicate(job_id, token=token or None))

    def delete(self, job_id: str) -> list:
        """Delete a job that is over with its files; returns a line for each of them that is still there."""
        self._handlers.known(job_id)
        return told(lambda: self._client.delete(job_id))

    def history(self, limit: int = 24, offset: int = 0) -> list:
        """Jobs that are over, the newest first, as /status tells them."""
        past = self._client.history(min(int(limit), MAX_HISTORY), int(offset))
        return [snapshot_dict(job) for job in past]

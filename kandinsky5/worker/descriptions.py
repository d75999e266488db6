"""What the worker has said of files, and what it is still to be asked."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from typing import Any

from kandinsky5.worker.protocol import FileNames

KEPT = 64
TRIES = 2
WORKER_GONE = {"problem": "the worker ended while it read this file"}


class Descriptions:
    """Questions about files and the answers to them; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: OrderedDict[FileNames, dict[str, Any]] = OrderedDict()
        self._unsent: list[FileNames] = []
        self._sent: set[FileNames] = set()
        self._deaths: Counter[FileNames] = Counter()

    def ask(self, names: FileNames) -> tuple[dict[str, Any] | None, bool]:
        """The answer, None while there is none; and whether the question is new."""
        with self._lock:
            if names in self._answers:
                self._answers.move_to_end(names)
                return self._answers[names], False
            if names in self._sent or names in self._unsent:
                return None, False
            self._unsent.append(names)
            return None, True

    def to_send(self) -> tuple[FileNames, ...]:
        """The questions that wait; they count as sent from now on."""
        with self._lock:
            waiting, self._unsent = tuple(self._unsent), []
            self._sent.update(waiting)
            return waiting

    @property
    def are_waiting(self) -> bool:
        """Whether there are questions to send."""
        with self._lock:
            return bool(self._unsent)

    def note(self, names: FileNames, told: dict[str, Any]) -> None:
        """Keep an answer, and of all answers the last :data:`KEPT`."""
        with self._lock:
            self._sent.discard(names)
            self._deaths.pop(names, None)
            self._answers[names] = told
            while len(self._answers) > KEPT:
                self._answers.popitem(last=False)

    def worker_is_gone(self) -> None:
        """Ask the next one; a question that :data:`TRIES` workers did not survive is put to no other."""
        with self._lock:
            sent, self._sent = self._sent, set()
            self._deaths.update(sent)
            given_up = [names for names in sent if self._deaths[names] >= TRIES]
            self._unsent += [names for names in sent if self._deaths[names] < TRIES]
        for names in given_up:
            self.note(names, WORKER_GONE)

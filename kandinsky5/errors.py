"""What can go wrong, as types: each knows its one line for the user and its exit code."""

from __future__ import annotations

from pathlib import Path

MAX_SHOWN_CHARACTERS = 240
"""Of a path in a message."""


class K1Error(Exception):
    """Base of the errors that are shown to the user as one line instead of a traceback."""

    exit_code = 1


class UserError(K1Error):
    """A value that cannot be used.

    Args:
        field: name of the field of :class:`~kandinsky5.request.GenerationRequest` or of the option.
        given: what was received.
        allowed: what would be accepted, or what to do.
    """

    exit_code = 2

    def __init__(self, field: str, given: object, allowed: str) -> None:
        shown = repr(given)
        shown = shown if len(shown) <= 120 else shown[:117] + "…" + shown[-1]
        super().__init__(f"{field}: got {shown}; {allowed}")
        self.field, self.given, self.allowed = field, given, allowed

    def __reduce__(self) -> tuple[type[UserError], tuple[str, object, str]]:
        return type(self), (self.field, self.given, self.allowed)


class CheckpointError(K1Error):
    """A file of a model that is missing or unusable.

    Args:
        path: the file or folder that was looked at.
        reason: what is wrong with it and what to do.
    """

    exit_code = 3

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{shown_path(path)}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self) -> tuple[type[CheckpointError], tuple[str, str]]:
        return type(self), (self.path, self.reason)


def shown_path(path: str | Path) -> str:
    """A path fit for one line of a message: of a very long one its beginning and its end."""
    text = str(path)
    end = MAX_SHOWN_CHARACTERS // 2
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:end]}…{text[-end:]}"


class OutOfMemory(K1Error):
    """Device or main memory ran out.

    Args:
        message: where, and what to do.
        in_pieces: whether a new process could use what this one has left: it lies in gaps too small here.
    """

    exit_code = 4

    def __init__(self, message: str, *, in_pieces: bool = False) -> None:
        super().__init__(message)
        self.in_pieces = in_pieces


class NotFinite(K1Error):
    """A denoising step gave NaN or infinity.

    Args:
        step: the step that did, counted from 1.
        total: steps of the schedule.
        kept: the saved state of the step before, from which the run can go on in another way.
    """

    def __init__(self, step: int, total: int, kept: str | None = None) -> None:
        said = (
            f"step {step} of {total} gave NaN or infinite numbers, most likely from a fast attention "
            'engine or from fp16 overflowing: choose attention "sdpa", then weights "bf16", then dtype "fp32"'
        )
        if kept is not None:
            said += f"; step {step - 1} is kept: resume {kept} --attention sdpa"
        super().__init__(said)
        self.step, self.total, self.kept = step, total, kept

    def __reduce__(self) -> tuple[type[NotFinite], tuple[int, int, str | None]]:
        return type(self), (self.step, self.total, self.kept)


class Stopped(K1Error):
    """The user stopped the job."""

    exit_code = 5

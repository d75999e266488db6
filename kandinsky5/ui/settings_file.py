"""What the user keeps beside the jobs: a JSON file with a version, written whole or not at all."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kandinsky5.errors import K1Error, UserError
from kandinsky5.output.atomic import replacing, write_error

log = logging.getLogger(__name__)

MAX_BYTES = 64_000_000
"""A larger file is not one of ours."""


class KeptFile:
    """One file. A program reads it once, at its start, and then writes it alone.

    Args:
        path: the file; it and its folder need not be there.
        version: of the format that this program writes; the newest that it reads.

    Attributes:
        notice: what is wrong with the file that was read, one line; empty when nothing is.
    """

    def __init__(self, path: Path, version: int) -> None:
        self.path = path
        self.notice = ""
        self._version = version
        self._is_newer = False

    def read(self, *, rename_damaged: bool = True) -> dict[str, Any]:
        """What the file holds, without its version; nothing where it cannot be used.

        A damaged file gets another name, so that it is neither lost nor read again. One of a newer program
        stays as it is, and is never written over.

        Args:
            rename_damaged: not wanted by who only looks, and could tell nobody.
        """
        try:
            values = _values_in(self.path)
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._tell(f"{self.path} cannot be read ({error.strerror}); the defaults hold")
            return {}
        except ValueError as error:
            self._damaged(str(error), rename_damaged)
            return {}
        version = values.pop("version", None)
        is_number = isinstance(version, int) and not isinstance(version, bool)
        if is_number and version > self._version:
            self._is_newer = True
            self._tell(
                f"{self.path} is of a newer K1 (version {version}): it is left as it is,"
                " the defaults hold and nothing is saved; update K1"
            )
            return {}
        if not is_number or version != self._version:
            self._damaged("no version", rename_damaged)
            return {}
        return values

    def write(self, values: Mapping[str, Any]) -> None:
        """Put these values, and the version, in the place of what the file holds.

        Raises:
            UserError: the file is of a newer program.
            DiskFull, K1Error: it could not be written; it is then as it was.
        """
        if self._is_newer:
            raise UserError(
                "file", str(self.path), "it is of a newer K1; update K1, or move it away"
            )
        content = encoded({"version": self._version, **values})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.path, error, len(content)) from error
        with replacing(self.path, needed_bytes=len(content)) as temporary:
            temporary.write_bytes(content)

    def _tell(self, notice: str) -> None:
        log.warning("%s", notice)
        self.notice = notice

    def _damaged(self, what: str, rename: bool) -> None:
        outcome = self._set_aside() if rename else "the defaults hold"
        self._tell(f"{self.path.name} is damaged ({what}); {outcome}")

    def _set_aside(self) -> str:
        """Give the file another name; says which."""
        moment = time.strftime("%Y%m%d-%H%M%S")
        aside = self.path.with_name(f"{self.path.stem}.damaged-{moment}{self.path.suffix}")
        try:
            self.path.replace(aside)
        except OSError as error:
            return f"it cannot be renamed ({error.strerror}) and is written over; the defaults hold"
        return f"it is kept as {aside.name} and the defaults hold"


def encoded(values: Mapping[str, Any]) -> bytes:
    """The file's content: JSON as UTF-8; halves of characters stand as JSON's escapes of them."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode("utf-8", "backslashreplace")


def decoded(content: bytes) -> dict[str, Any]:
    """The JSON object in a file's content.

    Raises:
        ValueError: saying in a few words what it is instead.
    """
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return values


def _values_in(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError("far too large")
    return decoded(path.read_bytes())


def reason_of(error: K1Error) -> str:
    """What to do about a file that could not be written, as one line."""
    return error.allowed if isinstance(error, UserError) else str(error)

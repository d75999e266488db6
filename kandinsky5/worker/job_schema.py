"""The job store's file: its schema, how an older one is brought up to date, and whose it is."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path
from typing import IO

from kandinsky5.errors import UserError

MIGRATIONS = (
    """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    token TEXT UNIQUE,
    state TEXT NOT NULL,
    request TEXT NOT NULL,
    stage TEXT,
    step INTEGER NOT NULL DEFAULT 0,
    total INTEGER NOT NULL DEFAULT 0,
    output TEXT,
    message TEXT,
    notices TEXT NOT NULL DEFAULT '[]',
    result TEXT,
    created_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL
);
CREATE INDEX jobs_by_state ON jobs (state, number);
CREATE INDEX jobs_by_end ON jobs (finished_at, number);
""",
    """
ALTER TABLE jobs ADD COLUMN saved_state TEXT;
ALTER TABLE jobs ADD COLUMN saved_step INTEGER;
ALTER TABLE jobs ADD COLUMN saved_at REAL;
ALTER TABLE jobs ADD COLUMN resume_from TEXT;
ALTER TABLE jobs ADD COLUMN previews TEXT NOT NULL DEFAULT '[]';
""",
    """
ALTER TABLE jobs ADD COLUMN kind TEXT NOT NULL DEFAULT 'generate';
""",
    """
ALTER TABLE jobs ADD COLUMN position INTEGER NOT NULL DEFAULT 0;
UPDATE jobs SET position = number;
ALTER TABLE jobs ADD COLUMN seed_drawn INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN outputs TEXT NOT NULL DEFAULT '[]';
CREATE TABLE queue_marks (name TEXT PRIMARY KEY);
""",
)
"""From each version of the schema to the next; the first makes it. A step never changes once released."""

SCHEMA_VERSION = len(MIGRATIONS)


def open_store(file: Path) -> sqlite3.Connection:
    """A connection that commits each statement; the schema is made, or brought up to date in one transaction.

    Raises:
        UserError: the store is of a newer K1.
        sqlite3.Error: it is no store; nothing was changed.
    """
    connection = sqlite3.connect(file, timeout=10.0, isolation_level=None, check_same_thread=False)
    try:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise UserError(
                "state folder",
                str(file),
                f"its jobs are of version {version}, this K1 knows {SCHEMA_VERSION}: update K1"
                " or give another --state-dir",
            )
        if version < SCHEMA_VERSION:
            steps = "".join(MIGRATIONS[version:])
            connection.executescript(
                f"BEGIN; {steps} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
            )
    except (sqlite3.Error, UserError):
        connection.close()
        raise
    return connection


def own_store(file: Path) -> IO[str]:
    """The lock that says whose store this is; it is let go when closed or when the program ends."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.with_suffix(".lock").open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(
            "state folder", str(file.parent), f"a folder that can be written ({error.strerror})"
        ) from error
    if sys.platform == "win32":
        return lock
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise UserError(
            "state folder",
            str(file.parent),
            "another K1 is at work there: use that one, end it, or give another --state-dir",
        ) from error
    return lock

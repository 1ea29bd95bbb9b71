"""What a node must not forget of the actions that it runs for others, in ``kachery-fast-tasks.db``.

An action starts at most once. So it is noted on the disk before it is claimed and before it is called, and how it ended
before anybody hears of it. What a crash leaves behind tells the next run of the node what is known: ``claiming`` (it
never started), ``started`` (nobody knows how it ended), or how it ended, with the receipt that the hub has yet to get.
An entry is removed when the hub has been told.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .database import Database

__all__ = ["ActionEntry", "TaskLedger"]

_FILE_NAME = "kachery-fast-tasks.db"
# A hub that has not been there for so long will not ask any more.
_KEEP_SECONDS = 90 * 86400.0
_STEPS = ((
    "CREATE TABLE actions (hub TEXT NOT NULL, channel TEXT NOT NULL, task TEXT NOT NULL, function TEXT NOT NULL, "
    "state TEXT NOT NULL, receipt TEXT, time_ms INTEGER NOT NULL, PRIMARY KEY (hub, channel, task)) WITHOUT ROWID",
), (
    "ALTER TABLE actions ADD COLUMN attempt TEXT NOT NULL DEFAULT ''",
))


class ActionEntry(NamedTuple):
    """One action. ``state`` is ``claiming``, ``started``, ``finished``, ``failed``, ``unknown`` or ``released``;
    ``attempt`` that of its claim."""

    task: str
    function: str
    state: str
    receipt: dict[str, Any] | None
    attempt: str = ""


class TaskLedger:
    """The actions of one node. Safe for several threads; every method may raise DatabaseUnusable and DiskError.

    The file is made when the first action comes. :param root: the storage directory. :param clock: seconds since 1970.
    """

    def __init__(self, root: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = root / _FILE_NAME
        self._clock = clock
        self._lock = threading.Lock()
        self._database: Database | None = None

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._database is not None:
                self._database.close()
            self._database = None

    def begin(self, hub: str, channel: str, task: str, function: str, attempt: str) -> ActionEntry | None:
        """Note that an action is about to be claimed; return what is known already when it was noted before."""
        with self._open().writing() as connection:
            found = connection.execute(
                "SELECT task, function, state, receipt, attempt FROM actions "
                "WHERE hub = ? AND channel = ? AND task = ?",
                (hub, channel, task)).fetchone()
            if found is not None:
                return _entry(found)
            connection.execute("INSERT INTO actions VALUES (?, ?, ?, ?, 'claiming', NULL, ?, ?)",
                               (hub, channel, task, function, int(self._clock() * 1000), attempt))
            return None

    def set(self, hub: str, channel: str, task: str, state: str, receipt: dict[str, Any] | None = None) -> None:
        """Note that an action that was begun is in another state now, with its receipt when it has ended."""
        with self._open().writing() as connection:
            connection.execute(
                "UPDATE actions SET state = ?, receipt = ?, time_ms = ? WHERE hub = ? AND channel = ? AND task = ?",
                (state, None if receipt is None else json.dumps(receipt), int(self._clock() * 1000), hub, channel,
                 task))

    def remove(self, hub: str, channel: str, task: str) -> None:
        """Forget an action: the hub knows how it ended, or never gave it to this node."""
        with self._open().writing() as connection:
            connection.execute("DELETE FROM actions WHERE hub = ? AND channel = ? AND task = ?", (hub, channel, task))

    def left(self, hub: str, channel: str) -> list[ActionEntry]:
        """Return the actions of a channel of which the hub has yet to be told, the oldest first."""
        if not self._path.exists():
            return []
        with self._open().reading() as connection:
            rows = connection.execute(
                "SELECT task, function, state, receipt, attempt FROM actions WHERE hub = ? AND channel = ? "
                "ORDER BY time_ms, task", (hub, channel)).fetchall()
        return [_entry(row) for row in rows]

    def _open(self) -> Database:
        with self._lock:
            if self._database is None:
                self._database = Database(self._path, _STEPS)
                with self._database.writing() as connection:
                    connection.execute("DELETE FROM actions WHERE time_ms < ?",
                                       (int((self._clock() - _KEEP_SECONDS) * 1000),))
            return self._database


def _entry(row: tuple[str, str, str, str | None, str]) -> ActionEntry:
    task, function, state, receipt, attempt = row
    return ActionEntry(task, function, state, None if receipt is None else json.loads(receipt), attempt)

"""The rows of the index of cached copies, within one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from sqlite3 import Connection, Cursor
from typing import NamedTuple

__all__ = ["CachedCopy", "Rows", "TrashNote"]

_FIND = "SELECT sha1, size, identity, used_ms, pinned FROM copies WHERE sha1 = ?"
_FIND_MANIFESTS = "SELECT sha1, size, identity, used_ms, pinned FROM copies WHERE manifest_of = ?"
_ORPHANS = """SELECT sha1 FROM copies AS manifest WHERE manifest_of IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM copies WHERE sha1 = manifest.manifest_of)"""


class CachedCopy(NamedTuple):
    """A row: ``size`` in bytes, ``used_ms`` the last known use in milliseconds since 1970."""

    sha1: str
    size: int
    identity: str
    used_ms: int
    pinned: bool


class TrashNote(NamedTuple):
    """Since when a file is in the trash, in milliseconds since 1970, and whether it is a copy that was evicted."""

    since_ms: int
    is_copy: bool


class Rows:
    """The rows, within one transaction; without a connection there are none."""

    def __init__(self, connection: Connection | None) -> None:
        self._connection = connection

    def execute(self, statement: str, values: Sequence[object] = ()) -> Cursor:
        """Run a statement of the index itself, which there is."""
        assert self._connection is not None
        return self._connection.execute(statement, values)

    def find(self, sha1: str) -> CachedCopy | None:
        """Return the row of a file."""
        row = None if self._connection is None else self.execute(_FIND, (sha1,)).fetchone()
        return None if row is None else CachedCopy(*row)

    def manifests_of(self, sha1: str) -> list[CachedCopy]:
        """Return the rows of the manifests that came with a file."""
        if self._connection is None:
            return []
        return [CachedCopy(*row) for row in self.execute(_FIND_MANIFESTS, (sha1,)).fetchall()]

    def is_pinned(self, sha1: str) -> bool:
        """Whether a file is pinned, cached or not."""
        return self._connection is not None and bool(
            self.execute("SELECT EXISTS (SELECT 1 FROM pins WHERE sha1 = ?)", (sha1,)).fetchone()[0])

    def forget(self, sha1: str) -> None:
        """Take a row away; manifests that came with the file are copies of their own from now on."""
        if self._connection is not None:
            self.execute("DELETE FROM copies WHERE sha1 = ?", (sha1,))
            for manifest in self.manifests_of(sha1):
                self._release(manifest.sha1)

    def release_orphans(self) -> bool:
        """Make manifests whose file has no row copies of their own; return whether there were any. Reads them all."""
        orphans = [] if self._connection is None else self.execute(_ORPHANS).fetchall()
        for (sha1,) in orphans:
            self._release(sha1)
        return bool(orphans)

    def _release(self, sha1: str) -> None:
        row = self.execute("SELECT * FROM copies WHERE sha1 = ?", (sha1,)).fetchone()
        # Not by an update: the triggers count what comes and goes.
        self.execute("DELETE FROM copies WHERE sha1 = ?", (sha1,))
        self.execute("INSERT INTO copies VALUES (?, ?, ?, ?, ?, ?, NULL)", row[:-1])

    def note_use(self, sha1: str, used_ms: int) -> None:
        """Take down a later use."""
        if self._connection is not None:
            self.execute("UPDATE copies SET used_ms = ? WHERE sha1 = ?", (used_ms, sha1))

    # --- intents: what is about to be moved to the trash

    def intend(self, copy: CachedCopy) -> None:
        """Note that a file is about to be moved; to be on the disk before it is."""
        if self._connection is not None:
            self.execute("INSERT OR REPLACE INTO intents VALUES (?, ?)", (copy.sha1, copy.identity))

    def is_intended(self, copy: CachedCopy) -> bool:
        """Whether that note still stands; another process may have settled it. Without an index there is none."""
        return self._connection is None or bool(self.execute(
            "SELECT EXISTS (SELECT 1 FROM intents WHERE sha1 = ? AND identity = ?)",
            (copy.sha1, copy.identity)).fetchone()[0])

    def is_going(self, sha1: str) -> bool:
        """Whether there is a note of a move at all: another process is at it, or it could not be put back."""
        return self._connection is not None and bool(
            self.execute("SELECT EXISTS (SELECT 1 FROM intents WHERE sha1 = ?)", (sha1,)).fetchone()[0])

    def intents(self) -> list[tuple[str, str]]:
        """Return what was about to be moved when its process ended: names and identities."""
        return [] if self._connection is None else self.execute("SELECT sha1, identity FROM intents").fetchall()

    def settle(self, sha1: str) -> None:
        """Take the note of a move away."""
        if self._connection is not None:
            self.execute("DELETE FROM intents WHERE sha1 = ?", (sha1,))

    # --- what is in the trash

    def note_trash(self, sha1: str, mtime_ns: int, since_ms: int, *, is_copy: bool) -> None:
        """Note that a file is in the trash. ``mtime_ns`` is its time of change, and tells it from later ones."""
        if self._connection is not None:
            self.execute("INSERT OR REPLACE INTO trashed VALUES (?, ?, ?, ?)", (sha1, mtime_ns, since_ms, is_copy))

    def trash_note(self, sha1: str, mtime_ns: int) -> TrashNote | None:
        """Return that note."""
        row = None if self._connection is None else self.execute(
            "SELECT since_ms, is_copy FROM trashed WHERE sha1 = ? AND mtime_ns = ?", (sha1, mtime_ns)).fetchone()
        return None if row is None else TrashNote(row[0], bool(row[1]))

    def oldest_copies_in_trash(self, count: int) -> list[tuple[str, int]]:
        """Return names and times of change of evicted copies, those first that are there longest."""
        return [] if self._connection is None else self.execute(
            "SELECT sha1, mtime_ns FROM trashed WHERE is_copy ORDER BY since_ms LIMIT ?", (count,)).fetchall()

    def drop_trash_note(self, sha1: str) -> None:
        """Take the note of a name away."""
        if self._connection is not None:
            self.execute("DELETE FROM trashed WHERE sha1 = ?", (sha1,))

    def drop_trash_notes(self, before_ms: float) -> None:
        """Take all notes away that are from before a time."""
        self.execute("DELETE FROM trashed WHERE since_ms < ?", (before_ms,))

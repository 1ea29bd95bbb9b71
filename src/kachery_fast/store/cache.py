"""Which files of the store are cached copies, and which are pinned: ``kachery-fast-cache.db``.

A file is a cached copy only when it was fetched from a channel, has a row here, and is still the very file of that
row: inode, length and time of change. Whatever is stored here writes a new file, or takes the row away, so a row that
is out of date is never believed. A file without a row is an original. The loss of this database therefore only makes
copies stay.

Eviction reads this index alone, in the order of ``score``: size times the time since the last use. Files are sorted
into classes of size, each a power of two, and within a class by use; the next to go is the best of the heads of at
most 54 classes. So planning costs by what goes, not by what there is; two files whose sizes differ by less than a
factor of two may go in the order of use instead.
"""

from __future__ import annotations

import heapq
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from sqlite3 import Connection
from typing import NamedTuple

from ..errors import KacheryError
from .database import Database

__all__ = ["USE_GRAIN_SECONDS", "CacheIndex", "CacheTotals", "CachedCopy", "identity_of", "note_use", "score"]

# A file in use has its time of use renewed at most this often.
USE_GRAIN_SECONDS = 300.0

_STEPS = [[
    """CREATE TABLE copies (
        sha1 TEXT PRIMARY KEY, size INTEGER NOT NULL, size_class INTEGER NOT NULL, identity TEXT NOT NULL,
        used_ms INTEGER NOT NULL, pinned INTEGER NOT NULL, manifest_of TEXT) WITHOUT ROWID""",
    "CREATE INDEX copies_to_go ON copies (size_class, used_ms) WHERE pinned = 0 AND manifest_of IS NULL",
    "CREATE INDEX copies_by_file ON copies (manifest_of) WHERE manifest_of IS NOT NULL",
    "CREATE TABLE pins (sha1 TEXT PRIMARY KEY) WITHOUT ROWID",
    "CREATE TABLE totals (files INTEGER NOT NULL, bytes INTEGER NOT NULL)",
    "INSERT INTO totals VALUES (0, 0)",
    """CREATE TRIGGER copy_comes AFTER INSERT ON copies BEGIN
        UPDATE totals SET files = files + (NEW.manifest_of IS NULL), bytes = bytes + NEW.size; END""",
    """CREATE TRIGGER copy_goes AFTER DELETE ON copies BEGIN
        UPDATE totals SET files = files - (OLD.manifest_of IS NULL), bytes = bytes - OLD.size; END""",
]]
_FIND = "SELECT sha1, size, identity, used_ms, pinned FROM copies WHERE sha1 = ?"
_FIND_MANIFESTS = "SELECT sha1, size, identity, used_ms, pinned FROM copies WHERE manifest_of = ? AND pinned = 0"
_CANDIDATES = """SELECT sha1, size, identity, used_ms, pinned FROM copies
    WHERE size_class = ? AND pinned = 0 AND manifest_of IS NULL AND used_ms < ? ORDER BY used_ms"""
_SIZE_CLASSES = 54  # 2**53 bytes is the longest file that JSON can tell of

_log = logging.getLogger("kachery_fast.store")


class CachedCopy(NamedTuple):
    """A row: ``size`` in bytes, ``used_ms`` the last known use in milliseconds since 1970."""

    sha1: str
    size: int
    identity: str
    used_ms: int
    pinned: bool


class CacheTotals(NamedTuple):
    """What the index counts: cached files, and their bytes with those of their manifests."""

    files: int
    bytes: int


def identity_of(found: os.stat_result) -> str:
    """Return what tells this very file from another of the same name. Device numbers change with a reboot."""
    return f"{found.st_ino}:{found.st_mtime_ns}:{found.st_size}"


def score(size_bytes: int, used_ms: int, now_ms: int) -> int:
    """Return how much a copy deserves to go: byte-milliseconds since its last use."""
    return max(size_bytes, 1) * max(now_ms - used_ms, 0)


def note_use(path: Path, now: float) -> None:
    """Mark a file of the store as used: its time of access, also where the file system keeps none by itself.

    Done at most every ``USE_GRAIN_SECONDS``, and by who owns the file; for others the system's own note has to do.

    :param now: seconds since 1970.
    """
    with suppress(OSError):
        found = path.stat()
        if found.st_atime < now - USE_GRAIN_SECONDS:
            os.utime(path, ns=(int(now * 1e9), found.st_mtime_ns))


class CacheIndex:
    """The index of one storage directory. Nothing is made before the first copy, or pin, is noted.

    Methods raise DatabaseUnusable or DiskError when the index cannot be used, unless they say otherwise.
    """

    def __init__(self, root: Path) -> None:
        self.path = root / "kachery-fast-cache.db"
        self._name = str(self.path)
        self._lock = threading.Lock()
        self._database: Database | None = None

    @property
    def exists(self) -> bool:
        """Whether anything was ever cached or pinned here."""
        return os.path.exists(self._name)  # noqa: PTH110 - on the way of every file that is stored again

    def close(self) -> None:
        """Let go of the database; it is opened again when needed."""
        database, self._database = self._database, None
        if database is not None:
            database.close()

    def _open(self) -> Database:
        with self._lock:
            if self._database is None:
                database = Database(self.path, _STEPS)
                weakref.finalize(self, database.close)
                self._database = database
            return self._database

    # --- for the store

    def note(self, sha1: str, found: os.stat_result, *, now_ms: int, manifest_of: str | None = None) -> None:
        """Note a cached copy. Never fails: a copy that could not be noted only stays.

        :param manifest_of: it is the manifest of this file, and goes with it.
        """
        size = found.st_size
        try:
            with self._open().writing() as connection:
                connection.execute("DELETE FROM copies WHERE sha1 = ?", (sha1,))
                connection.execute(
                    "INSERT INTO copies VALUES (?, ?, ?, ?, ?, EXISTS (SELECT 1 FROM pins WHERE sha1 = ?), ?)",
                    (sha1, size, size.bit_length(), identity_of(found), now_ms, sha1, manifest_of))
        except KacheryError as error:
            _log.warning("sha1://%s cannot be noted as a cached copy, and stays: %s", sha1, error)

    def claim(self, sha1: str) -> bool:
        """Make a file an original: it was stored here. Never fails.

        :return: False when that could not be noted, as by a user who may not read the index.
        """
        if not self.exists:
            return True
        try:
            if self.find(sha1) is not None:
                with self._open().writing() as connection:
                    connection.execute("DELETE FROM copies WHERE sha1 = ?", (sha1,))
        except KacheryError as error:
            _log.debug("sha1://%s is stored anew: %s", sha1, error)
            return False
        return True

    # --- for eviction

    def find(self, sha1: str) -> CachedCopy | None:
        """Return the row of a file, None when there is none."""
        with self.looking() as look:
            return look.find(sha1)

    @contextmanager
    def looking(self) -> Iterator[Rows]:
        """Read many rows of one moment."""
        if not self.exists:
            yield Rows(None)
            return
        with self._open().reading() as connection:
            yield Rows(connection)

    @contextmanager
    def changing(self) -> Iterator[Rows]:
        """Change rows in one transaction. Nobody claims a file meanwhile."""
        with self._open().writing() as connection:
            yield Rows(connection)

    def totals(self) -> CacheTotals:
        """Return how much is cached, at the cost of reading one row."""
        if not self.exists:
            return CacheTotals(0, 0)
        with self._open().reading() as connection:
            return CacheTotals(*connection.execute("SELECT files, bytes FROM totals").fetchone())

    def candidates(self, *, now_ms: int, before_ms: int) -> Iterator[CachedCopy]:
        """Yield what may go, the best first; pinned files and manifests are left out.

        :param before_ms: only what was last used before this time.
        """
        if not self.exists:
            return
        with self._open().reading() as connection:
            classes = [connection.execute(_CANDIDATES, (size_class, before_ms)) for size_class in range(_SIZE_CLASSES)]
            for row in heapq.merge(*classes, key=lambda row: -score(row[1], row[3], now_ms)):
                yield CachedCopy(*row)

    # --- pins

    def pin(self, sha1: str, *, pinned: bool) -> bool:
        """Pin a file, or take its pin away; return whether that changed anything."""
        if not pinned and not self.exists:
            return False
        with self._open().writing() as connection:
            statement = "INSERT OR IGNORE INTO pins VALUES (?)" if pinned else "DELETE FROM pins WHERE sha1 = ?"
            changed = connection.execute(statement, (sha1,)).rowcount > 0
            connection.execute("UPDATE copies SET pinned = ? WHERE sha1 = ?", (pinned, sha1))
        return changed


class Rows:
    """The rows, within one transaction."""

    def __init__(self, connection: Connection | None) -> None:
        self._connection = connection

    def find(self, sha1: str) -> CachedCopy | None:
        """Return the row of a file."""
        row = None if self._connection is None else self._connection.execute(_FIND, (sha1,)).fetchone()
        return None if row is None else CachedCopy(*row)

    def manifests_of(self, sha1: str) -> list[CachedCopy]:
        """Return the rows of the manifests that came with a file, but for pinned ones."""
        if self._connection is None:
            return []
        return [CachedCopy(*row) for row in self._connection.execute(_FIND_MANIFESTS, (sha1,)).fetchall()]

    def is_pinned(self, sha1: str) -> bool:
        """Whether a file is pinned, cached or not."""
        return self._connection is not None and bool(
            self._connection.execute("SELECT EXISTS (SELECT 1 FROM pins WHERE sha1 = ?)", (sha1,)).fetchone()[0])

    def forget(self, sha1: str) -> None:
        """Take a row away."""
        if self._connection is not None:
            self._connection.execute("DELETE FROM copies WHERE sha1 = ?", (sha1,))

    def note_use(self, sha1: str, used_ms: int) -> None:
        """Take down a later use."""
        if self._connection is not None:
            self._connection.execute("UPDATE copies SET used_ms = ? WHERE sha1 = ?", (used_ms, sha1))

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
import itertools
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import CacheElsewhere, CacheOfAnother
from .cache_rows import CachedCopy, Rows
from .database import Database
from .disk import display, user_name

__all__ = ["USE_GRAIN_SECONDS", "CacheIndex", "CacheTotals", "identity_of", "note_use", "renew", "score"]

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
], [
    "CREATE TABLE intents (sha1 TEXT PRIMARY KEY, identity TEXT NOT NULL) WITHOUT ROWID",
], [
    """CREATE TABLE trashed (
        sha1 TEXT PRIMARY KEY, mtime_ns INTEGER NOT NULL, since_ms INTEGER NOT NULL, is_copy INTEGER NOT NULL)
        WITHOUT ROWID""",
    "CREATE INDEX trashed_copies ON trashed (since_ms) WHERE is_copy",
]]
_CANDIDATES = """SELECT sha1, size, identity, used_ms, pinned FROM copies
    WHERE size_class = ? AND pinned = 0 AND manifest_of IS NULL AND used_ms < ? AND (used_ms, sha1) > (?, ?)
    ORDER BY used_ms, sha1"""
_CLAMP = """UPDATE copies SET used_ms = ?1
    WHERE size_class = ?2 AND pinned = 0 AND manifest_of IS NULL AND used_ms > ?1"""
_SIZE_CLASSES = 54  # 2**53 bytes is the longest file that JSON can tell of
_PAGE_COPIES_FIRST, _PAGE_COPIES_MAX = 128, 4096
_ADVICE = ("Move it away and start the node anew: it only holds which files may be evicted, and what is pinned. "
           "Without it all files that are here now count as originals.")

_log = logging.getLogger("kachery_fast.store")


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
        if abs(found.st_atime - now) > USE_GRAIN_SECONDS:  # later than now: the clock was ahead
            os.utime(path, ns=(int(now * 1e9), found.st_mtime_ns))


def renew(path: str | Path) -> bool:
    """Give a file of the store another time of change, so that no row fits it; False where that cannot be done.

    A file that has another name as well is not lost with this one, and is somebody's: it is left alone.
    """
    try:
        found = os.stat(path)  # noqa: PTH116
        if found.st_nlink == 1:
            os.utime(path, ns=(found.st_atime_ns, max(time.time_ns(), found.st_mtime_ns + 1)))
    except OSError:
        return False
    return True


class CacheIndex:
    """The index of one storage directory. Nothing is made before the first copy, or pin, is noted.

    Methods raise DatabaseUnusable or DiskError when the index cannot be used, and CacheOfAnother or CacheElsewhere to
    whom it is not for, unless they say otherwise.

    :param machine: the other machine whose node has this directory. The index is not opened then: the memory that its
        users share under WAL does not reach from one machine to another (https://sqlite.org/wal.html).
    """

    def __init__(self, root: Path, *, machine: str = "") -> None:
        self._root = root
        self._machine = machine
        self.path = root / "kachery-fast-cache.db"
        self._name = str(self.path)
        self._lock = threading.Lock()
        self._database: Database | None = None

    @property
    def exists(self) -> bool:
        """Whether anything was ever cached or pinned here."""
        return os.path.exists(self._name)  # noqa: PTH110 - on the way of every file that is stored again

    @property
    def is_mine(self) -> bool:
        """Whether this user may use the index, here."""
        return not self._machine and self._other_owner() is None

    def check_mine(self) -> None:
        """Check that this user may use the index. :raises CacheOfAnother, CacheElsewhere: it is another's."""
        if self._machine:
            raise CacheElsewhere(path=display(self.path), machine=self._machine)
        owner = self._other_owner()
        if owner is not None:
            raise CacheOfAnother(path=display(self.path), owner=user_name(owner))

    def _other_owner(self) -> int | None:
        user = os.geteuid()
        if user:  # root acts as the owner
            for path in (self._root, self._name):
                with suppress(OSError):  # what is missing will be ours
                    if (owner := os.stat(path).st_uid) != user:  # noqa: PTH116
                        return owner
        return None

    def close(self) -> None:
        """Let go of the database; it is opened again when needed."""
        database, self._database = self._database, None
        if database is not None:
            database.close()

    def _open(self) -> Database:
        with self._lock:
            if self._database is None:
                database = Database(self.path, _STEPS, advice=_ADVICE)
                weakref.finalize(self, database.close)
                self._database = database
            return self._database

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        if self._database is not None or os.access(self._root, os.W_OK):
            with self._open().reading() as connection:
                yield connection
            return
        # Opening it as always would write; this way it is for one look, since the directory may be opened again.
        with (closing(Database(self.path, _STEPS, advice=_ADVICE, read_only=True)) as database,
              database.reading() as connection):
            yield connection

    # --- for the store

    def note(self, sha1: str, found: os.stat_result, *, now_ms: int, manifest_of: str | None = None) -> None:
        """Note a cached copy. Never fails: a copy that could not be noted, or is of another user, only stays.

        :param manifest_of: it is the manifest of this file, and goes with it.
        """
        size = found.st_size
        if not self.is_mine:
            return
        try:
            with self._open().writing() as connection:
                connection.execute("DELETE FROM copies WHERE sha1 = ?", (sha1,))
                connection.execute(
                    "INSERT INTO copies VALUES (?, ?, ?, ?, ?, EXISTS (SELECT 1 FROM pins WHERE sha1 = ?), ?)",
                    (sha1, size, size.bit_length(), identity_of(found), now_ms, sha1, manifest_of))
        except Exception as error:  # whatever a damaged index brings about
            _log.warning("sha1://%s cannot be noted as a cached copy, and stays: %s", sha1, error)

    def forget(self, sha1: str) -> None:
        """Take the row of a file away, if there is an index and it is for this user."""
        if self.exists and self.is_mine:
            with self.changing() as rows:
                rows.forget(sha1)

    def claim(self, sha1: str, path: str) -> bool:
        """Make a file an original: it was stored here. Never fails.

        :param path: where it is; it gets another time of change.
        :return: False when that could not be noted, as by a user who may not read the index.
        """
        if self._machine:
            return False
        if not self.exists:
            return True
        # Also without a row: one may come back with an older index, or be unseen for now over a mount.
        if not renew(path):
            return False
        try:
            if self.find(sha1) is not None:
                with self.changing() as rows:
                    rows.forget(sha1)
        except Exception as error:
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
        self.check_mine()
        with self._reading() as connection:
            yield Rows(connection)

    @contextmanager
    def changing(self) -> Iterator[Rows]:
        """Change rows in one transaction. Nobody claims a file meanwhile."""
        self.check_mine()
        with self._open().writing() as connection:
            yield Rows(connection)

    def totals(self) -> CacheTotals:
        """Return how much is cached, at the cost of reading one row."""
        self.check_mine()
        if not self.exists:
            return CacheTotals(0, 0)
        with self._reading() as connection:
            return CacheTotals(*connection.execute("SELECT files, bytes FROM totals").fetchone())

    def candidates(self, *, now_ms: int, before_ms: int) -> Iterator[CachedCopy]:
        """Yield what may go, the best first; pinned files and manifests are left out.

        They are read some thousands at a time. Nothing is held open meanwhile, so rows may be changed, and one whose
        use changed may come again or not at all.

        :param before_ms: only what was last used before this time.
        """
        seen = [(-1, "")] * _SIZE_CLASSES
        count = _PAGE_COPIES_FIRST
        while page := self._page(seen, count, now_ms, before_ms):
            yield from page
            count = min(2 * count, _PAGE_COPIES_MAX)

    def clamp_uses(self, now_ms: int) -> None:
        """Make uses that are noted as later than now, by a clock that was ahead, uses of now."""
        if self.exists:
            with self.changing() as rows:
                for size_class in range(_SIZE_CLASSES):
                    rows.execute(_CLAMP, (now_ms, size_class))

    def _page(self, seen: list[tuple[int, str]], count: int, now_ms: int, before_ms: int) -> list[CachedCopy]:
        if not self.exists:
            return []
        page: list[CachedCopy] = []
        with self.looking() as rows:
            classes = [rows.execute(_CANDIDATES, (size_class, before_ms, *seen[size_class]))
                       for size_class in range(_SIZE_CLASSES)]
            merged = heapq.merge(*classes, key=lambda row: -score(row[1], row[3], now_ms))
            for row in itertools.islice(merged, count):
                copy = CachedCopy(*row)
                seen[copy.size.bit_length()] = copy.used_ms, copy.sha1
                page.append(copy)
        return page

    # --- pins

    def pin(self, sha1: str, *, pinned: bool) -> bool:
        """Pin a file, or take its pin away; return whether that changed anything."""
        self.check_mine()
        if not pinned and not self.exists:
            return False
        with self.changing() as rows:
            statement = "INSERT OR IGNORE INTO pins VALUES (?)" if pinned else "DELETE FROM pins WHERE sha1 = ?"
            changed = rows.execute(statement, (sha1,)).rowcount > 0
            rows.execute("UPDATE copies SET pinned = ? WHERE sha1 = ?", (pinned, sha1))
        return changed

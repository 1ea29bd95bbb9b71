"""Moving files out of the store, so that a crash at any moment loses none that somebody stored.

In a first transaction the index notes what is about to go, and is flushed. In a second one each file is moved, looked
at again, and its row taken away. Whoever stored the file in between took its row away before, or put another file in
its place, which is then moved back. When the process dies between the two, or cannot move it back, the note stands:
``settle`` compares what lies in the trash with it, forgets the row of what went, and puts back what was not meant.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from ..errors import DiskError, DiskFull
from .cache import CacheIndex, identity_of
from .cache_rows import CachedCopy, Rows
from .disk import translated
from .layout import Layout
from .trash import Trash

__all__ = ["Mover"]

_log = logging.getLogger("kachery_fast.store")


class Mover:
    """Moves files of ``layout`` to the trash. Methods raise DiskError, DatabaseUnusable and CacheOfAnother."""

    def __init__(self, layout: Layout, index: CacheIndex, trash: Trash) -> None:
        self._layout = layout
        self._index = index
        self._trash = trash

    def is_copy(self, copy: CachedCopy) -> bool:
        """Whether the file of this name still is the one that was fetched, and nobody linked it as well."""
        return self.is_same(copy) and not os.path.lexists(self._layout.link(copy.sha1))

    def is_same(self, copy: CachedCopy) -> bool:
        """Whether the file of this name still is the one of the row."""
        with suppress(OSError):
            return identity_of(self._layout.file(copy.sha1).lstat()) == copy.identity
        return False

    def intend(self, rows: Rows, copy: CachedCopy) -> None:
        """Note that a copy is to go with its manifests, in a transaction before that of ``take``."""
        for going in (copy, *rows.manifests_of(copy.sha1)):
            rows.intend(going)

    def take(self, rows: Rows, copy: CachedCopy, *, at_once: bool) -> int | None:
        """Move a copy out of the store, with its manifests; return the bytes, None when it was no copy any more.

        :raises DiskError, DiskFull: it could not be moved; it is where it was, and so is its row.
        """
        going = [each for each in (copy, *rows.manifests_of(copy.sha1)) if rows.is_intended(each)]
        self.settle_notes(rows, copy)
        if copy not in going:
            return None
        if not self.is_copy(copy) or not self._move(rows, copy, at_once=at_once, is_copy=True):
            rows.forget(copy.sha1)
            return None
        size = copy.size
        for manifest in going[1:]:
            with suppress(DiskError, DiskFull):  # it stays, as a copy of its own
                if not manifest.pinned and self._move(rows, manifest, at_once=at_once, is_copy=True):
                    size += manifest.size
                    rows.forget(manifest.sha1)
        with suppress(OSError):  # without its file it is rubbish
            self._layout.sidecar(copy.sha1).unlink()
        rows.forget(copy.sha1)
        return size

    def take_original(self, rows: Rows, found: CachedCopy, *, at_once: bool) -> bool:
        """Move a file out of the store that is no copy; False when it is not there, or somebody stored it just now."""
        if not rows.is_intended(found):
            return False
        rows.settle(found.sha1)
        rows.forget(found.sha1)
        return self._move(rows, found, at_once=at_once, is_copy=False)

    def settle_notes(self, rows: Rows, copy: CachedCopy) -> None:
        """Take the notes of ``intend`` away."""
        for going in (copy, *rows.manifests_of(copy.sha1)):
            rows.settle(going.sha1)

    def _move(self, rows: Rows, going: CachedCopy, *, at_once: bool, is_copy: bool) -> bool:
        if not self.is_same(going):
            return False
        trashed = self._trash.take(going.sha1)
        if trashed is None:
            return False
        with translated("moving to the trash", trashed):
            found = trashed.lstat()
            if identity_of(found) != going.identity:  # somebody stored it a moment ago
                rows.intend(going)  # stands when the next line fails, and ``settle`` tries again
                self._trash.put_back(trashed, going.sha1)
                rows.settle(going.sha1)
                return False
            if at_once:
                self._trash.delete(trashed)
            else:
                rows.note_trash(going.sha1, found.st_mtime_ns, time.time_ns() // 1_000_000, is_copy=is_copy)
        return True

    def settle(self) -> None:
        """Finish what a process had begun to move when it died; costs reading one row when there is nothing."""
        if not self._index.exists:
            return
        with self._index.looking() as rows:
            if not rows.intents():
                return
        with self._index.changing() as rows:
            for sha1, identity in rows.intents():
                try:
                    self._settle(rows, sha1, identity)
                except (DiskError, DiskFull) as error:
                    _log.warning("sha1://%s was being moved and is in the trash; it is looked at again later: %s", sha1,
                                 error)
                else:
                    rows.settle(sha1)

    def _settle(self, rows: Rows, sha1: str, identity: str) -> None:
        trashed = self._trash.path(sha1)
        with translated("looking at", trashed):
            found = _look_at(trashed)
        if found is None:
            return
        if identity_of(found) != identity:
            if self._trash.put_back(trashed, sha1):
                _log.warning("sha1://%s was put back from the trash: it was stored while a copy was evicted", sha1)
            else:
                rows.forget(sha1)  # what was fetched meanwhile takes the place of what was stored
            return
        row = rows.find(sha1)
        was_copy = row is not None and row.identity == identity
        rows.note_trash(sha1, found.st_mtime_ns, time.time_ns() // 1_000_000, is_copy=was_copy)
        if row is not None and was_copy and not self.is_same(row):
            rows.forget(sha1)


def _look_at(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None

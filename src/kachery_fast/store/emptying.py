"""Deleting what is in the trash: by its age, or because the disk is nearly full.

Since when a file is there, and whether it is a copy that was evicted, is noted in the index as it goes; the note holds
the time of change as well, so that it is never believed of another file. Without a note the file system's time of the
last change of status has to do, which FAT does not keep; a node notes the time when it first saw such a file instead,
and takes it for one that was stored here.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from ..errors import DiskError, DiskFull
from .cache import CacheIndex
from .cache_rows import TrashNote
from .disk import translated
from .trash import Trash, Trashed

__all__ = ["Emptier", "is_low"]

# Of a file system with less than this free, the trash is in the way.
_LOW_ROOM_FRACTION = 0.05
_NOTES_AT_ONCE = 256
_COPIES_AT_ONCE = 64


def is_low(root: Path) -> bool:
    """Whether the file system of a store is nearly full."""
    try:
        found = os.statvfs(root)
    except OSError:
        return False
    return found.f_bavail < found.f_blocks * _LOW_ROOM_FRACTION


class _Deleted:
    """What was deleted so far, and what could not be."""

    def __init__(self, trash: Trash) -> None:
        self._trash = trash
        self.files = self.bytes = 0
        self._failure: DiskError | DiskFull | None = None

    def delete(self, path: Path, size: int) -> None:
        try:
            with translated("emptying the trash", path):
                self._trash.delete(path)
        except (DiskError, DiskFull) as error:
            self._failure = self._failure or error
        else:
            self.files += 1
            self.bytes += size

    def result(self) -> tuple[int, int]:
        if self._failure is not None:
            raise self._failure
        return self.files, self.bytes


class Emptier:
    """Empties the trash of one storage directory. Methods raise DiskError, and DatabaseUnusable."""

    def __init__(self, root: Path, index: CacheIndex, trash: Trash) -> None:
        self._root = root
        self._index = index
        self._trash = trash

    def entries(self, *, old: bool = True, seen_at: float | None = None) -> Iterator[Trashed]:
        """Yield what is in the trash, in the order of the SHA-1.

        :param old: also what a program of 2022 left in ``sha1-trash/``.
        :param seen_at: note what has no note as there since this time, in seconds since 1970; no note may be later.
        """
        for batch in self._batches(old=old, seen_at=seen_at):
            yield from batch

    def _batches(self, *, old: bool, seen_at: float | None) -> Iterator[list[Trashed]]:
        found = self._trash.list(old=old)
        while batch := list(itertools.islice(found, _NOTES_AT_ONCE)):
            yield self._noted(batch, None if seen_at is None else int(seen_at * 1000)) if self._index.is_mine else batch

    def _noted(self, batch: list[Trashed], seen_ms: int | None) -> list[Trashed]:
        with self._index.looking() as rows:
            notes = {found: rows.trash_note(found.sha1, found.mtime_ns) for found in batch if not found.old}
        new = [(found, note) for found, note in notes.items()
               if seen_ms is not None and (note is None or note.since_ms > seen_ms)]
        if seen_ms is not None and new:
            with suppress(DiskFull), self._index.changing() as rows:  # at a later look, then
                for found, note in new:
                    if rows.trash_note(found.sha1, found.mtime_ns) == note:  # else it is going at this moment
                        rows.note_trash(found.sha1, found.mtime_ns, seen_ms,
                                        is_copy=note is not None and note.is_copy)
            notes.update((found, TrashNote(seen_ms, is_copy=False)) for found, _ in new)
        return [found if note is None else found._replace(since=note.since_ms / 1000)
                for found, note in ((found, notes.get(found)) for found in batch)]

    def empty(self, *, before: float, old: bool, seen_at: float | None, stop: Callable[[], bool]) -> tuple[int, int]:
        """Delete what went into the trash before a time in seconds since 1970; return how many files and bytes.

        :param old: also what a program of 2022 left in ``sha1-trash/``, maybe the only copy.
        :param seen_at: see ``entries``.
        :param stop: asked before each file whether to stop.
        :raises DiskError, DiskFull: some could not be deleted; the others were.
        """
        deleted = _Deleted(self._trash)
        for batch in self._batches(old=old, seen_at=seen_at):
            spared = self._going()
            for found in batch:
                if stop():
                    return deleted.result()
                if found.since < before and found.sha1 not in spared:
                    deleted.delete(self._trash.path(found.sha1, old=found.old), found.size)
        if self._index.exists and self._index.is_mine:
            with suppress(DiskFull), self._index.changing() as rows:  # with those of next time, then
                rows.drop_trash_notes(before * 1000)
        return deleted.result()

    def make_room(self, *, stop: Callable[[], bool]) -> tuple[int, int]:
        """Delete evicted copies, those first that went first, until the disk is not nearly full any more.

        :param stop: asked before each file whether to stop.
        :return: how many files and bytes.
        :raises DiskError, DiskFull: some could not be deleted; the others were.
        """
        deleted = _Deleted(self._trash)
        copies: list[tuple[str, int]] = [("", 0)] if self._index.is_mine else []
        while copies and is_low(self._root) and not stop():
            with self._index.looking() as rows:
                copies = rows.oldest_copies_in_trash(_COPIES_AT_ONCE)
            spared = self._going()
            done: list[str] = []
            for sha1, mtime_ns in copies:
                if stop() or not is_low(self._root):
                    break
                path = self._trash.path(sha1)
                if (size := _size_of(path, mtime_ns)) is not None and sha1 not in spared:
                    deleted.delete(path, size)
                done.append(sha1)
            if done:
                with self._index.changing() as rows:
                    for sha1 in done:
                        rows.drop_trash_note(sha1)
        return deleted.result()

    def _going(self) -> set[str]:
        """What is being moved: it may have to be put back. To be asked after the trash was looked at."""
        if not self._index.is_mine:
            return set()
        with self._index.looking() as rows:
            return {sha1 for sha1, _ in rows.intents()}


def _size_of(path: Path, mtime_ns: int) -> int | None:
    """Return the size of a file that was last changed at that time, None when there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_size if found.st_mtime_ns == mtime_ns else None

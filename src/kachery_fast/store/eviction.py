"""Making room: evicting cached copies, removing, pinning and restoring files.

What is evicted is moved to the trash within one transaction of the index, and looked at again there: whoever stored
the file in between took its row away before, or put another file in its place, which is then moved back. An open
descriptor, as of an upload or a reader, stays valid after either.
"""

from __future__ import annotations

import enum
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import FilePinned, NotInStore, OnlyCopyHere
from .cache import USE_GRAIN_SECONDS, CachedCopy, CacheIndex, Rows, identity_of
from .census import walk
from .disk import display, translated
from .files import FileStore
from .layout import Layout
from .trash import Trash

__all__ = ["CacheKeeper", "Evicted", "Kind", "Listed"]

# Of a file system with less than this free, the trash would be in the way: what is evicted is deleted at once.
_LOW_ROOM_FRACTION = 0.05
# How many files one transaction moves: storing waits for its end.
_BATCH_COPIES = 64

_log = logging.getLogger("kachery_fast.store")


class Kind(enum.Enum):
    """What a name in the store is: a copy from a channel, a file stored on this machine, or a link."""

    CACHED = "cached"
    ORIGINAL = "original"
    LINKED = "linked"


class Listed(NamedTuple):
    """A name in the store. ``size`` in bytes, None of a link; ``used_ms`` the known use of a copy, else None."""

    sha1: str
    size: int | None
    kind: Kind
    pinned: bool
    used_ms: int | None


class Evicted(NamedTuple):
    """What an eviction did: copies and bytes that went, and the bytes still cached. ``at_once``: not by the trash."""

    files: int
    bytes: int
    left_bytes: int
    at_once: bool


class CacheKeeper:
    """Decides what goes from the store in ``root`` and carries that out. Methods raise DiskError, DatabaseUnusable."""

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        self._store = FileStore(root, durable=durable)
        self._layout = Layout(self._store.root)
        self.index = CacheIndex(self._store.root)
        self.trash = Trash(self._store.root, durable=durable)

    # --- eviction

    def evict(self, target_bytes: int, *, now: float, keep_seconds: float, dry_run: bool = False,
              at_once: bool = False, on_copy: Callable[[CachedCopy], None] | None = None) -> Evicted:
        """Evict cached copies until at most ``target_bytes`` are cached; originals, links and pins are not touched.

        :param now: seconds since 1970.
        :param keep_seconds: what came or was used within this time stays.
        :param dry_run: change nothing, and only tell what would go.
        :param at_once: delete; otherwise they go to the trash, unless the disk is nearly full.
        :param on_copy: called with each copy that goes.
        """
        now_ms = int(now * 1000)
        before_ms = int((now - keep_seconds) * 1000)
        at_once = at_once or self._is_low()
        left = self.index.totals().bytes
        files = freed = 0
        # A second time for those whose last use was found to be later than the index knew.
        for _ in range(1 if dry_run else 2):
            if left <= target_bytes:
                break
            for batch in _batches(self.index.candidates(now_ms=now_ms, before_ms=before_ms)):
                if left <= target_bytes:
                    break
                gone = self._look(batch, left - target_bytes, before_ms) if dry_run else self._go(
                    batch, left - target_bytes, now_ms, before_ms, at_once=at_once)
                for copy, size in gone:
                    files += 1
                    freed += size
                    if on_copy is not None:
                        on_copy(copy)
                left = left - sum(size for _, size in gone) if dry_run else self.index.totals().bytes
        return Evicted(files, freed, left, at_once)

    def _look(self, batch: list[CachedCopy], wanted: int, before_ms: int) -> list[tuple[CachedCopy, int]]:
        gone: list[tuple[CachedCopy, int]] = []
        with self.index.looking() as rows:
            for copy in batch:
                if wanted > 0 and self._is_copy(copy) and self._used_ms(copy) < before_ms:
                    size = copy.size + sum(manifest.size for manifest in rows.manifests_of(copy.sha1))
                    gone.append((copy, size))
                    wanted -= size
        return gone

    def _go(self, batch: list[CachedCopy], wanted: int, now_ms: int, before_ms: int, *,
            at_once: bool) -> list[tuple[CachedCopy, int]]:
        gone: list[tuple[CachedCopy, int]] = []
        with self.index.changing() as rows:
            for planned in batch:
                copy = rows.find(planned.sha1)
                if wanted <= 0 or copy is None or copy.pinned:
                    continue
                used_ms = min(self._used_ms(copy), now_ms)
                if used_ms > copy.used_ms + USE_GRAIN_SECONDS * 1000 or used_ms >= before_ms:
                    rows.note_use(copy.sha1, used_ms)
                    continue
                size = self._take(rows, copy, at_once=at_once)
                if size is not None:
                    gone.append((copy, size))
                    wanted -= size
        return gone

    def _take(self, rows: Rows, copy: CachedCopy, *, at_once: bool) -> int | None:
        """Move a copy out of the store, with its manifests; return the bytes, None when it was no copy any more."""
        rows.forget(copy.sha1)
        if not self._move(copy, at_once=at_once):
            return None
        size = copy.size
        with translated("removing", self._layout.sidecar(copy.sha1)):
            self._layout.sidecar(copy.sha1).unlink(missing_ok=True)
        for manifest in rows.manifests_of(copy.sha1):
            rows.forget(manifest.sha1)
            if self._move(manifest, at_once=at_once):
                size += manifest.size
        return size

    def _move(self, copy: CachedCopy, *, at_once: bool) -> bool:
        if not self._is_copy(copy):
            return False
        trashed = self.trash.take(copy.sha1)
        if trashed is None:
            return False
        with translated("moving to the trash", trashed):
            if identity_of(trashed.stat()) != copy.identity:  # somebody stored it a moment ago
                self.trash.put_back(copy.sha1)
                return False
            if at_once:
                trashed.unlink()
        return True

    def _is_copy(self, copy: CachedCopy) -> bool:
        """Whether the file of this name still is the one that was fetched, and nobody linked it as well."""
        with suppress(OSError):
            found = self._layout.file(copy.sha1).lstat()
            return identity_of(found) == copy.identity and not os.path.lexists(self._layout.link(copy.sha1))
        return False

    def _used_ms(self, copy: CachedCopy) -> int:
        with suppress(OSError):
            return max(copy.used_ms, self._layout.file(copy.sha1).stat().st_atime_ns // 1_000_000)
        return copy.used_ms

    def _is_low(self) -> bool:
        try:
            found = os.statvfs(self._layout.root)
        except OSError:
            return False
        return found.f_bavail < found.f_blocks * _LOW_ROOM_FRACTION

    # --- by name

    def pin(self, sha1: str) -> bool:
        """Keep a file from being evicted and removed; return whether it was not pinned before.

        :raises NotInStore, LinkInvalid: it is not here.
        """
        self._store.find(sha1)
        return self.index.pin(sha1, pinned=True)

    def unpin(self, sha1: str) -> bool:
        """Take a pin away; return whether there was one. The file need not be here any more."""
        self._layout.file_name(sha1)  # checks the name
        return self.index.pin(sha1, pinned=False)

    def remove(self, sha1: str, *, at_once: bool = False, force: bool = False) -> int:
        """Remove a file or link, and return its bytes, 0 of a link; a linked file itself is never touched.

        :param at_once: delete it; otherwise it goes to the trash.
        :param force: also when this may be the only machine that has it.
        :raises NotInStore: it is not here. :raises FilePinned: it is pinned.
        :raises OnlyCopyHere: it was stored here, and ``force`` is not given.
        """
        path, link = self._layout.file(sha1), self._layout.link(sha1)
        with self.index.looking() as rows:
            if rows.is_pinned(sha1):
                raise FilePinned(sha1=sha1)
        if not path.is_file():
            if not os.path.lexists(link):
                raise NotInStore(sha1=sha1, store=display(self._layout.root))
            self._store.remove(sha1)
            return 0
        if self.index.exists:
            with self.index.changing() as changed:
                copy = changed.find(sha1)
                size = None if copy is None else self._take(changed, copy, at_once=at_once)
            if size is not None:
                return size
        if not force:
            raise OnlyCopyHere(sha1=sha1)
        with translated("removing", path):
            size = path.stat().st_size
        if not at_once:
            self.trash.take(sha1)
        with suppress(NotInStore):
            self._store.remove(sha1)
        return size

    def restore(self, sha1: str) -> Path:
        """Bring a file back from the trash, and return where it is; it is an original from now on.

        :raises NotInTrash: it is not there.
        """
        return self.trash.put_back(sha1)

    def list(self) -> Iterator[Listed]:
        """Yield every name of the store, in the order of the SHA-1."""
        with self.index.looking() as rows:
            for entry in walk(self._layout):
                pinned = rows.is_pinned(entry.sha1)
                if entry.size is None:
                    yield Listed(entry.sha1, None, Kind.LINKED, pinned, None)
                    continue
                copy = rows.find(entry.sha1)
                if copy is not None and self._is_copy(copy):
                    yield Listed(entry.sha1, entry.size, Kind.CACHED, pinned, self._used_ms(copy))
                else:
                    yield Listed(entry.sha1, entry.size, Kind.ORIGINAL, pinned, None)


def _batches(copies: Iterator[CachedCopy]) -> Iterator[list[CachedCopy]]:
    while batch := list(itertools.islice(copies, _BATCH_COPIES)):
        yield batch

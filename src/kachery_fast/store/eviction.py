"""Making room: evicting cached copies, removing, pinning and restoring files.

What goes is moved to the trash, see ``moving``. An open descriptor, as of an upload or a reader, stays valid.
"""

from __future__ import annotations

import enum
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import CorruptFile, DiskError, DiskFull, FilePinned, NotInStore, OnlyCopyHere, StoredMeanwhile
from .cache import USE_GRAIN_SECONDS, CacheIndex, identity_of, renew
from .cache_rows import CachedCopy, Rows
from .census import Entry, walk
from .disk import display, find_size, translated
from .emptying import Emptier, is_low
from .files import FileStore
from .flushing import sync_directory
from .layout import Layout
from .moving import Mover
from .trash import Trash, Trashed, digest_of

__all__ = ["CacheKeeper", "Evicted", "Kind", "Listed", "Restored"]

# How many files one transaction moves: storing waits for its end.
_BATCH_COPIES = 64
# How many names one transaction looks up for ``list``.
_LISTED_AT_ONCE = 256
# So many in a row that cannot be moved are not about single files.
_FAILURES_IN_A_ROW_MAX = 1000
_REASONS_MAX = 5


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
    """What an eviction did: copies and bytes that went, and the bytes still cached. ``at_once``: not by the trash.

    ``failed`` counts copies that could not be moved, and ``reasons`` holds some of the errors.
    """

    files: int
    bytes: int
    left_bytes: int
    at_once: bool
    failed: int = 0
    reasons: tuple[str, ...] = ()


class Restored(NamedTuple):
    """Where a restored file is; ``was_there``: the store had it, and what the trash had was dropped."""

    path: Path
    was_there: bool


class _Eviction:
    """One run: what is wanted, and what came of it."""

    def __init__(self, now: float, keep_seconds: float, *, at_once: bool, stop: Callable[[], bool]) -> None:
        self.stop = stop
        self.now_ms = int(now * 1000)
        self.before_ms = int((now - keep_seconds) * 1000)
        self.at_once = at_once
        self.files = self.bytes = 0
        self.failed: set[str] = set()
        self.reasons: list[str] = []
        self.failed_in_a_row = 0

    def gone(self, size: int) -> None:
        self.files += 1
        self.bytes += size
        self.failed_in_a_row = 0

    def fail(self, sha1: str, error: DiskError | DiskFull) -> None:
        self.failed.add(sha1)
        self.failed_in_a_row += 1
        if len(self.reasons) < _REASONS_MAX:
            self.reasons.append(str(error))

    @property
    def is_over(self) -> bool:
        return self.failed_in_a_row >= _FAILURES_IN_A_ROW_MAX or self.stop()


class CacheKeeper:
    """Decides what goes from the store in ``root`` and carries that out.

    Methods raise DiskError and DatabaseUnusable, and CacheOfAnother or CacheElsewhere to whom the index is not for.

    :param machine: as of ``CacheIndex``.
    """

    def __init__(self, root: Path, *, durable: bool = True, machine: str = "") -> None:
        self._store = FileStore(root, durable=durable, machine=machine)
        self._layout = Layout(self._store.root)
        self.index = CacheIndex(self._store.root, machine=machine)
        self.trash = Trash(self._store.root, durable=durable)
        self._mover = Mover(self._layout, self.index, self.trash)
        self._emptier = Emptier(self._layout.root, self.index, self.trash)

    # --- eviction

    def settle(self) -> None:
        """Finish what a process that died had begun to move; whatever moves files does so first."""
        self._mover.settle()

    def evict(self, target_bytes: int, *, now: float, keep_seconds: float, dry_run: bool = False,
              at_once: bool = False, on_copy: Callable[[CachedCopy], None] | None = None,
              stop: Callable[[], bool] = lambda: False) -> Evicted:
        """Evict cached copies until at most ``target_bytes`` are cached; originals, links and pins are not touched.

        A copy that cannot be moved is passed over, and told of in what is returned.

        :param now: seconds since 1970.
        :param keep_seconds: what came or was used within this time stays.
        :param dry_run: change nothing, and only tell what would go.
        :param at_once: delete; otherwise they go to the trash, unless the disk is nearly full.
        :param on_copy: called with each copy that goes.
        :param stop: asked before each batch whether to stop.
        """
        run = _Eviction(now, keep_seconds, at_once=at_once or is_low(self._layout.root), stop=stop)
        left = self.index.totals().bytes
        if not dry_run:
            self.settle()
            self.index.clamp_uses(run.now_ms)
        # A second time for those whose last use was found to be later than the index knew, and for lost manifests.
        for turn in range(1 if dry_run else 2):
            if turn and left > target_bytes:
                with self.index.changing() as rows:
                    rows.release_orphans()
            for batch in _batches(self.index.candidates(now_ms=run.now_ms, before_ms=run.before_ms)):
                if left <= target_bytes or run.is_over:
                    break
                gone = (self._look if dry_run else self._go)(run, batch, left - target_bytes)
                for copy, size in gone:
                    run.gone(size)
                    if on_copy is not None:
                        on_copy(copy)
                left = left - sum(size for _, size in gone) if dry_run else self.index.totals().bytes
        return Evicted(run.files, run.bytes, left, run.at_once, len(run.failed), tuple(run.reasons))

    def _look(self, run: _Eviction, batch: list[CachedCopy], wanted: int) -> list[tuple[CachedCopy, int]]:
        gone: list[tuple[CachedCopy, int]] = []
        with self.index.looking() as rows:
            for copy in batch:
                if wanted > 0 and self._mover.is_copy(copy) and self._used_ms(copy, run.now_ms) < run.before_ms:
                    size = copy.size + sum(manifest.size for manifest in rows.manifests_of(copy.sha1)
                                           if not manifest.pinned)
                    gone.append((copy, size))
                    wanted -= size
        return gone

    def _go(self, run: _Eviction, batch: list[CachedCopy], wanted: int) -> list[tuple[CachedCopy, int]]:
        chosen: list[CachedCopy] = []
        with self.index.changing() as rows:
            room = wanted
            for planned in batch:
                copy = rows.find(planned.sha1)
                if room <= 0 or copy is None or copy.pinned or copy.sha1 in run.failed or rows.is_going(copy.sha1):
                    continue
                used_ms = self._used_ms(copy, run.now_ms)
                if used_ms > copy.used_ms + USE_GRAIN_SECONDS * 1000 or used_ms >= run.before_ms:
                    rows.note_use(copy.sha1, used_ms)
                    continue
                self._mover.intend(rows, copy)
                chosen.append(copy)
                room -= copy.size if self._mover.is_copy(copy) else 0
        gone: list[tuple[CachedCopy, int]] = []
        if chosen:
            with self.index.changing() as rows:
                for copy in chosen:
                    if wanted <= 0:
                        self._mover.settle_notes(rows, copy)
                    elif (size := self._take(run, rows, copy)) is not None:
                        gone.append((copy, size))
                        wanted -= size
        return gone

    def _take(self, run: _Eviction, rows: Rows, copy: CachedCopy) -> int | None:
        row = rows.find(copy.sha1)
        if row is None or row.identity != copy.identity or row.pinned:
            self._mover.settle_notes(rows, copy)
            return None
        try:
            return self._mover.take(rows, copy, at_once=run.at_once)
        except (DiskError, DiskFull) as error:
            run.fail(copy.sha1, error)
            return None

    def _used_ms(self, copy: CachedCopy, now_ms: int) -> int:
        """The last use; a time of access that is much later than now says nothing: the clock was ahead."""
        with suppress(OSError):
            read_ms = self._layout.file(copy.sha1).stat().st_atime_ns // 1_000_000
            if read_ms < now_ms + USE_GRAIN_SECONDS * 1000:
                return min(max(copy.used_ms, read_ms), now_ms)
        return copy.used_ms

    # --- by name

    def pin(self, sha1: str) -> bool:
        """Keep a file from being evicted and removed; return whether it was not pinned before.

        :raises NotInStore, LinkInvalid: it is not here.
        """
        self._store.find(sha1)
        changed = self.index.pin(sha1, pinned=True)
        try:
            self._store.find(sha1)
        except NotInStore:  # it went just before
            if changed:
                self.index.pin(sha1, pinned=False)
            raise
        return changed

    def unpin(self, sha1: str) -> bool:
        """Take a pin away; return whether there was one. The file need not be here any more."""
        self._layout.file_name(sha1)  # checks the name
        return self.index.pin(sha1, pinned=False)

    def remove(self, sha1: str, *, at_once: bool = False, force: bool = False) -> int:
        """Remove a file or link, and return its bytes, 0 of a link; a linked file itself is never touched.

        To a user whom the index is not for, every file counts as stored here, and pins are not known.

        :param at_once: delete it; otherwise it goes to the trash.
        :param force: also when this may be the only machine that has it.
        :raises NotInStore: it is not here. :raises FilePinned: it is pinned.
        :raises OnlyCopyHere: it was stored here, and ``force`` is not given.
        :raises StoredMeanwhile: somebody stored it at this moment, and it stays.
        """
        path = self._layout.file(sha1)
        while (size := self._remove(sha1, path, at_once=at_once, force=force)) is None:
            pass
        return size

    def _remove(self, sha1: str, path: Path, *, at_once: bool, force: bool) -> int | None:
        """None when another process settled what was begun here: to be done again."""
        linked = os.path.lexists(self._layout.link(sha1))
        if self.index.is_mine:
            self.settle()
        with self._rows() as rows:
            if rows.is_pinned(sha1):
                raise FilePinned(sha1=sha1)
            with translated("looking at", path):
                found = path.lstat() if path.is_file() else None  # of a symbolic link the link goes
            if found is None and not linked:
                raise NotInStore(sha1=sha1, store=display(self._layout.root))
            if found is not None:
                going = rows.find(sha1)
                cached = going is not None and self._mover.is_copy(going)
                if going is None or not cached:
                    if not force:
                        raise OnlyCopyHere(sha1=sha1)
                    going = CachedCopy(sha1, found.st_size, identity_of(found), 0, False)
                self._mover.intend(rows, going)
        if found is None:
            self._unlink(sha1)
            return 0
        assert going is not None
        with self._rows() as rows:
            if rows.is_pinned(sha1):
                self._mover.settle_notes(rows, going)
                raise FilePinned(sha1=sha1)
            if cached:
                size = self._mover.take(rows, going, at_once=at_once)
            else:
                size = going.size if self._mover.take_original(rows, going, at_once=at_once) else None
        if size is None and not self._mover.is_same(going):
            if not os.path.lexists(path):
                raise NotInStore(sha1=sha1, store=display(self._layout.root))
            raise StoredMeanwhile(sha1=sha1)
        if size is not None and not cached:
            self._unlink(sha1, linked=linked)
        return size

    def _unlink(self, sha1: str, *, linked: bool = True) -> None:
        """Remove the link and the sidecar of a name; a file that somebody stored under it meanwhile stays."""
        for victim in (self._layout.sidecar(sha1), *([self._layout.link(sha1)] if linked else [])):
            with translated("removing", victim), suppress(FileNotFoundError, NotADirectoryError):
                victim.unlink()
        if self._store.durable:
            with translated("flushing", self._layout.file(sha1).parent):
                sync_directory(self._layout.file(sha1).parent)

    @contextmanager
    def _rows(self) -> Iterator[Rows]:
        """Rows to be changed; none, where there is no index or it is not for this user."""
        if self.index.exists and self.index.is_mine:
            with self.index.changing() as rows:
                yield rows
        else:
            yield Rows(None)

    # --- the trash

    def restore(self, sha1: str) -> Restored:
        """Bring a file back from the trash, having read it; it is an original from now on.

        :raises NotInTrash: it is not there. :raises CorruptFile: it is damaged there, or in the store.
        """
        if self.index.is_mine:
            self.settle()
        source, target = self.trash.whole(sha1), self._layout.file(sha1)
        if self.index.is_mine and find_size(target) is None:
            with self._rows() as rows:
                rows.forget(sha1)
                rows.drop_trash_note(sha1)
                restored = self.trash.put_back(source, sha1)
            if restored:
                renew(target)
                return Restored(target, was_there=False)
        size = find_size(target)
        if size is not None and (found := digest_of(target)) != sha1:
            raise CorruptFile(path=display(target), found=found, sha1=sha1, advice="The trash has it whole: remove the "
                              "damaged one with kachery-fast verify --quarantine, then restore it.")
        self._store.put_file(source)  # claims what is there, or writes a file that no row fits
        with translated("removing", source):
            self.trash.delete(source)
        return Restored(target, was_there=size is not None)

    def list_trash(self) -> Iterator[Trashed]:
        """Yield what is in the trash, in the order of the SHA-1."""
        return self._emptier.entries()

    def empty_trash(self, *, before: float, old: bool = False, seen_at: float | None = None,
                    stop: Callable[[], bool] = lambda: False) -> tuple[int, int]:
        """Delete what is in the trash; see ``Emptier.empty``. What was moved there by mistake is put back before."""
        if self.index.is_mine:
            self.settle()
        return self._emptier.empty(before=before, old=old, seen_at=seen_at, stop=stop)

    def make_room(self, *, stop: Callable[[], bool] = lambda: False) -> tuple[int, int]:
        """Delete evicted copies from the trash while the disk is nearly full; see ``Emptier.make_room``."""
        if not is_low(self._layout.root):
            return 0, 0
        if self.index.is_mine:
            self.settle()
        return self._emptier.make_room(stop=stop)

    # --- the whole

    def list(self) -> Iterator[Listed]:
        """Yield every name of the store, in the order of the SHA-1.

        To a user whom the index is not for, all files count as stored here and not pinned.
        """
        entries = walk(self._layout)
        while batch := list(itertools.islice(entries, _LISTED_AT_ONCE)):
            # Whoever reads this may pause, and an open transaction would let the log of the database grow meanwhile.
            with self._seen() as rows:
                listed = [self._listed(rows, entry) for entry in batch]
            yield from listed

    @contextmanager
    def _seen(self) -> Iterator[Rows]:
        """Rows to be read; none for a user whom the index is not for."""
        if not self.index.is_mine:
            yield Rows(None)
            return
        with self.index.looking() as rows:
            yield rows

    def _listed(self, rows: Rows, entry: Entry) -> Listed:
        pinned = rows.is_pinned(entry.sha1)
        if entry.size is None:
            return Listed(entry.sha1, None, Kind.LINKED, pinned, None)
        copy = rows.find(entry.sha1)
        if copy is not None and self._mover.is_copy(copy):
            return Listed(entry.sha1, entry.size, Kind.CACHED, pinned, self._used_ms(copy, int(time.time() * 1000)))
        return Listed(entry.sha1, entry.size, Kind.ORIGINAL, pinned, None)


def _batches(copies: Iterator[CachedCopy]) -> Iterator[list[CachedCopy]]:
    while batch := list(itertools.islice(copies, _BATCH_COPIES)):
        yield batch

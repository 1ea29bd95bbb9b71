"""What is in the embedded bucket: a walk in the order of names, and how much there is of each channel and kind.

The amounts are counted once, by a walk beside the work, and kept current by whoever changes what is in the bucket. What
changes during the walk is neither missed nor counted twice: the walk goes folder by folder of the first two digits
(``<channel>/<kind>/aa/``), a change counts where the folder was walked already, and a folder that changed while it was
walked is walked again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import DiskError
from .bucket_names import KINDS, is_object_name

__all__ = ["Stock", "StoredObject", "Total", "walk"]

# After so many walks of a folder that changes all the time, it is walked while changes wait.
_WALKS_MAX = 3


class StoredObject(NamedTuple):
    """An object in the bucket. ``created`` and ``last_read``: seconds since the epoch."""

    name: str
    size_bytes: int
    created: float
    last_read: float


class Total(NamedTuple):
    """How many objects, and of how many bytes together."""

    objects: int = 0
    size_bytes: int = 0


_Totals = dict[str, dict[str, Total]]


def walk(root: Path, prefix: str = "", after: str = "") -> Iterator[StoredObject]:
    """Yield the objects whose names begin with ``prefix`` and come after ``after``, in the order of their names.

    :param root: the bucket's directory, without symbolic links in its path. :raises DiskError: a folder in it cannot
        be read.
    """
    folder = prefix[:prefix.rfind("/") + 1]
    try:
        if os.path.realpath(root / folder) == str(root / folder):
            yield from _walk(f"{root}/", folder, prefix, after)
    except OSError as error:
        raise DiskError(action="reading", path=error.filename or root, why=error.strerror) from error


def _walk(root: str, folder: str, prefix: str, after: str) -> Iterator[StoredObject]:
    try:
        with os.scandir(root + folder) as entries:
            # With the slash a folder stands among files where the names in it do.
            found = sorted(((f"{folder}{entry.name}/" if entry.is_dir(follow_symlinks=False) else
                             f"{folder}{entry.name}", entry) for entry in entries), key=lambda pair: pair[0])
    except (FileNotFoundError, NotADirectoryError):
        return
    for name, entry in found:
        if name.endswith("/"):
            if (name.startswith(prefix) or prefix.startswith(name)) and (name > after or after.startswith(name)):
                yield from _walk(root, name, prefix, after)
        elif name > after and name.startswith(prefix) and is_object_name(name):
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # removed meanwhile
                continue
            if entry.is_file(follow_symlinks=False):
                yield StoredObject(name, status.st_size, status.st_mtime, status.st_atime)


class Stock:
    """How much a bucket holds.

    ``lock``: held by who gives a name to an object or takes it away, from then until ``changed`` has been told.
    ``counted``: whether the first walk has ended; until then ``totals`` is what was counted so far.
    """

    def __init__(self, root: Path) -> None:
        self.lock = threading.Lock()
        self.counted = False
        self._root = root
        self._totals: _Totals = {}
        # Of the walk that is under way: what it has counted, the channels and folders that it has not come to, the
        # folder that it is in, and whether that has changed since.
        self._fresh: _Totals | None = None
        self._channels: set[str] = set()
        self._folders: set[str] = set()
        self._current = ""
        self._current_changed = False

    def totals(self, channel: str) -> dict[str, Total]:
        """Return what there is of each kind of a channel's objects."""
        with self.lock:
            totals = self._totals if self.counted else self._fresh or {}
            return {kind: totals.get(channel, {}).get(kind, Total()) for kind in KINDS}

    def changed(self, name: str, objects: int, size_bytes: int) -> None:
        """Note that there are so many objects and bytes more under this name. Call with the lock held."""
        if self.counted:
            _add(self._totals, name, objects, size_bytes)
        if self._fresh is not None and self._was_walked(name):
            _add(self._fresh, name, objects, size_bytes)

    def count(self, closing: threading.Event) -> None:
        """Count everything anew. Takes half the time of one processor; breaks off when ``closing`` is set."""
        with self.lock:
            fresh = self._fresh = {}
            self._channels = set(_folders_in(self._root))
        for channel in sorted(self._channels):
            with self.lock:
                self._channels.discard(channel)
                self._folders = {f"{channel}/{kind}/{name}/" for kind in KINDS
                                 for name in _folders_in(self._root / channel / kind)}
            for folder in sorted(self._folders):
                started = time.monotonic()
                self._count_folder(folder, fresh)
                if closing.wait(time.monotonic() - started):
                    return
        with self.lock:
            self._totals, self._fresh, self.counted = fresh, None, True

    def _count_folder(self, folder: str, fresh: _Totals) -> None:
        walks = 0
        while True:
            with self.lock:
                self._current, self._current_changed = folder, False
                if walks == _WALKS_MAX:
                    self._settle(folder, fresh, self._measure(folder))
                    return
            found = self._measure(folder)
            walks += 1
            with self.lock:
                if not self._current_changed:
                    self._settle(folder, fresh, found)
                    return

    def _settle(self, folder: str, fresh: _Totals, found: Total) -> None:
        self._folders.discard(folder)
        self._current = ""
        _add(fresh, folder, *found)

    def _measure(self, folder: str) -> Total:
        objects = size_bytes = 0
        for found in walk(self._root, folder):
            objects += 1
            size_bytes += found.size_bytes
        return Total(objects, size_bytes)

    def _was_walked(self, name: str) -> bool:
        channel, kind, digits, _ = name.split("/", 3)
        folder = f"{channel}/{kind}/{digits}/"
        if folder == self._current:
            self._current_changed = True
            return False
        return channel not in self._channels and folder not in self._folders


def _add(totals: _Totals, name: str, objects: int, size_bytes: int) -> None:
    channel, kind, _ = name.split("/", 2)
    kinds = totals.setdefault(channel, {})
    known = kinds.get(kind, Total())
    kinds[kind] = Total(known.objects + objects, known.size_bytes + size_bytes)


def _folders_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []

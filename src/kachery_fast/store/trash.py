"""What was evicted or removed, for a while: ``trash/``, laid out like ``sha1/``.

A file goes there, and comes back, by name alone: no byte is copied and none is freed. ``emptying`` deletes it in time.

A directory of 2022 may have files in ``sha1-trash/``, put there for a user to look at. They are listed and restored as
well, and only deleted by who asks for that.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .._core import digest_file
from ..errors import CorruptFile, NotInTrash
from .census import walk
from .disk import display, translated
from .layout import Layout
from .naming import name_new, rename_into

__all__ = ["Trash", "Trashed", "digest_of"]

_CHUNK_SIZE_BYTES = 20 * 1024 * 1024


class Trashed(NamedTuple):
    """A file in the trash: ``size`` in bytes, ``since`` in seconds since 1970; ``old`` of ``sha1-trash/``.

    ``mtime_ns`` is its time of change.
    """

    sha1: str
    size: int
    since: float
    old: bool
    mtime_ns: int


class Trash:
    """The trash of one storage directory. Methods raise DiskError when the disk refuses."""

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        self._store = Layout(root)
        self._layout = Layout(root, files="trash")
        self._old = Layout(root, files="sha1-trash")
        self._durable = durable

    def path(self, sha1: str, *, old: bool = False) -> Path:
        """Return where a file of this name lies in the trash, if there is one."""
        return (self._old if old else self._layout).file(sha1)

    def take(self, sha1: str) -> Path | None:
        """Move a stored file into the trash, and return where it is now, None when there was none.

        One of the same name in the trash is replaced: it has the same bytes.
        """
        target = self._layout.file(sha1)
        with translated("moving to the trash", self._store.file(sha1)):
            try:
                rename_into(self._store.file(sha1), target, durable=False)
            except FileNotFoundError:
                return None
        return target

    def whole(self, sha1: str) -> Path:
        """Read a file in the trash, and return where it is.

        :raises NotInTrash: it is not there. :raises CorruptFile: it is, and is damaged.
        """
        damaged: CorruptFile | None = None
        for path in (self._layout.file(sha1), self._old.file(sha1)):
            if path.is_file():
                found = digest_of(path)
                if found == sha1:
                    return path
                damaged = CorruptFile(path=display(path), found=found, sha1=sha1, advice="It was not restored; load it "
                                      "from a channel, and empty the trash.")
        raise damaged or NotInTrash(sha1=sha1, store=display(self._store.root))

    def put_back(self, source: Path, sha1: str) -> bool:
        """Move a file of the trash back into the store; False, and nothing done, when one of its name is there."""
        target = self._store.file(sha1)
        with translated("restoring", target):
            if not name_new(source, target, durable=self._durable):
                return False
            self.delete(source)
        return True

    def delete(self, path: Path) -> None:
        """Delete a file of the trash, and the directories that are empty then.

        :raises OSError: as from the system, for the caller's ``translated``.
        """
        path.unlink(missing_ok=True)
        with suppress(OSError):  # others are in it; ``rename_into`` makes it again for one that comes now
            for _, directory in zip(range(3), path.parents, strict=False):
                directory.rmdir()

    def list(self, *, old: bool = True) -> Iterator[Trashed]:
        """Yield what is in the trash, in the order of the SHA-1.

        :param old: also what a program of 2022 left in ``sha1-trash/``.
        """
        yield from heapq.merge(self._list(self._layout, old=False), self._list(self._old, old=True) if old else ())

    def _list(self, layout: Layout, *, old: bool) -> Iterator[Trashed]:
        for entry in walk(layout):
            with suppress(FileNotFoundError):
                found = layout.file(entry.sha1).lstat()
                yield Trashed(entry.sha1, found.st_size, found.st_ctime, old, found.st_mtime_ns)


def digest_of(path: Path) -> str:
    """Return the SHA-1 of a file. :raises DiskError: it cannot be read."""
    with translated("reading", path):
        fd = os.open(path, os.O_RDONLY)
        try:
            return digest_file(fd, _CHUNK_SIZE_BYTES).sha1
        finally:
            os.close(fd)

"""What was evicted or removed, for a while: ``trash/``, laid out like ``sha1/``.

A file goes there, and comes back, by name alone: no byte is copied and none is freed. When it went is what the file
system keeps as the time of its last change of status, so there is nothing else to write down.

A directory of 2022 may have files in ``sha1-trash/``, put there for a user to look at. They are listed and restored as
well, and only deleted by who asks for that.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .._core import digest_file
from ..errors import CorruptFile, DiskError, DiskFull, NotInTrash
from .census import walk
from .disk import display, name_new, rename_into, translated
from .layout import Layout

__all__ = ["Trash", "Trashed", "digest_of"]

_CHUNK_SIZE_BYTES = 20 * 1024 * 1024


class Trashed(NamedTuple):
    """A file in the trash: ``size`` in bytes, ``since`` in seconds since 1970; ``old`` of ``sha1-trash/``."""

    sha1: str
    size: int
    since: float
    old: bool


class Trash:
    """The trash of one storage directory. Methods raise DiskError when the disk refuses."""

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        self._store = Layout(root)
        self._layout = Layout(root, files="trash")
        self._old = Layout(root, files="sha1-trash")
        self._durable = durable

    def path(self, sha1: str) -> Path:
        """Return where a file of this name lies in the trash, if there is one."""
        return self._layout.file(sha1)

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
            source.unlink(missing_ok=True)
        return True

    def list(self) -> Iterator[Trashed]:
        """Yield what is in the trash, in the order of the SHA-1."""
        yield from heapq.merge(self._list(self._layout, old=False), self._list(self._old, old=True))

    def _list(self, layout: Layout, *, old: bool) -> Iterator[Trashed]:
        for entry in walk(layout):
            with suppress(FileNotFoundError):
                found = layout.file(entry.sha1).stat()
                yield Trashed(entry.sha1, found.st_size, found.st_ctime, old)

    def empty(self, *, before: float, old: bool, spared: Collection[str] = ()) -> tuple[int, int]:
        """Delete what went into the trash before a time in seconds since 1970; return how many files and bytes.

        :param old: also what a program of 2022 left in ``sha1-trash/``, maybe the only copy.
        :raises DiskError, DiskFull: some could not be deleted; the others were.
        """
        files = size = 0
        failure: DiskError | DiskFull | None = None
        for trashed in self.list() if old else self._list(self._layout, old=False):
            if trashed.since < before and trashed.sha1 not in spared:
                path = (self._old if trashed.old else self._layout).file(trashed.sha1)
                try:
                    with translated("emptying the trash", path):
                        path.unlink(missing_ok=True)
                except (DiskError, DiskFull) as error:
                    failure = failure or error
                    continue
                files += 1
                size += trashed.size
        if failure is not None:
            raise failure
        return files, size


def digest_of(path: Path) -> str:
    """Return the SHA-1 of a file. :raises DiskError: it cannot be read."""
    with translated("reading", path):
        fd = os.open(path, os.O_RDONLY)
        try:
            return digest_file(fd, _CHUNK_SIZE_BYTES).sha1
        finally:
            os.close(fd)

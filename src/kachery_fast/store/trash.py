"""What was evicted or removed, for a while: ``sha1-trash/``, laid out like ``sha1/`` (2022).

A file goes there, and comes back, by a rename: no byte is copied and none is freed. When it went is what the file
system keeps as the time of its last change of status, so there is nothing else to write down.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import NotInTrash
from .census import walk
from .disk import display, rename_into, translated
from .layout import Layout

__all__ = ["Trash", "Trashed"]


class Trashed(NamedTuple):
    """A file in the trash: ``size`` in bytes, ``since`` in seconds since 1970."""

    sha1: str
    size: int
    since: float


class Trash:
    """The trash of one storage directory. Methods raise DiskError when the disk refuses."""

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        self._store = Layout(root)
        self._layout = Layout(root, files="sha1-trash")
        self._durable = durable

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

    def put_back(self, sha1: str) -> Path:
        """Move a file back to where it came from, and return that. :raises NotInTrash: it is not here."""
        source, target = self._layout.file(sha1), self._store.file(sha1)
        with translated("restoring", target):
            if not source.is_file():
                raise NotInTrash(sha1=sha1, store=display(self._store.root))
            rename_into(source, target, durable=self._durable)
        return target

    def list(self) -> Iterator[Trashed]:
        """Yield what is in the trash, in the order of the SHA-1."""
        for entry in walk(self._layout):
            with suppress(FileNotFoundError):
                found = self._layout.file(entry.sha1).stat()
                yield Trashed(entry.sha1, found.st_size, found.st_ctime)

    def empty(self, *, before: float) -> tuple[int, int]:
        """Delete what went into the trash before a time in seconds since 1970; return how many files and bytes."""
        files = size = 0
        for trashed in self.list():
            if trashed.since < before:
                path = self._layout.file(trashed.sha1)
                with translated("emptying the trash", path):
                    path.unlink(missing_ok=True)
                files += 1
                size += trashed.size
        return files, size

"""Reading ``mutables.db`` and ``feeds.db`` of the daemon of 2022 (WIRE-2022.md, part B) without a change to them.

SQLite writes into a database that it only reads, when a daemon that was killed left a journal beside it. So a file
with a journal is copied, and the copy is read; any other is opened as one that nobody changes, which takes no lock and
makes no file beside it.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from .disk import display, find_size, make_directories, translated

__all__ = ["FEEDS_NAME", "MUTABLES_NAME", "WORK_PREFIX", "OldDatabase", "fingerprint_of_files"]

MUTABLES_NAME = "mutables.db"
FEEDS_NAME = "feeds.db"
# Copies hold private keys. A start of the node removes what a kill left of them.
WORK_PREFIX = ".takeover-"

_JOURNALS = ("-journal", "-wal")


class OldDatabase:
    """One database of 2022, open for reading; a missing file is an empty one.

    What is wrong with the file is not raised but noted in ``problem``, so that what could be read before is kept.

    :param path: the database.
    :param work: the directory for a copy, where one is needed.
    :raises DiskFull, DiskError: there is no room for the copy.
    """

    def __init__(self, path: Path, work: Path) -> None:
        self.path = path
        self.problem = ""
        self._work: Path | None = None
        self._connection: sqlite3.Connection | None = None
        self.exists = find_size(path) is not None
        self._before = fingerprint_of_files(path)
        if not self.exists:
            return
        try:
            self._connection = self._connect(work)
            self._connection.text_factory = bytes
            self._check()
        except sqlite3.Error as error:
            self._note(error)
        except BaseException:
            self.close()
            raise

    def rows(self, statement: str, *arguments: Any) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a statement, texts as bytes, as far as they can be read."""
        if self._connection is None:
            return
        try:
            yield from self._connection.execute(statement, arguments)
        except sqlite3.Error as error:
            self._note(error)

    def close(self) -> None:
        """Close the file and remove the copy; notes whether the file was written to meanwhile."""
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
        if self._work is not None:
            shutil.rmtree(self._work, ignore_errors=True)
            self._work = None
        if fingerprint_of_files(self.path) != self._before:
            self.problem = self.problem or "it was written to while it was read; stop the daemon of 2022 first"

    def __enter__(self) -> OldDatabase:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def _connect(self, work: Path) -> sqlite3.Connection:
        beside = [self.path.with_name(self.path.name + suffix) for suffix in _JOURNALS]
        if not any(map(find_size, beside)):
            return sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro&immutable=1", uri=True,
                                   isolation_level=None, check_same_thread=False)
        with translated("copying", self.path):
            make_directories(work, durable=False)
            self._work = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=work))  # mode 0700
            for path in (self.path, *beside):
                if find_size(path) is not None:
                    shutil.copyfile(path, self._work / path.name)
        return sqlite3.connect(self._work / self.path.name, isolation_level=None, check_same_thread=False)

    def _check(self) -> None:
        """A damaged index would leave rows out without a word."""
        assert self._connection is not None
        found = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if found is None or found[0] != b"ok":
            why = b"nothing in it can be read" if found is None else found[0]
            self.problem = f"it is damaged ({' '.join(why.decode('utf-8', 'replace').split())})"

    def _note(self, error: sqlite3.Error) -> None:
        self.problem = self.problem or f"it is damaged, or not of 2022 ({error})"

    def __str__(self) -> str:
        return display(self.path)


def fingerprint_of_files(*paths: Path) -> list[list[int] | None]:
    """Return [size in bytes, mtime in ns] of each database and of the journals beside it; None for no file.

    :raises DiskError: they cannot be looked up.
    """
    found: list[list[int] | None] = []
    for path in paths:
        for file in (path, *(path.with_name(path.name + suffix) for suffix in _JOURNALS)):
            with translated("look-up", file):
                try:
                    stat = file.stat()
                    found.append([stat.st_size, stat.st_mtime_ns])
                except (FileNotFoundError, NotADirectoryError):
                    found.append(None)
    return found

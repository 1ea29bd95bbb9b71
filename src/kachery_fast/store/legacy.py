"""Reading ``mutables.db`` and ``feeds.db`` of the daemon of 2022 (WIRE-2022.md, part B) without a change to them.

SQLite writes into a database that it only reads, when a daemon that was killed left a journal beside it. So a file
with a journal is copied, and the copy is read; any other is opened as one that nobody changes, which takes no lock and
makes no file beside it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from .disk import display, find_size, translated, user_name
from .naming import make_directories

__all__ = ["FEEDS_NAME", "MUTABLES_NAME", "WORK_PREFIX", "OldDatabase", "fingerprint_of_files"]

MUTABLES_NAME = "mutables.db"
FEEDS_NAME = "feeds.db"
# Copies hold private keys. A start of the node removes what a kill left of them.
WORK_PREFIX = ".takeover-"

_JOURNALS = ("-journal", "-wal")
_READ_SIZE_BYTES = 4 * 1024 * 1024
# SQLite calls back after so many of its steps, which are a few milliseconds.
_CALL_BACK_STEPS = 100_000
# What SQLite says of a file that it could not read this time, as against one that is not as it should be.
_TEMPORARY = ("unable to open", "disk I/O error", "is locked", "disk is full", "out of memory", "readonly database")


class OldDatabase:
    """One database of 2022, open for reading; a missing file is an empty one.

    What is wrong with the file is not raised but noted in ``problem``, so that what could be read before is kept;
    ``temporary`` says that it may be gone the next time, though the file is the same.

    :param path: the database.
    :param work: the directory for a copy, where one is needed.
    :param tick: called now and then, while something goes on. What it raises ends that, also once it has raised it.
    :raises DiskFull, DiskError: there is no room for the copy.
    """

    def __init__(self, path: Path, work: Path, tick: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self.problem = ""
        self.temporary = False
        self._tick = tick
        self._work: Path | None = None
        self._connection: sqlite3.Connection | None = None
        self.exists = find_size(path) is not None
        self._before = _contents_of(path)
        # Read once first: an error then is the disk's own, in its own words, and the check that follows is quick.
        if not self.exists or not self._read_through():
            return
        try:
            self._connection = self._connect(work)
            self._connection.text_factory = bytes
            self._connection.set_progress_handler(tick, _CALL_BACK_STEPS)
            self._check()
        except (sqlite3.Error, UnicodeDecodeError) as error:
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
        except (sqlite3.Error, UnicodeDecodeError) as error:
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
        if _contents_of(self.path) != self._before and not self.problem:
            self.problem = "it was written to while it was read; stop the daemon of 2022 first"
            self.temporary = True

    def __enter__(self) -> OldDatabase:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def _connect(self, work: Path) -> sqlite3.Connection:
        if not any(map(find_size, self._files()[1:])):
            return sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro&immutable=1", uri=True,
                                   isolation_level=None, check_same_thread=False)
        with translated("copying", self.path):
            make_directories(work, durable=False)
            self._work = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=work))  # mode 0700
            for path in self._files():
                if find_size(path) is not None:
                    with path.open("rb") as source, (self._work / path.name).open("wb") as copy:
                        while data := source.read(_READ_SIZE_BYTES):
                            copy.write(data)
                            self._tick()
        return sqlite3.connect(self._work / self.path.name, isolation_level=None, check_same_thread=False)

    def _files(self) -> list[Path]:
        return [self.path, *(self.path.with_name(self.path.name + suffix) for suffix in _JOURNALS)]

    def _read_through(self) -> bool:
        """Read every byte; whether that was possible."""
        for path in self._files():
            if find_size(path) is None:
                continue
            try:
                fd = os.open(path, os.O_RDONLY)
                try:
                    while os.read(fd, _READ_SIZE_BYTES):
                        self._tick()
                finally:
                    os.close(fd)
            except FileNotFoundError:
                continue  # a journal that ended just now
            except OSError as error:
                self.problem, self.temporary = _why_unreadable(path, error), True
                return False
        return True

    def _check(self) -> None:
        """A damaged index would leave rows out without a word."""
        assert self._connection is not None
        found = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if found is None or found[0] != b"ok":
            why = b"nothing in it can be read" if found is None else found[0]
            self.problem = f"it is damaged ({' '.join(why.decode('utf-8', 'replace').split())})"

    def _note(self, error: sqlite3.Error | UnicodeDecodeError) -> None:
        # Of a damaged schema SQLite says more than can be decoded. Of what the tick raised it says "interrupted".
        try:
            self._tick()
        except BaseException:
            self.close()
            raise
        if not self.problem:
            self.temporary = any(sign in str(error) for sign in _TEMPORARY)
            self.problem = (f"it could not be read this time ({error})" if self.temporary else
                            f"it is damaged, or not of 2022 ({error})")

    def __str__(self) -> str:
        return display(self.path)


def fingerprint_of_files(*paths: Path) -> list[list[int] | None]:
    """Return [size in bytes, mtime and ctime in ns, inode, mode, user, group] of each database and of the journals
    beside it; None for no file.

    :raises DiskError: they cannot be looked up.
    """
    found: list[list[int] | None] = []
    for path in paths:
        for file in (path, *(path.with_name(path.name + suffix) for suffix in _JOURNALS)):
            with translated("look-up", file):
                try:
                    status = file.stat()
                    found.append([status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino,
                                  status.st_mode, status.st_uid, status.st_gid])
                except (FileNotFoundError, NotADirectoryError):
                    found.append(None)
    return found


def _contents_of(path: Path) -> list[list[int] | None]:
    """What changes when the database is written to, and not when it gets another owner."""
    return [None if found is None else found[:2] for found in fingerprint_of_files(path)]


def _why_unreadable(path: Path, error: OSError) -> str:
    """Say why a file cannot be read, and for a lack of permission, what to do."""
    what = "it" if path.suffix == ".db" else f"{path.name} beside it"
    text = f"{what} cannot be read ({error.strerror or error})"
    if not isinstance(error, PermissionError):
        return text
    with suppress(OSError):
        found = path.stat()
        user = user_name(os.geteuid())
        text += (f": it belongs to {user_name(found.st_uid)} and has mode {stat.S_IMODE(found.st_mode):04o}, and this "
                 f"program runs as {user}. Let {user} read it, as with: sudo chown {user} {shlex.quote(str(path))}")
        if found.st_uid == os.geteuid():
            text = text[:text.rindex("sudo")] + f"chmod u+r {shlex.quote(str(path))}"
    return text

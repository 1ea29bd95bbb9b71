"""Small databases of the store: one SQLite file each, durable, for its owner's eyes alone.

WAL with ``synchronous = FULL``: a transaction that has ended is on the disk, one that has not is as if it had never
begun, whatever kills the process (https://sqlite.org/wal.html, https://sqlite.org/pragma.html#pragma_synchronous).
Several threads and processes may use one file at once; SQLite sees to it that there is one writer at a time. Its
errors are translated here, once.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import DatabaseUnusable, DiskError, KacheryError
from .disk import disk_error, display, translated
from .naming import make_directories

__all__ = ["Database", "decode_row"]

log = logging.getLogger("kachery_fast.store")

# How long one transaction may wait for that of another process.
_BUSY_SECONDS = 30.0
# Idle reading connections that are kept for the next reader.
_IDLE_READERS_MAX = 8
# A log that grew beyond this, by one long transaction, is cut again once its pages are in the database.
_LOG_SIZE_BYTES_MAX = 64 * 1024 * 1024

# What SQLite says (sqlite3ErrStr in its main.c; the codes themselves are known to Python from 3.11 on) of a file that
# is not as SQLite left it.
_DAMAGE = ("malformed", "is not a database", "unsupported file format", "Could not decode to UTF-8", "no such table",
           "no such column")
_FULL, _IO_ERROR, _LOCKED = "database or disk is full", "disk I/O error", "is locked"
_SHARED_SIZE_BYTES = 32768
_DAMAGE_ADVICE = ("Nothing of it was changed. Restore it from a backup, or move it away to begin anew without what it "
                  "held.")

# SQLite's locks are those of POSIX: they fall when any descriptor of the file is closed in the same process. So a new
# file is made, and closed again, while nobody else in this process can open it.
_creating = threading.Lock()


class Database:
    """One SQLite file, shared by the threads of this process.

    :param path: the file; it is made, mode 0600, with its directories where it is missing.
    :param steps: the statements that bring an empty file to version 1 of the tables, then from 1 to 2, and so on; once
        released, a step is never changed.
    :param advice: what to do when it is damaged or gone; without it, a backup is what helps.
    :param read_only: for a directory where nothing may be written; ``writing`` fails. The file has to be there.
    :raises DatabaseUnusable: the file is damaged, is not a database of this kind, or was written by a newer version.
    :raises DiskFull, DiskError: it cannot be opened, made or written.
    """

    def __init__(self, path: Path, steps: Sequence[Sequence[str]], *, advice: str = "",
                 read_only: bool = False) -> None:
        self.path = path
        self._advice = advice
        self._read_only = read_only
        self._name = os.fspath(path)
        self._turn = threading.Lock()  # of the one writing connection
        self._lock = threading.Lock()  # of the two fields that follow
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        self._inode = -1 if read_only else self._make_file()
        with self._errors("opening"):
            self._writer = self._connect()
            try:
                self._prepare(steps)
            except BaseException:
                self._writer.close()
                raise

    def close(self) -> None:
        """Wait for the transaction that is under way, then close; a second call does nothing."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        with self._turn, suppress(sqlite3.Error):
            for connection in (*idle, self._writer):  # the last one moves the log into the database
                connection.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Read one state of the database, whatever is written meanwhile, on a connection of one's own.

        :raises DatabaseUnusable, DiskError: it cannot be read, or was closed.
        """
        with self._errors("reading"):
            connection = self._take_reader()
            try:
                connection.execute("BEGIN")
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                connection.close()
                raise
            self._keep_reader(connection)

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Write in one transaction: on the disk when the block has ended, and undone when it raised.

        Other writers, of this and of other processes, wait until then, so what is read here holds until it is written.

        :raises DatabaseUnusable: the file is damaged, or was removed or replaced.
        :raises DiskFull, DiskError: the disk refused, another process holds it for too long, or it was closed.
        """
        with self._turn, self._errors("writing"):
            self._check_open()
            connection = self._writer
            connection.execute("BEGIN IMMEDIATE")
            try:
                self._check_in_place()
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # else SQLite has taken it back already
                    with suppress(sqlite3.Error):
                        connection.execute("ROLLBACK")
                raise

    # --- opening

    def _make_file(self) -> int:
        """Make the file where it is missing, see that others cannot read it, and return its inode."""
        with _creating, translated("opening", self.path):
            if not self.path.parent.is_dir():
                make_directories(self.path.parent, durable=True)
            with suppress(FileExistsError):
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                try:
                    if os.geteuid() == 0:  # else the owner of the store could not use it
                        owner = self.path.parent.stat()
                        os.fchown(fd, owner.st_uid, owner.st_gid)
                finally:
                    os.close(fd)
            found = self.path.stat()
            if found.st_mode & 0o077:
                log.warning("%s could be read by others than its owner; its mode is 0600 now", self.path)
                self.path.chmod(0o600)
            return found.st_ino

    def _connect(self) -> sqlite3.Connection:
        if self._read_only:
            return self._connect_read_only()
        connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            for pragma in ("synchronous = FULL", "fullfsync = ON", "foreign_keys = ON", "secure_delete = FAST",
                           f"journal_size_limit = {_LOG_SIZE_BYTES_MAX}"):
                connection.execute(f"PRAGMA {pragma}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect_read_only(self) -> sqlite3.Connection:
        """Connect without writing. With no log beside it the file is whole, and needs neither locks nor shared memory.

        https://sqlite.org/wal.html#read_only_databases
        """
        log_name = Path(self._name + "-wal")
        whole = not log_name.exists() or not log_name.stat().st_size
        connection = sqlite3.connect(f"{self.path.absolute().as_uri()}?{'immutable=1' if whole else 'mode=ro'}",
                                     uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA query_only = ON")
        return connection

    def _prepare(self, steps: Sequence[Sequence[str]]) -> None:
        connection = self._writer
        connection.execute("BEGIN")  # so that both are of one moment
        version, foreign = _version_of(connection), _has_tables(connection)
        connection.execute("COMMIT")
        if version > len(steps):
            raise DatabaseUnusable(path=display(self.path), why=f"its tables have version {version}, and this program "
                                   f"knows {len(steps)}", advice="Use a newer kachery-fast.")
        if foreign and not version:
            raise DatabaseUnusable(path=display(self.path), why="it is another program's", advice="Move it away.")
        if self._read_only:
            return
        if _set_wal(connection) != "wal":
            # A file system without shared memory; a rollback journal needs its directory flushed as well.
            connection.execute("PRAGMA synchronous = EXTRA")
        if version == len(steps):
            return
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = _version_of(connection)  # another process may have been quicker
            for statement in (statement for step in steps[version:] for statement in step):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {max(version, len(steps))}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    # --- connections

    def _take_reader(self) -> sqlite3.Connection:
        with self._lock:
            self._check_open()
            if self._idle:
                return self._idle.pop()
        connection = self._connect()
        connection.execute("PRAGMA query_only = ON")
        return connection

    def _keep_reader(self, connection: sqlite3.Connection) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _IDLE_READERS_MAX:
                self._idle.append(connection)
                return
        connection.close()

    def _check_open(self) -> None:
        if self._closed:
            raise DiskError(action="the use", path=display(self.path), why="it was closed")

    def _check_in_place(self) -> None:
        """A file that was removed would take all that is written from now on with it when it is closed."""
        try:
            inode = os.stat(self._name).st_ino  # noqa: PTH116 - before each transaction: a Path costs more than the call
        except FileNotFoundError:
            inode = -1
        if inode != self._inode:
            raise DatabaseUnusable(path=display(self.path), why="it was removed or replaced while it was in use",
                                   advice=self._advice or "Put it back and start the program anew.")

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.ProgrammingError, sqlite3.IntegrityError):
            raise  # a fault of this program
        except UnicodeDecodeError as error:  # Python cannot read what SQLite says of a damaged schema, or a text of it
            raise self._translate(sqlite3.DatabaseError(f"malformed text: {error}"), action) from error
        except (sqlite3.Error, OSError) as error:
            raise self._translate(error, action) from error

    def _translate(self, error: sqlite3.Error | OSError, action: str) -> KacheryError:
        text = str(error)
        if isinstance(error, sqlite3.Error):
            if any(sign in text for sign in _DAMAGE):
                return DatabaseUnusable(path=display(self.path), why=f"it is damaged ({text})",
                                        advice=self._advice or _DAMAGE_ADVICE)
            error = OSError(errno.ENOSPC if self._is_full(text) else errno.EIO, _plain(text))
        return disk_error(error, action, self.path, needed="more")

    def _is_full(self, text: str) -> bool:
        if text == _FULL:
            return True
        # Memory shared between processes is a file too, and has another word for it.
        with suppress(OSError):
            found = os.statvfs(self.path.parent)
            return text == _IO_ERROR and found.f_bavail * found.f_frsize < _SHARED_SIZE_BYTES
        return False


def decode_row(data: Any) -> Any:
    """Return what was written to a row as JSON; for the blocks of ``Database``.

    :raises sqlite3.DatabaseError: it is not JSON, so the file is damaged.
    """
    try:
        return json.loads(data)
    except (ValueError, TypeError, RecursionError) as error:
        raise sqlite3.DatabaseError(f"malformed row: {error}") from None


def _set_wal(connection: sqlite3.Connection) -> str:
    """Set the mode, which is a property of the file, and return the one that the file system allows."""
    give_up_at = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            # Two that set it at once would wait for each other, so SQLite tells both at once that it is locked.
            if _LOCKED not in str(error) or time.monotonic() > give_up_at:
                raise
            time.sleep(0.01)


def _version_of(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _has_tables(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


def _plain(text: str) -> str:
    return f"another process has kept it locked for {_BUSY_SECONDS:g} s" if _LOCKED in text else text

"""What the store asks of the operating system: reading a source safely, writing whole or not at all.

A file of the store is written under a temporary name, flushed, and renamed to its final one, so a crash at any
point leaves either nothing or the whole of it. A writer holds an advisory lock (flock) on its temporary file for as
long as it writes; the system drops the lock when the writer dies, however it dies, and that is how ``leftovers``
tells a dead file from one in use. ``OSError`` is translated here, once.
"""

# Plain system calls on strings: at ten thousand files a second a Path costs more than the call.
# ruff: noqa: PTH108, PTH116

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import secrets
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from ..errors import DiskError, DiskFull, FileChanged, LocalFileMissing, LocalFileUnreadable, NotADataFile
from .flushing import flush
from .naming import make_directories, rename_into

__all__ = [
    "SPAN_SIZE_BYTES",
    "SourceFile",
    "TempFile",
    "check_room",
    "disk_error",
    "display",
    "find_size",
    "source_errors",
    "translated",
    "user_name",
    "write_all",
]

# One write or read call: long enough to cost nothing, short enough that Ctrl-C is honoured within 0.2 s.
SPAN_SIZE_BYTES = 8 * 1024 * 1024

_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL
_FULL = (errno.ENOSPC, errno.EDQUOT)
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def display(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> str:
    """Return a path as text that can always be printed: bytes that are not UTF-8 show as ``\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@contextmanager
def translated(action: str, path: str | os.PathLike[str], *, needed: int | str = "?") -> Iterator[None]:
    """Translate an ``OSError`` of the block, which was ``action`` (a noun) of ``path``, into the project's errors.

    :raises DiskFull: no space or quota was left; ``needed`` is how many bytes were to be written.
    :raises DiskError: anything else that the disk refused.
    """
    try:
        yield
    except OSError as error:
        raise disk_error(error, action, path, needed=needed) from error


def disk_error(
    error: OSError, action: str, path: str | os.PathLike[str], *, needed: int | str = "?"
) -> DiskFull | DiskError:
    """Return the project's error for one of the system; the arguments are those of ``translated``."""
    if error.errno in _FULL:
        return DiskFull(what=f"the {action} of {display(path)}", path=display(path), free=_free_near(path),
                        needed=needed)
    return DiskError(action=f"the {action}", path=display(path), why=error.strerror or str(error))


def check_room(directory: Path, size_bytes: int) -> None:
    """Check that ``size_bytes`` more bytes fit the file system of ``directory`` (or of its nearest parent).

    :raises DiskFull: they do not.
    """
    free = _free_near(directory)
    if isinstance(free, int) and free < size_bytes:
        raise DiskFull(what=f"{size_bytes} bytes", path=display(directory), free=free, needed=size_bytes)


def _free_near(path: str | os.PathLike[str]) -> int | str:
    place = Path(path)
    while True:
        try:
            found = os.statvfs(place)
        except OSError:
            if place.parent == place:
                return "?"
            place = place.parent
            continue
        # Root may use the reserve that others may not.
        blocks = found.f_bfree if os.geteuid() == 0 else found.f_bavail
        return int(blocks * found.f_frsize)


def find_size(path: Path | str) -> int | None:
    """Return the size of the regular file ``path`` in bytes, or None when there is no such file.

    :raises DiskError: it cannot be told.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise disk_error(error, "look-up", path) from error
    return found.st_size if stat.S_ISREG(found.st_mode) else None


# --- sources


@contextmanager
def source_errors(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> Iterator[None]:
    """Translate an ``OSError`` of the block, which opened or read a user's file.

    :raises LocalFileMissing: there is no such file.
    :raises LocalFileUnreadable: it is there but cannot be read.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LocalFileMissing(path=display(path)) from error
    except OSError as error:
        raise LocalFileUnreadable(path=display(path), why=error.strerror or str(error)) from error


class SourceFile:
    """A user's file, open for reading, that must not change while it is read.

    :param inspect: is shown what was opened, by whatever name; what it raises ends the opening.
    :raises LocalFileMissing: there is no such file.
    :raises LocalFileUnreadable: it cannot be opened.
    :raises NotADataFile: a directory, pipe, socket or device.
    """

    def __init__(self, path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
                 inspect: Callable[[os.stat_result], None] | None = None) -> None:
        self.path = os.fsdecode(path)
        if "\0" in self.path:
            raise LocalFileMissing(path=display(self.path))
        with source_errors(path):
            # Without O_NONBLOCK the opening of a named pipe would wait for a writer for ever.
            self.fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            with source_errors(path):
                self.stat = os.fstat(self.fd)
            for is_kind, kind in _KINDS:
                if is_kind(self.stat.st_mode):
                    raise NotADataFile(path=display(path), kind=kind)
            if inspect is not None:
                inspect(self.stat)
        except BaseException:
            os.close(self.fd)
            raise
        self.size = self.stat.st_size

    def check_unchanged(self, read_size_bytes: int) -> None:
        """Check, after reading it, that the file is what it was when it was opened.

        :param read_size_bytes: how many bytes were read up to its end.
        :raises FileChanged: another length, time, or another file under the same name.
        """
        before, why = self.stat, ""
        with source_errors(self.path):
            after = os.fstat(self.fd)
        try:
            named = os.stat(self.path)
        except OSError:
            raise FileChanged(path=display(self.path), why="it was removed or renamed") from None
        if (named.st_dev, named.st_ino) != (before.st_dev, before.st_ino):
            why = "another file was put in its place"
        elif read_size_bytes != before.st_size or after.st_size != before.st_size:
            why = f"{before.st_size} bytes at first, then {after.st_size}"
            if after.st_size == before.st_size:
                why = f"{before.st_size} bytes by its size, {read_size_bytes} by reading"
        elif after.st_mtime_ns != before.st_mtime_ns:
            why = "it was written to"
        elif after.st_ctime_ns != before.st_ctime_ns:
            why = "its inode was changed"
        if why:
            raise FileChanged(path=display(self.path), why=why)

    def find_path(self) -> str:
        """Return an absolute path without ``..`` that leads to the file, through the symbolic links that were given."""
        path = os.path.abspath(self.path)  # noqa: PTH100 - Path.absolute keeps ".."
        with suppress(OSError):
            found = os.stat(path)
            if (found.st_dev, found.st_ino) == (self.stat.st_dev, self.stat.st_ino):
                return path
        return os.path.realpath(self.path)  # behind a symbolic link, ".." is another directory than before it

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()


# --- writing


class TempFile:
    """A new file in ``directory``, locked by this process, that becomes another file's bytes or goes away.

    :param durable: whether directories that have to be made for it are flushed.
    Its mode is 0666 and the umask, its group the directory's where that is setgid: what a user's own files get.

    :raises DiskFull, DiskError: it cannot be made.
    """

    def __init__(self, directory: Path, *, durable: bool = False) -> None:
        self.directory = directory
        self.fd = -1
        with translated("writing", directory):
            while self.fd < 0:
                self.path = directory / f"{os.getpid()}-{secrets.token_hex(8)}.tmp"
                try:
                    fd = os.open(self.path, _CREATE, 0o666)
                except FileNotFoundError:
                    make_directories(directory, durable=durable)
                    fd = os.open(self.path, _CREATE, 0o666)
                if _lock_own(fd):
                    self.fd = fd
                else:
                    os.close(fd)

    def publish(self, final: Path, *, durable: bool) -> None:
        """Give the file its final name, replacing what has it now; when ``durable``, it survives a power cut.

        :raises DiskFull, DiskError: it cannot be done; the temporary file remains, and ``discard`` removes it.
        """
        with translated("writing", final):
            if durable:
                flush(self.fd)
            rename_into(self.path, final, durable=durable)
        self.close()

    def discard(self) -> None:
        """Remove the file unless it was published; never fails."""
        if self.fd >= 0:
            with suppress(OSError):
                os.unlink(self.path)
            self.close()

    def close(self) -> None:
        """Close the file and so give up its lock; a second call does nothing."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            with suppress(OSError):
                os.close(fd)

    def __enter__(self) -> TempFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.discard()


def _lock_own(fd: int) -> bool:
    """Lock a file just made; False when a cleaner was quicker and has removed it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Some network file systems know no locks; there leftovers are told by their age.
        return True
    return os.fstat(fd).st_nlink > 0


def write_all(fd: int, view: memoryview, stop: threading.Event | None = None) -> None:
    """Write the whole of ``view`` (bytes), in spans; return early once ``stop`` is set.

    :raises OSError: as from the system.
    """
    position, end = 0, view.nbytes
    while position < end and not (stop is not None and stop.is_set()):
        position += os.write(fd, view[position : position + SPAN_SIZE_BYTES])


def user_name(user_id: int) -> str:
    """Return a user's name, or the number of one that this machine does not know."""
    try:
        return pwd.getpwuid(user_id).pw_name
    except KeyError:
        return str(user_id)

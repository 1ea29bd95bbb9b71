"""The directory of the embedded bucket: objects under strict names, each there whole or not at all.

An object is created once. Only the index of a subfeed and the result of a task may be replaced.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from .._core import digest_file
from ..errors import DiskError, InvalidName, ObjectExists, ObjectMissing, TooLarge
from ..splice import FileRefused, write_at
from .bucket_incoming import Incoming, make_folders
from .bucket_names import is_hashed, is_object_name
from .bucket_stock import Stock, StoredObject, walk

__all__ = ["LAST_READ_STEP_SECONDS", "ObjectFiles", "OpenObject"]

# The time of the last read is a file's access time. It is set here, as many file systems are mounted so that it is not
# kept, and no more often than this.
LAST_READ_STEP_SECONDS = 3600.0

_INCOMING = ".incoming"  # no channel can be called so
# No upload rests for as long; younger ones may be another process's, where several share the directory.
_LEFTOVER_SECONDS = 3600.0
_DIGEST_CHUNK_BYTES = 20 * 1024 * 1024


class OpenObject(NamedTuple):
    """An object opened for reading; the reader closes ``fd``. ``etag`` is another for whatever replaces it."""

    fd: int
    size_bytes: int
    etag: str


class ObjectFiles:
    """Objects as files below ``root``.

    A new object is written to a temporary file on the same file system and *linked* to its name, which fails when
    the name is taken: of two racing creators exactly one wins, and no reader ever sees half an object. What replaces
    an object is *renamed* to its name: who reads the old one reads it to its end. The space is allocated first, so
    that a full disk is known before the bytes travel. Objects hashed by their name are not fsynced unless ``fsync``
    says so: the bucket is a cache whose readers check every byte, a process that is killed loses nothing, and what a
    power failure damages is found by its hash and replaced. Indexes of subfeeds and task results, which no hash in
    their name protects, always are.

    :param shared: other processes, perhaps other users' on other machines, keep their objects here too: what is made
        has the permissions of ``root``, which is there already, and what others have just made or removed is
        looked for past what a file system like NFS remembers of names.
    :param clock: seconds since the epoch, for the times of last reads.
    :raises DiskError: ``root`` cannot be made or cleared of what an earlier run left unfinished.
    """

    def __init__(
        self, root: Path, *, fsync: bool = False, shared: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self._fsync = fsync
        self._shared = shared
        self._clock = clock
        self._reading: Counter[str] = Counter()
        self._reading_lock = threading.Lock()
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._root = Path(os.path.realpath(root))
            self._incoming = self._root / _INCOMING
            self._folder_mode = stat.S_IMODE(self._root.stat().st_mode) if shared else None
            make_folders(self._incoming, self._folder_mode, self._root)
            for leftover in self._incoming.iterdir():
                with suppress(OSError if shared else FileNotFoundError):  # its upload ends just now, or it is another's
                    if not shared:
                        leftover.unlink()
                    elif time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                        (leftover.rmdir if leftover.is_dir() else leftover.unlink)()
        except OSError as error:
            raise DiskError(action="the bucket's directory", path=root, why=error.strerror) from error
        self.stock = Stock(self._root)

    def open(self, name: str) -> OpenObject:
        """Open an object for reading. :raises ObjectMissing: :raises DiskError:"""
        path = self._path(name)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            try:
                fd = os.open(path, flags)
            except FileNotFoundError:
                if not self._shared:
                    raise
                self._look_anew(path)
                fd = os.open(path, flags)
        except (FileNotFoundError, NotADirectoryError):
            raise ObjectMissing(object=name) from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ObjectMissing(object=name) from None
            raise DiskError(action="reading", path=path, why=error.strerror) from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise ObjectMissing(object=name)
        return OpenObject(fd, status.st_size, f'"{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ino:x}"')

    def _look_anew(self, path: Path) -> None:
        """Open the folders above a file. NFS remembers for a while which names were there and which not; to open a
        folder has it compare with the server (nfs(5), "close-to-open" and "lookupcache")."""
        for folder in reversed(path.parents[:len(path.parents) - len(self._root.parents)]):
            os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))

    @contextmanager
    def reading(self, name: str) -> Iterator[OpenObject]:
        """Open an object for a reader, whose use of it is noted. It does not expire in the block. Raises as ``open``.
        """
        with self._reading_lock:
            self._reading[name] += 1
        try:
            found = self.open(name)
            try:
                self._note_use(found.fd, os.fstat(found.fd))
                yield found
            finally:
                os.close(found.fd)
        finally:
            with self._reading_lock:
                self._reading[name] -= 1
                if not self._reading[name]:
                    del self._reading[name]

    def offered(self, name: str) -> bool:
        """Whether there is an object, or anything else, under the name of one that somebody brings.

        That counts as a use: who brings it will tell others that it is there. :raises DiskError:
        """
        path = self._path(name)
        try:
            if self._shared:
                self._look_anew(path)
            self._note_use(path, path.lstat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise DiskError(action="reading", path=path, why=error.strerror) from error
        return True

    def _note_use(self, file: int | Path, status: os.stat_result) -> None:
        now = self._clock()
        if abs(now - status.st_atime) < LAST_READ_STEP_SECONDS or not stat.S_ISREG(status.st_mode):
            return
        with suppress(OSError):  # a file of another user's, or a disk that is read-only: it counts as unread
            os.utime(file, ns=(int(now * 1e9), status.st_mtime_ns))

    def create(self, name: str, size_bytes: int, *, replace: bool = False) -> Incoming:
        """Begin a new object, one that takes the place of what is there when ``replace``.

        :raises DiskFull: no room for it. :raises DiskError:
        """
        fsync = self._fsync or not is_hashed(name)
        incoming = Incoming(name, self._path(name), self._incoming / secrets.token_hex(16), size_bytes, self.stock,
                            fsync=fsync, replace=replace, folder_mode=self._folder_mode,
                            look_anew=self._look_anew if self._shared else None)
        self._note_use(incoming.fd, os.fstat(incoming.fd))
        return incoming

    def write(self, name: str, data: bytes, *, replace: bool = False) -> bool:
        """Make a whole object of these bytes. Raises and returns as ``make``."""
        return self.make(name, len(data), lambda fd: write_at(fd, data, 0), replace=replace)

    def make(self, name: str, size_bytes: int, fill: Callable[[int], None], *, replace: bool = False) -> bool:
        """Make a whole object; False when there was one already. Raises as ``create`` and ``Incoming.commit`` do.

        :param fill: writes its bytes into an open file; what it raises leaves nothing.
        """
        incoming = self.create(name, size_bytes, replace=replace)
        try:
            fill(incoming.fd)
            incoming.commit()
        except FileRefused as refused:
            raise incoming.translated(refused.error, "writing") from refused.error
        except ObjectExists:
            return False
        finally:
            incoming.close()
        return True

    def size(self, name: str) -> int:
        """Return an object's size in bytes. :raises ObjectMissing: :raises DiskError:"""
        found = self.open(name)
        os.close(found.fd)
        return found.size_bytes

    def sha1(self, name: str) -> str:
        """Return the SHA-1 of an object's bytes in hex. :raises ObjectMissing: :raises DiskError:"""
        found = self.open(name)
        try:
            return digest_file(found.fd, _DIGEST_CHUNK_BYTES).sha1
        except OSError as error:
            raise DiskError(action="reading", path=self._path(name), why=error.strerror) from error
        finally:
            os.close(found.fd)

    def read(self, name: str, limit_bytes: int) -> tuple[bytes, str]:
        """Return an object's bytes and its etag.

        :raises TooLarge: it is longer than ``limit_bytes``. :raises ObjectMissing: :raises DiskError:
        """
        found = self.open(name)
        with os.fdopen(found.fd, "rb") as file:
            if found.size_bytes > limit_bytes:
                raise TooLarge(what=f"The object {name}", size=found.size_bytes, limit=limit_bytes,
                               setting="the reader's limit")
            try:
                return file.read(), found.etag
            except OSError as error:
                raise DiskError(action="reading", path=self._path(name), why=error.strerror) from error

    def remove(self, name: str, *, etag: str | None = None) -> None:
        """Remove an object; readers that have it open keep it.

        :param etag: that of the object meant; what has replaced it meanwhile stays. None: whatever is there.
        :raises ObjectMissing: it is not there (any more). :raises DiskError:
        """
        path = self._path(name)
        with self.stock.lock:
            if etag is not None:
                found = self.open(name)
                os.close(found.fd)
                if found.etag != etag:
                    raise ObjectMissing(object=name)
            self._unlink(name, path)

    def expire(self, name: str, unread_since: float) -> bool:
        """Remove an object that was last read before ``unread_since`` and is not being read; whether it was.

        :raises DiskError:
        """
        path = self._path(name)
        with self.stock.lock:
            with self._reading_lock:
                if name in self._reading:
                    return False
            try:
                if path.lstat().st_atime >= unread_since:
                    return False
                self._unlink(name, path)
            except (FileNotFoundError, NotADirectoryError, ObjectMissing):
                return False
            except OSError as error:
                raise DiskError(action="looking at", path=path, why=error.strerror) from error
        return True

    def _unlink(self, name: str, path: Path) -> None:
        """Remove a file and the folders that are empty without it. Call with the stock's lock held."""
        try:
            status = path.lstat()
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            raise ObjectMissing(object=name) from None
        except OSError as error:
            raise DiskError(action="removing", path=path, why=error.strerror) from error
        if stat.S_ISREG(status.st_mode):
            self.stock.changed(name, -1, -status.st_size)
        for folder in path.parents:
            try:
                if folder == self._root:
                    break
                folder.rmdir()
            except OSError:  # there is more in it
                break

    def objects(self, prefix: str = "", after: str = "") -> Iterator[StoredObject]:
        """Yield all objects whose names begin with ``prefix`` and come after ``after``, in order, without holding them
        all."""
        return walk(self._root, prefix, after)

    def _path(self, name: str) -> Path:
        """Where an object is. :raises InvalidName: not an object's name. :raises ObjectMissing: behind a symlink."""
        if not is_object_name(name):
            raise InvalidName(name=name, kind="object", why="it is not <channel>/(sha1|feeds|task_results)/...")
        path = self._root / name
        if os.path.realpath(path.parent) != str(path.parent):
            raise ObjectMissing(object=name)
        return path

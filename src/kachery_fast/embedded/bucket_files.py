"""The directory of the embedded bucket: objects under strict names, each there whole or not at all.

An object is created once. Only the index of a subfeed and the result of a task may be replaced.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .._core import digest_file
from ..errors import DiskError, DiskFull, InvalidName, ObjectExists, ObjectMissing, TooLarge

__all__ = ["Incoming", "ObjectFiles", "OpenObject", "is_object_name", "is_replaceable"]

_INCOMING = ".incoming"  # no channel can be called so
# No upload rests for as long; younger ones may be another process's, where several share the directory.
_LEFTOVER_SECONDS = 3600.0
_DIGEST_CHUNK_BYTES = 20 * 1024 * 1024

# WIRE-2022.md §4, and our segments. Each name but theirs repeats the head of its hash as three folders.
_OBJECT_NAME = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}/(?:"
    r"(?:sha1|task_results)/([0-9a-f]{2})/([0-9a-f]{2})/([0-9a-f]{2})/\1\2\3[0-9a-f]{34}"
    r"|feeds/([0-9a-f]{2})/([0-9a-f]{2})/([0-9a-f]{2})/\4\5\6[0-9a-f]{58}"
    r"/subfeeds/([0-9a-f]{2})/([0-9a-f]{2})/([0-9a-f]{2})/\7\8\9[0-9a-f]{34}"
    r"/(?:subfeed\.json|segments/[0-9a-f]{40}|0|[1-9][0-9]{0,14})"
    r")", re.ASCII)


def is_object_name(text: str) -> bool:
    """Whether ``text`` is ``<channel>/(sha1|feeds|task_results)/...`` exactly as nodes build it."""
    return _OBJECT_NAME.fullmatch(text) is not None


def is_replaceable(name: str) -> bool:
    """Whether an object of this name (which must be one) may be replaced: a subfeed's index, a task's result."""
    return name.endswith("/subfeed.json") or name.split("/", 2)[1] == "task_results"


def _is_hashed(name: str) -> bool:
    """Whether the name tells the SHA-1 of the object's bytes."""
    return "/segments/" in name or name.split("/", 2)[1] == "sha1"


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

    :param shared: other processes, perhaps on other machines, keep their objects here too.
    :raises DiskError: ``root`` cannot be made or cleared of what an earlier run left unfinished.
    """

    def __init__(self, root: Path, *, fsync: bool = False, shared: bool = False) -> None:
        self._fsync = fsync
        # Between looking which object has a name and acting on that, nothing else gets the name.
        self._naming = threading.Lock()
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._root = Path(os.path.realpath(root))
            self._incoming = self._root / _INCOMING
            self._incoming.mkdir(mode=0o700, exist_ok=True)
            for leftover in self._incoming.iterdir():
                with suppress(FileNotFoundError):  # its upload ends just now
                    if not shared or time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                        leftover.unlink()
        except OSError as error:
            raise DiskError(action="the bucket's directory", path=root, why=error.strerror) from error

    def open(self, name: str) -> OpenObject:
        """Open an object for reading. :raises ObjectMissing: :raises DiskError:"""
        path = self._path(name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
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

    def exists(self, name: str) -> bool:
        """Whether there is an object, or anything else, under the name."""
        return os.path.lexists(self._path(name))

    def create(self, name: str, size_bytes: int, *, replace: bool = False) -> Incoming:
        """Begin a new object, one that takes the place of what is there when ``replace``.

        :raises DiskFull: no room for it. :raises DiskError:
        """
        fsync = self._fsync or not _is_hashed(name)
        naming = self._naming if replace else None
        return Incoming(name, self._path(name), self._incoming / secrets.token_hex(16), size_bytes, fsync=fsync,
                        replacing=naming)

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
        try:
            with self._naming:
                if etag is not None:
                    found = self.open(name)
                    os.close(found.fd)
                    if found.etag != etag:
                        raise ObjectMissing(object=name)
                path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            raise ObjectMissing(object=name) from None
        except OSError as error:
            raise DiskError(action="removing", path=path, why=error.strerror) from error

    def names(self, prefix: str = "") -> Iterator[str]:
        """Yield the names of all objects that begin with ``prefix``, in no order, without holding them all."""
        pending = [""]
        while pending:
            folder = pending.pop()
            with suppress(FileNotFoundError), os.scandir(self._root / folder) as entries:
                for entry in entries:
                    name = f"{folder}{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        if f"{name}/".startswith(prefix) or prefix.startswith(f"{name}/"):
                            pending.append(f"{name}/")
                    elif entry.is_file(follow_symlinks=False) and name.startswith(prefix) and is_object_name(name):
                        yield name

    def _path(self, name: str) -> Path:
        """Where an object is. :raises InvalidName: not an object's name. :raises ObjectMissing: behind a symlink."""
        if not is_object_name(name):
            raise InvalidName(name=name, kind="object", why="it is not <channel>/(sha1|feeds|task_results)/...")
        path = self._root / name
        if os.path.realpath(path.parent) != str(path.parent):
            raise ObjectMissing(object=name)
        return path


class Incoming:
    """An object on its way: write to ``fd`` by offset, then ``commit``; ``close`` without it leaves nothing."""

    def __init__(self, name: str, path: Path, temporary: Path, size_bytes: int, *, fsync: bool,
                 replacing: threading.Lock | None = None) -> None:
        self._replacing = replacing
        self._name, self._path, self._temporary, self._fsync = name, path, temporary, fsync
        self._size_bytes = size_bytes
        self.fd = -1
        try:
            self.fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            # Asked first: an allocation that cannot succeed may take all that is left before it fails.
            if size_bytes > _free_bytes(temporary.parent):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if size_bytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.fd, 0, size_bytes)
        except OSError as error:
            self.close()
            raise self.translated(error, "creating") from error

    def commit(self) -> None:
        """Give the file its name. :raises ObjectExists: somebody was faster. :raises DiskFull: :raises DiskError:"""
        try:
            if self._fsync:
                os.fsync(self.fd)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._replacing is None:
                os.link(self._temporary, self._path)
            else:
                with self._replacing:
                    self._temporary.rename(self._path)
            if self._fsync:
                folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except FileExistsError:
            raise ObjectExists(object=self._name) from None
        except OSError as error:
            raise self.translated(error, "creating") from error

    def close(self) -> None:
        """Close and remove the temporary file; no-op the second time."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            with suppress(OSError):
                self._temporary.unlink()

    def translated(self, error: OSError, action: str) -> DiskFull | DiskError:
        """What it means that the disk refused."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            folder = self._temporary.parent
            return DiskFull(what=f"the object {self._name}", path=folder, free=_free_bytes(folder),
                            needed=self._size_bytes)
        return DiskError(action=action, path=self._path, why=error.strerror)


def _free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize

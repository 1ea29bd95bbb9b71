"""An object of the embedded bucket on its way to its name."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..errors import DiskError, DiskFull, ObjectExists
from .bucket_stock import Stock

__all__ = ["Incoming", "make_folders"]

_NAMING_TRIES = 5


class Incoming:
    """An object on its way: write to ``fd`` by offset, then ``commit``; ``close`` without it leaves nothing.

    :param temporary: where it is until then. :param folder_mode: that of folders which several users share.
    :param look_anew: has names that are below a folder looked up at the server, where that is another machine.
    """

    def __init__(self, name: str, path: Path, temporary: Path, size_bytes: int, stock: Stock, *, fsync: bool,
                 replace: bool = False, folder_mode: int | None = None,
                 look_anew: Callable[[Path], None] | None = None) -> None:
        self._stock, self._replace, self._folder_mode, self._look_anew = stock, replace, folder_mode, look_anew
        self._name, self._path, self._temporary, self._fsync = name, path, temporary, fsync
        self._size_bytes = size_bytes
        self.fd = -1
        try:
            self.fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            if folder_mode is not None:
                os.fchmod(self.fd, folder_mode & 0o444 | 0o200)
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
            with self._stock.lock:
                self._take_name()
            if self._fsync:
                self._fsync_folder()
        except FileExistsError:
            raise ObjectExists(object=self._name) from None
        except OSError as error:
            raise self.translated(error, "creating") from error

    def _take_name(self) -> None:
        if not self._replace:
            self._in_folder(os.link)
            self._stock.changed(self._name, 1, self._size_bytes)
            return
        try:
            old: os.stat_result | None = self._path.lstat()
        except FileNotFoundError:
            old = None
        self._in_folder(os.rename)
        if old is not None and stat.S_ISREG(old.st_mode):
            self._stock.changed(self._name, 0, self._size_bytes - old.st_size)
        else:
            self._stock.changed(self._name, 1, self._size_bytes)

    def _in_folder(self, name_it: Callable[[Path, Path], None]) -> None:
        """Give the name. The folder is made in the same breath: one that is empty may be removed, also by others."""
        for tries_left in reversed(range(_NAMING_TRIES)):
            try:
                make_folders(self._path.parent, self._folder_mode, self._temporary.parent)
                name_it(self._temporary, self._path)
            except (FileNotFoundError, FileExistsError) as error:
                if self._is_named():
                    return
                if not tries_left or (isinstance(error, FileExistsError) and self._is_taken()):
                    raise
            else:
                return

    def _is_named(self) -> bool:
        """Whether the name is this file's: NFS may answer a request that it got twice with what became of the second.
        """
        with suppress(OSError):
            return os.path.samestat(self._path.lstat(), os.fstat(self.fd))
        return False

    def _is_taken(self) -> bool:
        """Whether there is something under the name, past what NFS remembers of what was there."""
        if self._look_anew is not None:
            try:
                self._look_anew(self._path)
                self._path.lstat()
            except FileNotFoundError:
                return False
        return True

    def _fsync_folder(self) -> None:
        try:
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # the object was removed again
            return
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Close and remove the temporary file; no-op the second time."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with suppress(OSError):  # it is closed all the same, and fsync has told what matters
                os.close(fd)
            with suppress(OSError):
                self._temporary.unlink()

    def translated(self, error: OSError, action: str) -> DiskFull | DiskError:
        """What it means that the disk refused."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            folder = self._temporary.parent
            return DiskFull(what=f"the object {self._name}", path=folder, free=_free_bytes(folder),
                            needed=self._size_bytes)
        return DiskError(action=action, path=self._path, why=error.strerror)


def make_folders(folder: Path, mode: int | None, nursery: Path) -> None:
    """Make a folder, and those above it that are missing, with these permissions, whatever the umask; None: by it.

    :param nursery: where each is made, to appear with its permissions: another user, who has no part in a folder
        without them, meets none, also when this process is killed.
    """
    if mode is None:
        folder.mkdir(parents=True, exist_ok=True)
        return
    for missing in reversed([above for above in (folder, *folder.parents) if not above.exists()]):
        made = nursery / f"{missing.name}-{secrets.token_hex(16)}"
        made.mkdir()
        try:
            made.chmod(mode)
            made.rename(missing)  # also in the place of an empty one
        except OSError as error:
            with suppress(OSError):
                made.rmdir()
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) and not missing.is_dir():  # else it is another's now
                raise


def _free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize

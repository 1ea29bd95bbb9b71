"""Flushing: what must be on the disk before a call returns, so that a power cut does not take it back.

Each function raises the system's ``OSError``, for the caller's ``disk.translated``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["flush", "flush_file", "sync_directory", "sync_file_system"]


def flush(fd: int) -> None:
    """Flush a file, or a directory's entries, to the disk itself.

    On macOS ``fsync`` leaves the bytes in the drive's cache, where a power cut takes them; fcntl(2) there names
    ``F_FULLFSYNC`` for what ``fsync`` does elsewhere.

    :raises OSError: as from the system.
    """
    command = getattr(fcntl, "F_FULLFSYNC", None)
    if command is not None:
        try:
            fcntl.fcntl(fd, command)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY):
                raise
        else:
            return
    os.fsync(fd)


def flush_file(path: str | Path) -> None:
    """Flush a file that is not open here.

    :raises OSError: as from the system.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        flush(fd)
    finally:
        os.close(fd)


def sync_directory(path: str | Path) -> None:
    """Flush the entries of a directory to the disk.

    :raises OSError: as from the system; file systems that cannot flush a directory are left alone.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        flush(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def sync_file_system(directory: Path) -> bool:
    """Flush the whole file system of ``directory`` by Linux's ``syncfs``; False where the system has no such call.

    One such flush costs about as much as one ``fsync`` and serves any number of files.

    :raises OSError: as from the system.
    """
    call = _syncfs()
    if call is None:
        return False
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if call(fd) != 0:
            number = ctypes.get_errno()
            if number == errno.ENOSYS:
                return False
            raise OSError(number, os.strerror(number))
    finally:
        os.close(fd)
    return True


def _syncfs() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    call = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if call is None:
        return None
    call.argtypes, call.restype = [ctypes.c_int], ctypes.c_int
    found: Callable[[int], int] = call
    return found

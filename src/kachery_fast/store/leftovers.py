"""Removing what crashed writers left behind.

Every writer holds a lock (flock) on what it writes; one that can be taken belongs to nobody any more. Only ``tmp/``
and the store's own directory are listed, never the files, so that cleaning a store of millions takes no longer.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import InvalidName
from .disk import display, translated
from .layout import MARKER_SUFFIX, Layout

__all__ = ["BATCH_SUFFIX", "Cleaned", "clean_leftovers"]

BATCH_SUFFIX = ".batch"
DAY_SECONDS = 86400.0

_log = logging.getLogger("kachery_fast.store")


class Cleaned(NamedTuple):
    """How many files were removed, and how many bytes they held."""

    temp_files: int
    parts: int
    bytes: int


def clean_leftovers(layout: Layout, *, now: float, partial_keep_days: float) -> Cleaned:
    """Remove temporary files without a writer, those of 2022 older than a day, and old unfinished downloads.

    What belongs to another user and cannot be removed is left, with a line in the log.

    :param now: seconds since 1970.
    :raises DiskError: the directories cannot be listed.
    """
    temp_files = parts = size = 0
    for path in _list(layout.temp):
        if path.name.endswith(MARKER_SUFFIX):
            freed = _clean_part(layout, path, now - partial_keep_days * DAY_SECONDS)
            parts += freed is not None
        else:
            freed = _attempt(_clean_temp, path, now)
            temp_files += freed is not None
        size += freed or 0
    for path in _list(layout.root):
        if path.name.startswith("store.file.") and path.name.endswith(".tmp"):
            # The daemon of 2022 held no lock; no store of its took a day.
            freed = _attempt(_remove_older, path, now - DAY_SECONDS)
            temp_files += freed is not None
            size += freed or 0
    if temp_files or parts:
        _log.info("removed %d temporary files and %d old downloads, %d bytes", temp_files, parts, size)
    return Cleaned(temp_files, parts, size)


def _list(directory: Path) -> list[Path]:
    with translated("listing", directory):
        try:
            return sorted(directory.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []


def _attempt(remove: Callable[[Path, float], int | None], path: Path, time_seconds: float) -> int | None:
    try:
        return remove(path, time_seconds)
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("%s is left over and cannot be removed: %s", display(path), error.strerror)
        return None


def _clean_temp(path: Path, now: float) -> int | None:
    """Remove a temporary file, or a batch's directory, unless it is in use; return its bytes."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        found = os.fstat(fd)
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK or found.st_mtime > now - DAY_SECONDS:
                return None
        # The lock is held until the name is gone, and a writer looks for that once it has the lock.
        if stat.S_ISREG(found.st_mode):
            path.unlink()
            return found.st_size
        if not path.name.endswith(BATCH_SUFFIX):
            return None
        size = 0
        for member in path.iterdir():
            size += member.lstat().st_size
            member.unlink()
        path.rmdir()
        return size
    finally:
        os.close(fd)


def _clean_part(layout: Layout, marker: Path, older_than: float) -> int | None:
    """Remove an old unfinished download and its marker; return its bytes, None when there was none to remove."""
    sha1 = marker.name[: -len(MARKER_SUFFIX)]
    try:
        part = layout.part(sha1)
    except InvalidName:
        return None
    freed = _attempt(_remove_older, part, older_than)
    if not part.exists():
        # The marker is made shortly before its part: only an old one has lost it for good.
        with suppress(OSError):
            _remove_older(marker, older_than)
    return freed


def _remove_older(path: Path, older_than: float) -> int | None:
    """Remove a file last written before ``older_than`` unless it is locked; return its bytes."""
    found = path.lstat()
    if found.st_mtime >= older_than or not stat.S_ISREG(found.st_mode):
        return None
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            return None
    else:
        path.unlink()
        return found.st_size
    finally:
        os.close(fd)
    path.unlink()
    return found.st_size

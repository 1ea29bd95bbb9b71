"""Giving files their names, and making the directories that these are in."""

# Plain system calls on strings: at ten thousand files a second a Path costs more than the call.
# ruff: noqa: PTH102, PTH104, PTH116, PTH120

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .flushing import sync_directory

__all__ = ["make_directories", "name_new", "rename_into", "rename_new"]

_TRIES_MAX = 100
# Of a file system without hard links (FAT, many of FUSE), or one that allows no more, or none to this user.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EXDEV, errno.EMLINK)

_AT_FDCWD, _RENAME_NOREPLACE = -100, 1  # renameat2(2), <linux/fs.h>
_RENAME_EXCL = 4  # renamex_np(2) of macOS, <sys/stdio.h>
# Of a system, or a file system, that cannot promise to replace nothing.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


def rename_into(source: str | Path, final: str | Path, *, durable: bool) -> None:
    """Rename ``source`` to ``final``, making its directories when missing.

    :raises OSError: as from the system, for the caller's ``translated``.
    """
    directory = os.path.dirname(final)
    for _ in range(_TRIES_MAX):
        try:
            os.rename(source, final)
            break
        except FileNotFoundError:
            if not os.path.lexists(source):
                raise
        with suppress(FileNotFoundError):  # who empties the trash may take empty directories away at this moment
            make_directories(directory, durable=durable)
    else:
        raise OSError(errno.EBUSY, "its directory is taken away again and again", directory)
    if durable:
        sync_directory(directory)


def name_new(source: Path, final: Path, *, durable: bool, before_unsure: Callable[[], object] | None = None) -> bool:
    """Give ``source`` the name ``final``, with its directories; False when something has it, which is left alone.

    ``source`` may keep its own name: the caller unlinks it. A rename alone would take the place of what another
    process put there a moment ago.

    :param before_unsure: called before such a rename, on a file system that knows nothing better.
    :raises OSError: as from the system, for the caller's ``translated``.
    """
    try:
        try:
            os.link(source, final)
        except FileNotFoundError:
            make_directories(final.parent, durable=durable)
            os.link(source, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        make_directories(final.parent, durable=durable)
        try:
            if not rename_new(source, final):
                if os.path.lexists(final):
                    return False
                if before_unsure is not None:
                    before_unsure()
                os.rename(source, final)
        except FileExistsError:
            return False
    if durable:
        sync_directory(final.parent)
    return True


def make_directories(path: str | Path, *, durable: bool) -> list[str]:
    """Make ``path`` and its parents, mode 0777 and the umask; return those that this call made.

    What root makes gets the owner of the directory it is in, who has to go on with it.

    :param durable: flush each new one's entry, which stands in its parent.
    :raises OSError: as from the system.
    """
    path = str(path)
    made: list[str] = []
    try:
        os.mkdir(path, 0o777)
    except FileExistsError:
        return []
    except FileNotFoundError:
        made = make_directories(os.path.dirname(path), durable=durable)
        try:
            os.mkdir(path, 0o777)
        except FileExistsError:  # another writer was quicker
            return made
    if os.geteuid() == 0:
        _give_to_owner(path)
    if durable:
        sync_directory(os.path.dirname(path))
    return [*made, path]


def _give_to_owner(path: str) -> None:
    owner = os.stat(os.path.dirname(path) or ".")
    if owner.st_uid or owner.st_gid:
        # By descriptor: a name could lead elsewhere by now, and what is there would be given away.
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            with suppress(PermissionError):  # root is nobody on some mounts
                os.fchown(fd, owner.st_uid, owner.st_gid)
        finally:
            os.close(fd)


def rename_new(source: str | Path, final: str | Path) -> bool:
    """Rename ``source`` to ``final`` unless something has that name; False, and nothing done, where that is unknown.

    For file systems without hard links: the call that ``os`` does not have.

    :raises FileExistsError: something has it. :raises OSError: as from the system.
    """
    call = _call()
    if call is None:
        return False
    if call(os.fsencode(source), os.fsencode(final)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), os.fspath(source), None, os.fspath(final))


@functools.cache
def _call() -> Callable[[bytes, bytes], int] | None:
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform.startswith("linux") and hasattr(library, "renameat2"):
        at = library.renameat2
        at.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
        return lambda source, final: int(at(_AT_FDCWD, source, _AT_FDCWD, final, _RENAME_NOREPLACE))
    if sys.platform == "darwin":
        call = library.renamex_np
        call.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint]
        return lambda source, final: int(call(source, final, _RENAME_EXCL))
    return None

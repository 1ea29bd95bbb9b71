"""A rename that replaces nothing, for file systems without hard links: the call that ``os`` does not have."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["rename_new"]

_AT_FDCWD, _RENAME_NOREPLACE = -100, 1  # renameat2(2), <linux/fs.h>
_RENAME_EXCL = 4  # renamex_np(2) of macOS, <sys/stdio.h>
# Of a system, or a file system, that cannot promise to replace nothing.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


def rename_new(source: str | Path, final: str | Path) -> bool:
    """Rename ``source`` to ``final`` unless something has that name; False, and nothing done, where that is unknown.

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

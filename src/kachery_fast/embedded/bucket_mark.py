"""The mark that makes a folder a bucket of somebody's: an empty file that is named by a secret number.

Nodes go by a folder that their hub names. A hub that is not to be trusted could name any; where it, or its admin, could
not put a file before, it cannot have them read or write.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from ..errors import DiskError

__all__ = ["is_marked", "mark"]

_MARK = re.compile(r"[0-9a-f]{16,64}")


def is_marked(folder: Path, number: str) -> bool:
    """Whether a folder bears this mark; no when it cannot be looked at."""
    if not folder.is_absolute() or _MARK.fullmatch(number) is None:
        return False
    try:
        return stat.S_ISREG(os.lstat(_path(folder, number)).st_mode)
    except OSError:
        return False


def mark(folder: Path, number: str) -> None:
    """Mark a folder that is there. :raises DiskError: it is not, or it cannot be written to."""
    try:
        # For reading: it may be there already, and is not for writing.
        os.close(os.open(_path(folder, number), os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o444))
    except OSError as error:
        raise DiskError(action="the marking as a bucket", path=folder, why=error.strerror) from error


def _path(folder: Path, number: str) -> Path:
    return folder / f".kachery-bucket-{number}"

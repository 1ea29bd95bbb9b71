"""The note of what a take-over looked at, so that a start without news costs nothing: ``kachery-fast-takeover.json``.

It holds only for the same old files and for the databases that took them: one of ours that is lost, moved away or
restored from an older backup has another mark in its header, and the old files are looked at anew.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from ..errors import KacheryError
from . import feed_rows, mutables
from .database import Database
from .disk import TempFile, find_size, translated, write_all
from .feeds import DATABASE_NAME as FEEDS_DATABASE_NAME
from .objects import read_small
from .tally import Tally

__all__ = ["MARKER_NAME", "refused_before", "write_marker"]

MARKER_NAME = "kachery-fast-takeover.json"

_VERSION = 2
_SIZE_BYTES_MAX = 64 * 1024 * 1024
_DATABASES = {mutables.DATABASE_NAME: mutables.STEPS, FEEDS_DATABASE_NAME: feed_rows.STEPS}


def refused_before(root: Path, files: list[Any], mutable_size_bytes_max: int) -> list[tuple[str, str]] | None:
    """Return what was refused the last time, when that still holds; None when the old files are to be looked at.

    :param files: their fingerprint.
    :raises DiskFull, DiskError, DatabaseUnusable: this program's own databases cannot be read.
    """
    try:
        found = json.loads(read_small(root / MARKER_NAME, _SIZE_BYTES_MAX) or b"{}")
        if found["version"] != _VERSION or found["files"] != files:
            return None
        refused = [(str(what), str(why)) for what, why in found["refused"]]
        too_large_bytes, marks = found["tooLargeBytes"], found["marks"]
        if too_large_bytes is not None and int(too_large_bytes) <= mutable_size_bytes_max:
            return None
    except (KacheryError, ValueError, KeyError, TypeError, RecursionError):
        return None  # to look at all again does no harm
    for name in _DATABASES:
        if find_size(root / name) is None:
            return None
    return refused if marks == _marks(root) else None


def write_marker(root: Path, files: list[Any], tally: Tally) -> None:
    """Note what was looked at, and mark the databases that took it.

    :raises DiskFull, DiskError, DatabaseUnusable: it was not noted; the next start looks again.
    """
    content = {"version": _VERSION, "files": files, "marks": _marks(root, make=True), "refused": tally.refused,
               "tooLargeBytes": tally.too_large_bytes}
    with TempFile(root / "tmp", durable=True) as temp:
        with translated("writing", temp.path):
            write_all(temp.fd, memoryview(json.dumps(content).encode()))
        temp.publish(root / MARKER_NAME, durable=True)


def _marks(root: Path, *, make: bool = False) -> list[int]:
    """Return the mark of each database, a number that was drawn once (SQLite's application id); 0 for none yet."""
    found: list[int] = []
    for name, steps in _DATABASES.items():
        database = Database(root / name, steps)
        try:
            with database.reading() as connection:
                mark = int(connection.execute("PRAGMA application_id").fetchone()[0])
            if make and not mark:
                mark = 1 + secrets.randbelow((1 << 31) - 1)
                with database.writing() as connection:
                    connection.execute(f"PRAGMA application_id = {mark}")
        finally:
            database.close()
        found.append(mark)
    return found

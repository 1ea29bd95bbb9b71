"""Verifying every name of a store, and setting aside what is damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import CorruptFile, DiskError, KacheryError, LinkInvalid, NotInStore
from .census import walk
from .disk import display, find_size, translated
from .layout import Layout
from .naming import rename_into
from .objects import Located

__all__ = ["Verified", "set_aside", "verify_names"]

_log = logging.getLogger("kachery_fast.store")


class Verified(NamedTuple):
    """The outcome of verifying a whole store: how many names were sound and damaged, and the bytes hashed."""

    sound: int
    damaged: int
    bytes: int


def verify_names(
    layout: Layout, verify: Callable[[str], Located], *,
    on_result: Callable[[str, Located | KacheryError], None] | None, quarantine: bool, durable: bool
) -> Verified:
    """Call ``verify`` with every name of a store.

    :param on_result: called with each SHA-1 and where it is, or what is wrong with it.
    :param quarantine: move damaged stored files to ``damaged/``, and links that hold no more after them.
    """
    sound = damaged = size = 0
    for entry in walk(layout):
        result: Located | KacheryError
        try:
            result = verify(entry.sha1)
            sound += 1
            size += result.size
        except NotInStore:
            continue
        except (CorruptFile, LinkInvalid, DiskError) as error:
            result = error
            damaged += 1
            if quarantine and not isinstance(error, DiskError):
                path = set_aside(layout, entry.sha1, durable=durable)
                _log.warning("%s is damaged and was moved to %s", display(path), display(layout.damaged))
        if on_result is not None:
            on_result(entry.sha1, result)
    return Verified(sound, damaged, size)


def set_aside(layout: Layout, sha1: str, *, durable: bool) -> Path:
    """Move what is stored, or else linked, under a name to ``damaged/``; return where it was.

    :raises DiskError: it cannot be moved.
    """
    path = layout.file(sha1)
    if find_size(path) is None:
        path = layout.link(sha1)
    with translated("setting aside", path):
        rename_into(path, layout.damaged / path.name, durable=durable)
    return path

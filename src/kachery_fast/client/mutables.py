"""Mutables: small JSON values of this machine by JSON keys, which may change and are not shared.

They are read and written directly where the local store is this user's own, and the node's if one runs; else through
the node, whose they are then.
"""

from __future__ import annotations

import os
from typing import Any

from ..config import Settings
from ..errors import NodeError, NodeNotRunning
from ..store.mutables import DATABASE_NAME, MutableStore, encode_key, encode_value
from .connection import NodeConnection
from .place import Place, PlaceKind, find_place
from .storing import may_write

__all__ = ["delete", "find", "get", "items", "set"]


def get(key: Any, default: Any = None) -> Any:
    """Return the value of a mutable, or ``default`` when there is none.

    :param key: JSON: a text, number, list or dict of such; the order within a dict does not count.
    :raises InvalidArgument: the key is not JSON.
    :raises DiskError, DatabaseUnusable: the local store cannot be read.
    :raises NodeNotRunning, ClientAuthRefused: the node has to be asked, and does not answer or refuses.
    """
    found, value = find(key)
    return value if found else default


def find(key: Any) -> tuple[bool, Any]:
    """Return whether a mutable has a value, and the value; raises as ``get``."""
    place, name = find_place(), encode_key(key)
    if not _is_own(place):
        answer = _call(place, "get", b'{"key":%b}' % name)
        return bool(answer.get("found")), answer.get("value")
    if not _is_there(place.settings):
        return False, None
    with _open(place.settings) as mutables:
        return mutables.get(key)


def set(key: Any, value: Any, *, update: bool = True) -> bool:  # noqa: A001 - its name since 2022
    """Set a mutable. When this returns, the value is on the disk; two that set one key at once never mix.

    :param key, value: JSON.
    :param update: False to set it only where there is no value yet.
    :returns: whether it was set.
    :raises InvalidArgument: the key or the value is not JSON.
    :raises TooLarge: the value is longer than ``mutable_size_bytes_max``; put it into a file then.
    :raises DiskFull, DiskError, DatabaseUnusable: the local store cannot be written.
    :raises NodeNotRunning, ClientAuthRefused: the node has to be asked, and does not answer or refuses.
    """
    place = find_place()
    name, data = encode_key(key), encode_value(value, place.settings.mutable_size_bytes_max)
    if not _is_own(place):
        body = b'{"key":%b,"value":%b,"update":%b}' % (name, data, b"true" if update else b"false")
        return bool(_call(place, "set", body).get("changed"))
    with _open(place.settings) as mutables:
        return mutables.set(key, value, update=update)


def delete(key: Any) -> bool:
    """Delete a mutable; return whether it had a value. Raises as ``set``."""
    place, name = find_place(), encode_key(key)
    if not _is_own(place):
        return bool(_call(place, "delete", b'{"key":%b}' % name).get("changed"))
    if not _is_there(place.settings):
        return False
    with _open(place.settings) as mutables:
        return mutables.delete(key)


def items() -> list[tuple[Any, Any]]:
    """Return all keys and values, ordered by the keys' JSON; raises as ``get``."""
    place = find_place()
    if not _is_own(place):
        rows = _call(place, "list", b"{}").get("mutables")
        if not isinstance(rows, list):
            raise NodeError(what="its list of mutables is none")
        return [(row["key"], row["value"]) for row in rows]
    if not _is_there(place.settings):
        return []
    with _open(place.settings) as mutables:
        return list(mutables.items())


def _is_own(place: Place) -> bool:
    """Whether this user may open the file itself: it is for its owner's eyes alone, and the node's if one runs."""
    if place.kind is PlaceKind.APART or place.machine:
        return False
    storage_dir = place.settings.storage_dir
    path = storage_dir / DATABASE_NAME
    try:
        owner = next((place.stat().st_uid for place in (path, storage_dir) if place.exists()), os.geteuid())
    except OSError:
        return False
    return os.geteuid() in (0, owner) and may_write(storage_dir)


def _is_there(settings: Settings) -> bool:
    # Asking makes nothing.
    return (settings.storage_dir / DATABASE_NAME).exists()


def _open(settings: Settings) -> MutableStore:
    return MutableStore(settings.storage_dir, value_size_bytes_max=settings.mutable_size_bytes_max)


def _call(place: Place, what: str, body: bytes) -> dict[str, Any]:
    try:
        return NodeConnection(place.settings).call(f"/api/mutable/{what}", body)
    except NodeNotRunning as error:
        otherwise = f"{place.settings.storage_dir} is not yours"
        raise NodeNotRunning(url=error.details.get("url"), why=(
            f"{error.details.get('why')}; it is needed because {place.why_node(otherwise)}")) from error

"""Mutables: small JSON values by JSON keys, which may change and are not shared, in ``kachery-fast-mutables.db``.

A key is known by its canonical JSON (RFC 8785), so that {"a": 1, "b": 2} and {"b": 2, "a": 1} are one key. A value is
kept as it was given. Every change is on the disk when its call returns, and is whole or not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import rfc8785

from ..errors import BadMessage, InvalidArgument, KacheryError, TooLarge
from ..protocol.canonical import canonical_bytes
from .database import Database, decode_row

__all__ = ["ADMITTED_KEY", "DATABASE_NAME", "STEPS", "MutableStore", "encode_key", "encode_value"]

DATABASE_NAME = "kachery-fast-mutables.db"
# The lasting codes of clients that the node's owner admits, a list of texts; the name is of 2022.
ADMITTED_KEY = "_other_client_auth_codes"

STEPS = [["CREATE TABLE mutables (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"]]
# A key names something; what is long belongs into the value.
_KEY_SIZE_BYTES_MAX = 16 * 1024


class MutableStore:
    """The mutables of one storage directory; several processes may have them open at once.

    Every method raises InvalidArgument when the key is not JSON, DiskError or DiskFull when the disk refuses, and
    DatabaseUnusable when the file is damaged.

    :param root: the storage directory.
    :param value_size_bytes_max: the longest value, as JSON.
    """

    def __init__(self, root: Path, *, value_size_bytes_max: int) -> None:
        self._value_size_bytes_max = value_size_bytes_max
        self._database = Database(root / DATABASE_NAME, STEPS)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._database.close()

    def __enter__(self) -> MutableStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def get(self, key: Any) -> tuple[bool, Any]:
        """Return whether there is a value, and the value."""
        name = encode_key(key)
        with self._database.reading() as connection:
            row = connection.execute("SELECT value FROM mutables WHERE key = ?", (name,)).fetchone()
            return (False, None) if row is None else (True, decode_row(row[0]))

    def set(self, key: Any, value: Any, *, update: bool = True) -> bool:
        """Set a value; without ``update``, only where there is none. Return whether it was set.

        :raises InvalidArgument: the key or the value is not JSON.
        :raises TooLarge: it is too long.
        """
        name, data = encode_key(key), encode_value(value, self._value_size_bytes_max)
        with self._database.writing() as connection:
            return connection.execute(f"INSERT OR {'REPLACE' if update else 'IGNORE'} INTO mutables (key, value)"  # noqa: S608
                                      " VALUES (?, ?)", (name, data)).rowcount > 0

    def add(self, pairs: Iterable[tuple[Any, Any]]) -> tuple[int, list[KacheryError]]:
        """Set many values in one transaction, each only where there is none.

        :returns: how many were set, and an InvalidArgument or TooLarge for each pair that cannot be kept.
        """
        rows: list[tuple[bytes, bytes]] = []
        refused: list[KacheryError] = []
        for key, value in pairs:
            try:
                rows.append((encode_key(key), encode_value(value, self._value_size_bytes_max)))
            except (InvalidArgument, TooLarge) as error:
                refused.append(error)
        with self._database.writing() as connection:
            added = connection.executemany("INSERT OR IGNORE INTO mutables (key, value) VALUES (?, ?)", rows).rowcount
        return max(added, 0), refused

    def delete(self, key: Any) -> bool:
        """Delete a key; return whether there was a value."""
        name = encode_key(key)
        with self._database.writing() as connection:
            return connection.execute("DELETE FROM mutables WHERE key = ?", (name,)).rowcount > 0

    def items(self) -> Iterator[tuple[Any, Any]]:
        """Yield all keys and values, as they are at one moment, in the order of the keys' canonical JSON."""
        with self._database.reading() as connection:
            for key, value in connection.execute("SELECT key, value FROM mutables ORDER BY key"):
                yield decode_row(key), decode_row(value)


def encode_key(key: Any) -> bytes:
    """Return the canonical JSON of a key, by which it is known.

    :raises InvalidArgument: it is not JSON, or holds an integer beyond 2^53 - 1, which has the form of its neighbours.
    :raises TooLarge: it is too long.
    """
    try:
        data = rfc8785.dumps(key)
    except (rfc8785.CanonicalizationError, UnicodeError, RecursionError) as error:
        raise _refused("key", error) from None
    return _check_size(data, "The key of a mutable", _KEY_SIZE_BYTES_MAX, "a fixed limit")


def encode_value(value: Any, size_bytes_max: int) -> bytes:
    """Return the JSON of a value.

    :raises InvalidArgument: it is not JSON. :raises TooLarge: it is too long.
    """
    try:
        canonical_bytes(value)  # which is strict; it is not what is kept, since it rounds large integers
        data = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    except BadMessage as error:
        raise _refused("value", error.details["why"]) from None
    except RecursionError as error:
        raise _refused("value", error) from None
    return _check_size(data, "The value of a mutable", size_bytes_max, "mutable_size_bytes_max")


def _check_size(data: bytes, what: str, limit: int, setting: str) -> bytes:
    if len(data) > limit:
        raise TooLarge(what=what, size=len(data), limit=limit, setting=setting)
    return data


def _refused(what: str, why: object) -> InvalidArgument:
    return InvalidArgument(what=f"The {what} of a mutable is refused ({why}).")

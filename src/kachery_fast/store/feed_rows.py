"""The tables of the feed log, and what is said to them in SQL. Every function runs in its caller's transaction.

A message's row is ``subfeed row << 40 | number``, so that the messages of a subfeed lie together and in order in the
one B-tree that SQLite needs for them. Messages are kept as the canonical bytes that were signed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..protocol.feed_bodies import Segment
from ..protocol.feeds import Tail

__all__ = [
    "STEPS", "Place", "delete_orphans", "find_place", "forks", "insert_feed", "insert_messages", "listing",
    "make_place", "message", "messages", "put_fork", "put_segments", "segments", "set_head", "set_tail", "sizes",
]

_NUMBER_BITS = 40

STEPS = [[
    """CREATE TABLE feeds (
        id INTEGER PRIMARY KEY,
        feed TEXT NOT NULL UNIQUE,
        name TEXT UNIQUE,
        seed BLOB,
        created_ms INTEGER NOT NULL)""",
    # A subfeed of a deleted feed has none; it goes when all its messages are gone.
    """CREATE TABLE subfeeds (
        id INTEGER PRIMARY KEY,
        feed INTEGER REFERENCES feeds (id) ON DELETE SET NULL,
        subfeed TEXT NOT NULL,
        name TEXT,
        count INTEGER NOT NULL,
        signature TEXT NOT NULL,
        version INTEGER NOT NULL,
        forked_at INTEGER,
        head BLOB,
        UNIQUE (feed, subfeed))""",
    "CREATE TABLE messages (id INTEGER PRIMARY KEY, message BLOB NOT NULL)",
    """CREATE TABLE segments (
        subfeed INTEGER NOT NULL REFERENCES subfeeds (id) ON DELETE CASCADE,
        first INTEGER NOT NULL,
        end INTEGER NOT NULL,
        size INTEGER NOT NULL,
        sha1 TEXT NOT NULL,
        PRIMARY KEY (subfeed, first)) WITHOUT ROWID""",
    """CREATE TABLE forks (
        subfeed INTEGER NOT NULL REFERENCES subfeeds (id) ON DELETE CASCADE,
        number INTEGER NOT NULL,
        first BLOB NOT NULL,
        second BLOB NOT NULL,
        time_ms INTEGER NOT NULL,
        PRIMARY KEY (subfeed, number))""",
]]


@dataclass(frozen=True)
class Place:
    """Where a subfeed stands in the tables; ``subfeed_row`` is None as long as nothing is there."""

    feed_row: int
    seed: bytes | None
    subfeed_row: int | None
    tail: Tail
    forked_at: int | None
    head: bytes | None


def find_place(connection: sqlite3.Connection, feed_id: str, subfeed: str) -> Place | None:
    """Return the place of a subfeed; None where there is not even its feed."""
    row = connection.execute(
        "SELECT feeds.id, seed, subfeeds.id, count, signature, version, forked_at, head FROM feeds"
        " LEFT JOIN subfeeds ON subfeeds.feed = feeds.id AND subfeed = ? WHERE feeds.feed = ?",
        (subfeed, feed_id)).fetchone()
    if row is None:
        return None
    feed_row, seed, subfeed_row, count, signature, version, forked_at, head = row
    tail = Tail(feed_id, subfeed) if subfeed_row is None else Tail(feed_id, subfeed, count, signature, version)
    return Place(feed_row, seed, subfeed_row, tail, forked_at, head)


def insert_feed(connection: sqlite3.Connection, feed_id: str, name: str | None, seed: bytes | None,
                created_ms: int) -> None:
    """Make the row of a feed; without a seed it is a copy of another node's."""
    connection.execute("INSERT INTO feeds (feed, name, seed, created_ms) VALUES (?, ?, ?, ?)",
                       (feed_id, name, seed, created_ms))


def listing(connection: sqlite3.Connection, feed_id: str) -> list[tuple[Any, ...]]:
    """Return (feed, name, writable, subfeed, its name, count, forked at) of one feed, or of all when it is empty.

    A feed without subfeeds has one row, with None for all that is theirs.
    """
    return connection.execute(
        "SELECT feeds.feed, feeds.name, seed IS NOT NULL, subfeed, subfeeds.name, count, forked_at FROM feeds"
        " LEFT JOIN subfeeds ON subfeeds.feed = feeds.id WHERE ? IN ('', feeds.feed) ORDER BY feeds.id, subfeeds.id",
        (feed_id,)).fetchall()


def make_place(connection: sqlite3.Connection, place: Place, name: str | None) -> int:
    """Make the row of a subfeed, or note its name (JSON) where it was not known; return the row's id."""
    if place.subfeed_row is not None:
        if name is not None:
            connection.execute("UPDATE subfeeds SET name = ? WHERE id = ? AND name IS NULL", (name, place.subfeed_row))
        return place.subfeed_row
    made = connection.execute(
        "INSERT INTO subfeeds (feed, subfeed, name, count, signature, version) VALUES (?, ?, ?, 0, '', 0)",
        (place.feed_row, place.tail.subfeed, name)).lastrowid
    assert made is not None
    return made


def set_tail(connection: sqlite3.Connection, subfeed_row: int, tail: Tail) -> None:
    """Note where a subfeed ends now."""
    connection.execute("UPDATE subfeeds SET count = ?, signature = ?, version = ? WHERE id = ?",
                       (tail.count, tail.signature, tail.version, subfeed_row))


def set_head(connection: sqlite3.Connection, subfeed_row: int, head: bytes) -> None:
    """Keep a head (JSON)."""
    connection.execute("UPDATE subfeeds SET head = ? WHERE id = ?", (head, subfeed_row))


def put_fork(connection: sqlite3.Connection, subfeed_row: int, number: int, first: bytes, second: bytes,
             time_ms: int) -> None:
    """Keep the evidence of a fork, and take away what was held from its number on; the caller sets the tail."""
    connection.execute("INSERT OR IGNORE INTO forks (subfeed, number, first, second, time_ms) VALUES (?, ?, ?, ?, ?)",
                       (subfeed_row, number, first, second, time_ms))
    connection.execute("UPDATE subfeeds SET forked_at = ?, head = NULL WHERE id = ?", (number, subfeed_row))
    base = subfeed_row << _NUMBER_BITS
    connection.execute("DELETE FROM messages WHERE id >= ? AND id < ?", (base + number, base + (1 << _NUMBER_BITS)))
    connection.execute("DELETE FROM segments WHERE subfeed = ? AND end > ?", (subfeed_row, number))


def forks(connection: sqlite3.Connection, subfeed_row: int) -> list[tuple[int, bytes, bytes, int]]:
    """Return (number, first, second, milliseconds since the epoch) of each fork."""
    return connection.execute("SELECT number, first, second, time_ms FROM forks WHERE subfeed = ? ORDER BY number",
                              (subfeed_row,)).fetchall()


# --- messages


def insert_messages(connection: sqlite3.Connection, subfeed_row: int, first: int, signed: Iterable[bytes]) -> None:
    """Write messages from number ``first`` on.

    :raises sqlite3.IntegrityError: there is one of that number.
    """
    base = subfeed_row << _NUMBER_BITS
    connection.executemany("INSERT INTO messages (id, message) VALUES (?, ?)", enumerate(signed, base | first))


def message(connection: sqlite3.Connection, subfeed_row: int, number: int) -> bytes | None:
    """Return one message, or None."""
    row = connection.execute("SELECT message FROM messages WHERE id = ?",
                             (subfeed_row << _NUMBER_BITS | number,)).fetchone()
    return None if row is None else _checked(row[0])


def _checked(message: object) -> bytes:
    """:raises sqlite3.DatabaseError: what stands in the place of a message is none."""
    if not isinstance(message, bytes):
        raise sqlite3.DatabaseError("malformed row: a message is missing")
    return message


def messages(connection: sqlite3.Connection, subfeed_row: int, first: int, end: int) -> Iterator[bytes]:
    """Yield messages ``first`` to ``end`` (exclusive), as far as there are any."""
    base = subfeed_row << _NUMBER_BITS
    for row in connection.execute("SELECT message FROM messages WHERE id >= ? AND id < ? ORDER BY id",
                                  (base + first, base + end)):
        yield _checked(row[0])


def sizes(connection: sqlite3.Connection, subfeed_row: int, first: int) -> Iterator[int]:
    """Yield the length in bytes of each message from ``first`` on."""
    base = subfeed_row << _NUMBER_BITS
    for row in connection.execute("SELECT length(message) FROM messages WHERE id >= ? AND id < ? ORDER BY id",
                                  (base + first, base + (1 << _NUMBER_BITS))):
        yield row[0]


def delete_orphans(connection: sqlite3.Connection, messages_max: int) -> bool:
    """Delete up to ``messages_max`` messages of a deleted feed; whether something may be left."""
    row = connection.execute("SELECT id FROM subfeeds WHERE feed IS NULL LIMIT 1").fetchone()
    if row is None:
        return False
    base = row[0] << _NUMBER_BITS
    gone = connection.execute(
        "DELETE FROM messages WHERE id IN (SELECT id FROM messages WHERE id >= ? AND id < ? LIMIT ?)",
        (base, base + (1 << _NUMBER_BITS), messages_max)).rowcount
    if gone < messages_max:
        connection.execute("DELETE FROM subfeeds WHERE id = ?", row)
    return True


# --- segments


def segments(connection: sqlite3.Connection, subfeed_row: int) -> list[Segment]:
    """Return the closed segments that were made before, in order."""
    return [Segment(*row) for row in connection.execute(
        "SELECT first, end, size, sha1 FROM segments WHERE subfeed = ? ORDER BY first", (subfeed_row,))]


def put_segments(connection: sqlite3.Connection, subfeed_row: int, made: Iterable[Segment]) -> None:
    """Remember closed segments."""
    connection.executemany("INSERT OR REPLACE INTO segments (subfeed, first, end, size, sha1) VALUES (?, ?, ?, ?, ?)",
                           ((subfeed_row, part.first, part.end, part.size, part.sha1) for part in made))

"""What the feed log's writing thread does: each method is a job for a ``GroupWriter``, run in its transaction.

A job decides by what the transaction reads, and refuses before it writes, as the ``GroupWriter`` wants it.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..errors import FeedForked, FeedNotWritable, FeedUnknown, HeadInvalid, TooLarge
from ..protocol import feeds as rules
from ..protocol.canonical import canonical_bytes
from ..protocol.feed_bodies import Segment
from ..protocol.feeds import Extension, Fork, Tail
from ..protocol.signing import private_key, public_id
from . import feed_rows as rows
from .feed_records import Appended, Extended

__all__ = ["FeedJobs", "fork_of", "unknown_feed"]

log = logging.getLogger("kachery_fast.store")


class FeedJobs:
    """The jobs of one log.

    :param message_size_bytes_max, clock: as for ``FeedLog``.
    """

    def __init__(self, message_size_bytes_max: int, clock: Callable[[], float]) -> None:
        self._message_size_bytes_max = message_size_bytes_max
        self._clock = clock
        self._keys: dict[str, Ed25519PrivateKey] = {}

    def create(self, name: str | None, connection: sqlite3.Connection) -> tuple[str, bool]:
        """Make a feed, unless there is one of this name; return its id, and whether it was made."""
        if name is not None:
            row = connection.execute("SELECT feed FROM feeds WHERE name = ?", (name,)).fetchone()
            if row is not None:
                return str(row[0]), False
        seed = secrets.token_bytes(32)
        feed_id = public_id(private_key(seed))
        rows.insert_feed(connection, feed_id, name, seed, self.time_ms())
        return feed_id, True

    def adopt(self, seeds: Sequence[tuple[str, bytes]], names: Sequence[tuple[str, str]],
              connection: sqlite3.Connection) -> None:
        """Give feeds their keys, making rows where there are none, and names, unless a name or a feed has another."""
        for feed_id, seed in seeds:
            if not connection.execute("UPDATE feeds SET seed = ? WHERE feed = ?", (seed, feed_id)).rowcount:
                rows.insert_feed(connection, feed_id, None, seed, self.time_ms())
        connection.executemany("UPDATE OR IGNORE feeds SET name = ? WHERE feed = ? AND name IS NULL", names)

    def delete(self, feed_id: str, connection: sqlite3.Connection) -> None:
        """Delete a feed with its key; its messages become orphans.

        :raises FeedUnknown: it is not held.
        """
        if not connection.execute("DELETE FROM feeds WHERE feed = ?", (feed_id,)).rowcount:
            raise unknown_feed(feed_id)

    def append(self, feed_id: str, subfeed: str, messages: list[dict[str, Any]], name: str | None,
               connection: sqlite3.Connection) -> Appended:
        """Sign and write messages.

        :param name: the subfeed's name as JSON.
        :raises FeedUnknown, FeedNotWritable, FeedForked, InvalidArgument, TooLarge: as ``FeedLog.append`` has it.
        """
        place = rows.find_place(connection, feed_id, subfeed)
        if place is None:
            raise unknown_feed(feed_id)
        if place.seed is None:
            raise FeedNotWritable(feed_id=feed_id, why="it was made by another node, and this is a copy")
        forked = fork_of(place)
        if forked is not None:
            raise forked
        key, time_ms = self.key(feed_id, place.seed), self.time_ms()
        signed, tail = rules.sign_messages(place.tail, messages, key, time_ms)
        for message, data in zip(messages, signed, strict=True):
            self._check_size(message, data)
        done = Appended(place.tail.count, tail, signed, partial(rules.sign_head, tail, key, time_ms))
        if signed:
            subfeed_row = rows.make_place(connection, place, name)
            rows.insert_messages(connection, subfeed_row, place.tail.count, signed)
            rows.set_tail(connection, subfeed_row, tail)
        return done

    def extend(self, tail: Tail, found: Extension | Fork, connection: sqlite3.Connection) -> Extended | None:
        """Write what was found to follow ``tail``; None: something else was written in the meantime."""
        place = rows.find_place(connection, tail.feed_id, tail.subfeed)
        if place is None and not tail.count:
            rows.insert_feed(connection, tail.feed_id, None, None, self.time_ms())
            place = rows.find_place(connection, tail.feed_id, tail.subfeed)
        if place is None or place.tail != tail or (place.forked_at is not None and not isinstance(found, Fork)):
            return None
        row = rows.make_place(connection, place, None)
        extension = found.extension if isinstance(found, Fork) else found
        rows.insert_messages(connection, row, tail.count, extension.new)
        rows.set_tail(connection, row, extension.tail)
        if not isinstance(found, Fork):
            return Extended(len(extension.new), extension.tail.count, extension.error)
        before = rows.message(connection, row, found.number - 1) if found.number else None
        prefix = Tail(tail.feed_id, tail.subfeed) if before is None else rules.tail_after(
            tail.feed_id, tail.subfeed, before)
        rows.put_fork(connection, row, found.number, found.first, found.second, self.time_ms())
        rows.set_tail(connection, row, prefix)
        log.warning("feed://%s/~%s forked at message %d", tail.feed_id, tail.subfeed, found.number)
        return Extended(0, found.number, _fork_error(tail, found.number))

    def keep_head(self, feed_id: str, subfeed: str, head: rules.Head, connection: sqlite3.Connection) -> None:
        """Keep a head that was read, as ``FeedLog.keep_head`` has it. :raises HeadInvalid: it is of another history."""
        place = rows.find_place(connection, feed_id, subfeed)
        if (place is None or place.subfeed_row is None or place.seed is not None or place.forked_at is not None
                or head.count > place.tail.count):
            return
        last = rows.message(connection, place.subfeed_row, head.count - 1)
        if last is None or rules.signature_of(last) != head.signature:
            raise HeadInvalid(feed_id=feed_id, subfeed=subfeed, why="it follows another message than the one held")
        if place.head is not None:
            kept = msgspec.json.decode(place.head)["body"]  # it was checked when it came
            if (kept["count"], kept["timestamp"]) >= (head.count, head.time_ms):
                return
        rows.set_head(connection, place.subfeed_row, msgspec.json.encode(head.signed))

    @staticmethod
    def remember_segments(place: rows.Place, made: list[Segment], connection: sqlite3.Connection) -> None:
        """Keep closed segments of ``place``, as far as their messages are still held."""
        now = rows.find_place(connection, place.tail.feed_id, place.tail.subfeed)
        if now is not None and now.subfeed_row == place.subfeed_row and now.subfeed_row is not None:
            rows.put_segments(connection, now.subfeed_row, (part for part in made if part.end <= now.tail.count))

    def key(self, feed_id: str, seed: bytes) -> Ed25519PrivateKey:
        """Return the key of a feed; making it of its seed takes as long as a signature."""
        key = self._keys.get(feed_id)
        if key is None:
            key = self._keys[feed_id] = private_key(seed)
        return key

    def time_ms(self) -> int:
        """Return the present, in milliseconds since the epoch."""
        return int(self._clock() * 1000)

    def _check_size(self, message: dict[str, Any], signed: bytes) -> None:
        limit = self._message_size_bytes_max
        if len(signed) > limit and len(canonical_bytes(message)) > limit:
            raise TooLarge(what="A message of a feed", size=len(canonical_bytes(message)), limit=limit,
                           setting="feed_message_size_bytes_max")


def unknown_feed(feed_id: str) -> FeedUnknown:
    """Return the error that a feed is not held here."""
    return FeedUnknown(feed=f"feed://{feed_id}", advice="See which there are with: kachery-fast feed list")


def fork_of(place: rows.Place | None) -> FeedForked | None:
    """Return the error that a subfeed has forked; None when it has not."""
    return None if place is None or place.forked_at is None else _fork_error(place.tail, place.forked_at)


def _fork_error(tail: Tail, number: int) -> FeedForked:
    return FeedForked(feed_id=tail.feed_id, subfeed=tail.subfeed, number=number)

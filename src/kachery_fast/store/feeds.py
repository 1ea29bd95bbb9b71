"""The feed log: this node's own feeds, with their keys, and verified copies of others', in ``kachery-fast-feeds.db``.

One thread writes (``writing.GroupWriter``): appends that wait are signed in the order of their arrival and made durable
together. Where a chain ends is read within the transaction that extends it, so no number is ever given twice, also when
a second process has the file open. The file holds keys, and is readable by its owner alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..errors import DiskError, FeedUnknown, InvalidName, KacheryError
from ..protocol import feed_segments
from ..protocol import feeds as rules
from ..protocol.feed_bodies import Segment
from ..protocol.feeds import Fork, Tail
from ..protocol.names import check_feed_id, check_sha1, subfeed_hash
from . import feed_rows as rows
from .database import Database, decode_row
from .feed_jobs import FeedJobs, fork_of, unknown_feed
from .feed_records import Appended, Extended, FeedInfo, ForkRecord, SubfeedInfo
from .writing import GroupWriter

__all__ = ["Appended", "Extended", "FeedInfo", "FeedLog", "ForkRecord", "SubfeedInfo"]

T = TypeVar("T")

log = logging.getLogger("kachery_fast.store")

DATABASE_NAME = "kachery-fast-feeds.db"

_NAME_LENGTH_MAX = 1000
# Messages of a deleted feed that one transaction removes; appends go on in between.
_SWEEP_MESSAGES_MAX = 500
# A copy that others extend at the same moment is tried again; each try takes in what they added.
_EXTEND_TRIES_MAX = 100
# Feeds that one transaction gives their keys or names.
_ADOPT_FEEDS_MAX = 1000


class FeedLog:
    """The feeds of one storage directory. Thread-safe; all methods but ``append``, ``owns`` and ``has`` wait for the
    disk.

    Every method raises DiskError or DiskFull when the disk refuses, DatabaseUnusable when the file is damaged.

    :param root: the storage directory.
    :param message_size_bytes_max: the longest message that is appended, as canonical JSON.
    :param clock: seconds since the epoch.
    """

    def __init__(self, root: Path, *, message_size_bytes_max: int, clock: Callable[[], float] = time.time) -> None:
        self._jobs = FeedJobs(message_size_bytes_max, clock)
        self._database = Database(root / DATABASE_NAME, rows.STEPS)
        self._own: set[str] = set()
        self._held: set[tuple[str, str]] = set()
        self._open_segments: dict[tuple[str, str], tuple[Tail, Segment]] = {}
        try:
            self._look_around()
        except BaseException:
            self._database.close()
            raise
        self._writer = GroupWriter(self._database)
        self._sweep_later()

    def close(self) -> None:
        """Make durable what was appended before, then close; a second call does nothing."""
        self._writer.close()

    # --- feeds

    def create(self, name: str | None = None) -> tuple[str, bool]:
        """Make a feed, or find the one that has this name already; return its id and whether it is new.

        :raises InvalidName: the name is empty, too long, or not text that UTF-8 can write.
        """
        if name is not None:
            _check_name(name)
        feed_id, made = self._write(partial(self._jobs.create, name))
        self._own.add(feed_id)
        return feed_id, made

    def adopt(self, seeds: Mapping[str, bytes], names: Sequence[tuple[str, str]]) -> list[tuple[str, InvalidName]]:
        """Make feeds this node's own by their keys, whose messages are all here; then give feeds names that are free.

        :param seeds: keys by feed id.
        :param names: pairs of a name and a feed id; a feed that is not here gets none.
        :returns: each feed id whose name is refused, as by ``create``.
        """
        refused: list[tuple[str, InvalidName]] = []
        good: list[tuple[str, str]] = []
        for name, feed_id in names:
            try:
                _check_name(name)
                good.append((name, feed_id))
            except InvalidName as error:
                refused.append((feed_id, error))
        keys = list(seeds.items())
        for start in range(0, len(keys), _ADOPT_FEEDS_MAX):
            self._write(partial(self._jobs.adopt, keys[start:start + _ADOPT_FEEDS_MAX], []))
        for start in range(0, len(good), _ADOPT_FEEDS_MAX):
            self._write(partial(self._jobs.adopt, [], good[start:start + _ADOPT_FEEDS_MAX]))
        self._own.update(seeds)
        return refused

    def find(self, name: str) -> str:
        """Return the id of the feed that has this name.

        :raises FeedUnknown: there is none.
        """
        with suppress(UnicodeEncodeError), self._database.reading() as connection:
            row = connection.execute("SELECT feed FROM feeds WHERE name = ?", (name,)).fetchone()
            if row is not None:
                return str(row[0])
        raise FeedUnknown(feed=f"of the name {name!r}", advice="See which there are with: kachery-fast feed list")

    def feeds(self) -> list[FeedInfo]:
        """Return every feed, the oldest first."""
        with self._database.reading() as connection:
            return _infos(connection, "")

    def info(self, feed_id: str) -> FeedInfo:
        """Return one feed.

        :raises FeedUnknown: it is not held here.
        """
        with self._database.reading() as connection:
            found = _infos(connection, feed_id)
        if not found:
            raise unknown_feed(feed_id)
        return found[0]

    def delete(self, feed_id: str) -> None:
        """Delete a feed: its key, which nobody else has, and all messages.

        :raises FeedUnknown: it is not held here.
        """
        self._write(partial(self._jobs.delete, feed_id))
        self._own.discard(feed_id)
        # Copies are whole; other threads add to the sets meanwhile.
        self._held -= {place for place in self._held.copy() if place[0] == feed_id}
        for place in [place for place in self._open_segments.copy() if place[0] == feed_id]:
            self._open_segments.pop(place, None)
        self._sweep_later()

    # --- messages

    def append(self, feed_id: str, subfeed: str, messages: list[dict[str, Any]], name: Any = None) -> Future[Appended]:
        """Sign messages and write them at the end of a subfeed of an own feed, all of them or none.

        :param subfeed: the hash of its name.
        :param messages: JSON objects.
        :param name: the subfeed's name, to be shown in lists.
        :returns: a future that is done when they are on the disk; callbacks run on the writing thread. Its errors:
            FeedUnknown, FeedNotWritable, FeedForked, InvalidArgument (a message is not a JSON object), TooLarge,
            DiskFull, DiskError, DatabaseUnusable; nothing was written then.
        :raises DiskError: the log was closed.
        """
        return self._writer.submit(partial(self._jobs.append, feed_id, check_sha1(subfeed), messages,
                                           _name_text(subfeed, name)))

    def extend(self, feed_id: str, subfeed: str, first: int, messages: Sequence[object]) -> Extended:
        """Take in signed messages from number ``first`` on that somebody sent, as far as they are true.

        Their signatures are checked in the caller's thread. A fork is kept as evidence; what was held from there on is
        not believed any more, and removed.

        :returns: with ``error`` FeedInvalid, FeedChainBroken or FeedForked when the batch was not good to its end.
        """
        check_feed_id(feed_id)
        check_sha1(subfeed)
        for _ in range(_EXTEND_TRIES_MAX):
            with self._database.reading() as connection:
                place = rows.find_place(connection, feed_id, subfeed)
                row = None if place is None else place.subfeed_row
                tail = Tail(feed_id, subfeed) if place is None else place.tail
                forked = fork_of(place)
                # Behind a fork nothing is taken in; before it, another one may still show.
                batch = messages if forked is None else messages[:max(0, tail.count - first)]
                found = rules.extend(tail, first, batch, partial(_known, connection, row))
            if not isinstance(found, Fork) and (forked is not None or not found.new):
                return Extended(0, tail.count, forked or found.error)
            done = self._write(partial(self._jobs.extend, tail, found))
            if done is not None:
                self._held.add((feed_id, subfeed))
                return done
        raise DiskError(action="extending", path=str(self._database.path), why="others extend it all the time")

    def tail(self, feed_id: str, subfeed: str) -> Tail:
        """Return where a subfeed ends here; with count 0 when nothing of it is held."""
        with self._database.reading() as connection:
            place = rows.find_place(connection, feed_id, subfeed)
        return Tail(feed_id, subfeed) if place is None else place.tail

    def read(self, feed_id: str, subfeed: str, position: int, count_max: int, size_bytes_max: int) -> list[bytes]:
        """Return signed messages from number ``position`` on, as canonical JSON; none: the end, or nothing is held.

        :param size_bytes_max: stop before this is passed; the first message comes in any case.
        :raises FeedForked: the position is at or behind a fork.
        """
        found: list[bytes] = []
        size_bytes = 0
        with self._database.reading() as connection:
            place = rows.find_place(connection, feed_id, subfeed)
            if place is None or place.subfeed_row is None:
                return found
            forked = fork_of(place)
            if forked is not None and position >= place.tail.count:
                raise forked
            end = min(place.tail.count, position + count_max)
            for message in rows.messages(connection, place.subfeed_row, position, end):
                size_bytes += len(message)
                if found and size_bytes > size_bytes_max:
                    break
                found.append(message)
        return found

    def owns(self, feed_id: str) -> bool:
        """Whether this node made a feed, and extends it. From memory, as ``has``."""
        return feed_id in self._own

    def has(self, feed_id: str, subfeed: str) -> bool:
        """Whether this node can say something of a subfeed: it owns the feed, holds messages, or saw a fork.

        From memory, since it is asked for each message on a busy band.
        """
        return feed_id in self._own or (feed_id, subfeed) in self._held

    # --- heads, forks, segments

    def head(self, feed_id: str, subfeed: str) -> dict[str, Any] | None:
        """Return the owner's newest word on the length: signed now for an own feed, else the newest that is kept."""
        with self._database.reading() as connection:
            place = rows.find_place(connection, feed_id, subfeed)
            if place is None or place.forked_at is not None:
                return None
            if place.seed is not None:
                return rules.sign_head(place.tail, self._jobs.key(feed_id, place.seed), self._jobs.time_ms())
            return None if place.head is None else dict(decode_row(place.head))

    def keep_head(self, feed_id: str, subfeed: str, head: dict[str, Any]) -> None:
        """Keep a head of another node's feed, to be passed on, if it is newer than the one kept and all is held of it.

        :raises HeadInvalid: the owner did not sign it, or signed another message of its last number than is held.
        """
        found = rules.read_head(head, feed_id, subfeed)
        if found.count:
            self._write(partial(self._jobs.keep_head, feed_id, subfeed, found))

    def forks(self, feed_id: str, subfeed: str) -> list[ForkRecord]:
        """Return the forks that were seen, as evidence."""
        with self._database.reading() as connection:
            place = rows.find_place(connection, feed_id, subfeed)
            return [] if place is None or place.subfeed_row is None else [
                ForkRecord(*row) for row in rows.forks(connection, place.subfeed_row)]

    def segments(self, feed_id: str, subfeed: str) -> list[Segment]:
        """Return the segments of all messages held, from 0; only the last one may still change.

        Closed ones are remembered, so that a long subfeed is not read anew each time.
        """
        made: list[Segment] = []
        with self._database.reading() as connection:
            place = rows.find_place(connection, feed_id, subfeed)
            if place is None or place.subfeed_row is None:
                return made
            parts = rows.segments(connection, place.subfeed_row)
            start = parts[-1].end if parts else 0
            tail, known = self._open_segments.get((feed_id, subfeed), (None, None))
            if known is not None and tail == place.tail and known.first == start:
                return [*parts, known]
            for first, end, size, closed in feed_segments.cut(rows.sizes(connection, place.subfeed_row, start), start):
                data = feed_segments.encode_segment(list(rows.messages(connection, place.subfeed_row, first, end)))
                part = Segment(first, end, size, hashlib.sha1(data, usedforsecurity=False).hexdigest())
                parts.append(part)
                if closed:
                    made.append(part)
                else:
                    self._open_segments[feed_id, subfeed] = place.tail, part
        if made:
            try:
                self._write(partial(self._jobs.remember_segments, place, made))
            except KacheryError as error:  # they are good all the same, and will be made anew
                log.warning("segments of feed://%s/~%s could not be remembered: %s", feed_id, subfeed, error)
        return parts

    # --- small parts

    def _write(self, job: Callable[[sqlite3.Connection], T]) -> T:
        return self._writer.submit(job).result()

    def _look_around(self) -> None:
        with self._database.reading() as connection:
            self._own = {feed for (feed,) in connection.execute("SELECT feed FROM feeds WHERE seed IS NOT NULL")}
            self._held = set(connection.execute(
                "SELECT feeds.feed, subfeed FROM subfeeds JOIN feeds ON feeds.id = subfeeds.feed"
                " WHERE count > 0 OR forked_at IS NOT NULL"))

    def _sweep_later(self) -> None:
        """Remove the messages of deleted feeds bit by bit, so that appends need not wait for it."""
        def done(future: Future[bool]) -> None:
            if future.exception() is None and future.result():
                self._sweep_later()

        with suppress(DiskError):  # closed: the next start goes on
            self._writer.submit(partial(rows.delete_orphans, messages_max=_SWEEP_MESSAGES_MAX)).add_done_callback(done)


def _infos(connection: sqlite3.Connection, feed_id: str) -> list[FeedInfo]:
    found: dict[str, FeedInfo] = {}
    for feed, name, writable, subfeed, subfeed_name, count, forked_at in rows.listing(connection, feed_id):
        info = found.setdefault(feed, FeedInfo(feed, name, bool(writable), []))
        if subfeed is not None:
            known = None if subfeed_name is None else decode_row(subfeed_name)
            info.subfeeds.append(SubfeedInfo(subfeed, known, count, forked_at))
    return list(found.values())


def _known(connection: sqlite3.Connection, subfeed_row: int | None, number: int) -> bytes | None:
    return None if subfeed_row is None else rows.message(connection, subfeed_row, number)


def _check_name(name: str) -> None:
    why = ""
    if not 0 < len(name) <= _NAME_LENGTH_MAX:
        why = f"use 1 to {_NAME_LENGTH_MAX} characters"
    try:
        name.encode()
    except UnicodeEncodeError:
        why = "it is not text that UTF-8 can write"
    if why:
        raise InvalidName(name=name[:100], kind="feed", why=why)


def _name_text(subfeed: str, name: Any) -> str | None:
    """Return a subfeed's name as JSON; None when it is not known, or only its hash."""
    if name is None or (isinstance(name, str) and name.startswith("~")) or subfeed_hash(name) != subfeed:
        return None
    return json.dumps(name, sort_keys=True)

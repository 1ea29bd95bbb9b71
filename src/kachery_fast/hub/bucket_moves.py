"""Channels that move from one bucket to another while they are used: what is there is copied, then nodes go there.

A hub does it page by page, each page noted in the registry, so that it goes on after a restart, at whichever of several
hubs looks first. What its SHA-1 shows to be damaged, or what is longer than any object, is left behind. What nodes
bring to the old bucket while it is copied is copied in the end; what they bring there later is asked for again, as a
bucket is a cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..config import Settings
from ..embedded.bucket_names import is_hashed, is_object_name
from ..errors import KacheryError, ObjectMissing, TooLarge
from ..protocol.manifest import CHUNK_SIZE_BYTES_MAX
from .buckets import Buckets, EngineRow, rows_of
from .engine_actions import check_readers
from .engines import BucketEngine, ObjectRecord
from .move_rows import COPYING, DONE, FOLLOWING, RUNNING, STOPPED, SWITCHED
from .registry import Registry
from .tables import bucket_moves, channels
from .uploads import result_size_bytes_max

__all__ = ["Mover"]

_log = logging.getLogger("kachery_fast.hub")

PAGE = 100
_AT_ONCE = 4
# How often a hub looks for moves that another one has begun, or left, and says that it goes on; who has not said a word
# for so long has left.
LOOK_SECONDS = 30.0
_SILENCE_MS = 120_000
# Before a move that was held up is tried again; twice as long each time, up to the second.
RETRY_SECONDS, RETRY_SECONDS_MAX = 2.0, 60.0
# Clocks of the hub and of a store may differ.
_CLOCKS_MS = 15 * 60_000


class _Move(NamedTuple):
    """A row of ``bucket_moves`` with what is known of its buckets (None: the hub's own)."""

    channel: str
    state: str
    after: str
    started: int
    source: EngineRow | None
    target: EngineRow | None


class _Copied(NamedTuple):
    """What became of an object that was to be copied."""

    objects: int = 0
    size_bytes: int = 0
    damaged: int = 0


class _Page(NamedTuple):
    """What became of a page: its last name, "" when it was the last one, and the names of what was written."""

    last: str
    copied: _Copied
    written: list[str]


class _Noted(NamedTuple):
    """``switched``: the channel has another bucket from now on; ``deleted``: there is no such channel any more."""

    switched: bool = False
    deleted: bool = False


class Mover:
    """Moves channels. One for each hub, used on its event loop.

    :param switched: called, on the loop, with the name of a channel that has another bucket from now on.
    :param clock: seconds since the epoch.
    """

    def __init__(
        self, registry: Registry, buckets: Buckets, settings: Settings, switched: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._registry = registry
        self._buckets = buckets
        self._switched = switched
        self._clock = clock
        # The longest object there can be.
        self._limit_bytes = max(CHUNK_SIZE_BYTES_MAX, result_size_bytes_max(settings))
        self._threads = ThreadPoolExecutor(_AT_ONCE, "hub-mover")
        # By channel, when this hub last noted something.
        self._mine: dict[str, int] = {}
        self._awake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, and go on with what is under way."""
        self._task = asyncio.get_running_loop().create_task(self._move_for_ever())

    def wake(self) -> None:
        """Look at once: there is something to move."""
        self._awake.set()

    async def stop(self) -> None:
        """End after the objects under way."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    async def _move_for_ever(self) -> None:
        retry_seconds = RETRY_SECONDS
        while True:
            self._awake.clear()
            pause = LOOK_SECONDS
            try:
                now_ms = self._now_ms()
                move = await self._registry.call(_claim, self._mine, now_ms, shared=self._registry.shared)
                if move is not None:
                    self._mine[move.channel] = now_ms
                    if await self._go_on(move):
                        retry_seconds = RETRY_SECONDS
                        continue
                    pause = min(retry_seconds, RETRY_SECONDS_MAX)
                    retry_seconds = 2 * pause
            except Exception:
                _log.exception("a channel could not be moved to another bucket; it is tried again")
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._awake.wait(), pause)

    async def _go_on(self, move: _Move) -> bool:
        """Do the next page of a move, and what follows from it; False when it has to be tried again."""
        alive = asyncio.get_running_loop().create_task(self._say_alive(move))
        try:
            source, target = self._buckets.use(move.source), self._buckets.use(move.target)
            page = await self._copy_page(move, source, target)
        except KacheryError as error:
            _log.warning("channel %s: its move to another bucket is held up: %s", move.channel, error)
            return await self._held_up(move, error.message)
        except Exception:
            _log.exception("channel %s: its move to another bucket is held up", move.channel)
            return await self._held_up(move, "the hub met an error of its own, which its log has")
        finally:
            alive.cancel()
        noted = await self._registry.call(_note, move, page, self._moment(move))
        if noted.deleted:  # after its objects were removed, perhaps
            await asyncio.get_running_loop().run_in_executor(
                self._threads, lambda: [target.remove(name) for name in page.written])
        if noted.switched:
            _log.info("channel %s: its bucket is %s now", move.channel, _name(move.target))
            self._switched(move.channel)
        return True

    async def _held_up(self, move: _Move, why: str) -> bool:
        await self._registry.call(_note_failure, move, why, self._moment(move))
        return False

    async def _say_alive(self, move: _Move) -> None:
        """Have the other hubs leave this move alone, however long a page takes."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._registry.call(_note_alive, move, self._moment(move))

    def _moment(self, move: _Move) -> int:
        """The time, ms since the epoch, as it is about to be noted."""
        self._mine[move.channel] = now_ms = self._now_ms()
        return now_ms

    async def _copy_page(self, move: _Move, source: BucketEngine, target: BucketEngine) -> _Page:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, partial(source.objects, move.channel, after=move.after, limit=PAGE))
        last = found[-1].name if len(found) == PAGE else ""
        if move.state != COPYING:
            found = [item for item in found if item.created * 1000 >= move.started - _CLOCKS_MS]
        found = [item for item in found if is_object_name(item.name)]  # others may keep something there, too
        copying = [loop.run_in_executor(self._threads, self._copy, move.state, item, source, target)
                   for item in found]
        try:
            copied = await asyncio.gather(*copying)
        finally:
            for left in copying:
                left.cancel()
        return _Page(last, _Copied(*map(sum, zip(*copied, strict=True))) if copied else _Copied(),
                     [item.name for item, done in zip(found, copied, strict=True) if done.objects])

    def _copy(self, state: str, found: ObjectRecord, source: BucketEngine, target: BucketEngine) -> _Copied:
        name, hashed = found.name, is_hashed(found.name)
        there = target.size(name)
        if there == found.size_bytes if hashed else there is not None and state == SWITCHED:
            return _Copied()
        try:
            data = source.read(name, self._limit_bytes)[0]
        except ObjectMissing:  # removed meanwhile
            return _Copied()
        except TooLarge as error:
            _log.warning("the object %s stays behind: %s", name, error)
            return _Copied(damaged=int(state == COPYING))
        if hashed and hashlib.sha1(data, usedforsecurity=False).hexdigest() != name.rpartition("/")[2]:
            _log.warning("the object %s is damaged, and stays behind", name)
            return _Copied(damaged=int(state == COPYING))
        if there == len(data) and not hashed and target.read(name, self._limit_bytes)[0] == data:
            return _Copied()
        return _Copied(1, len(data)) if target.write(
            name, data, replace=not hashed and state != SWITCHED) else _Copied()

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


def _claim(connection: Connection, mine: dict[str, int], now_ms: int, *, shared: bool) -> _Move | None:
    """The move to go on with, the one first that has waited longest; that it is gone on with is noted. Runs inside
    ``Registry.call``.

    :param mine: by channel, when this hub last noted something. Of several hubs one goes on with another one's only
        when that has been silent.
    """
    for row in connection.execute(sa.select(bucket_moves).where(bucket_moves.c.state.in_(RUNNING))
                                  .order_by(bucket_moves.c.changed, bucket_moves.c.why != "")).all():
        begun = row.changed != row.started  # else nobody has gone on with it yet
        if shared and begun and row.changed != mine.get(row.channel) and 0 <= now_ms - row.changed < _SILENCE_MS:
            continue
        found = rows_of(connection, filter(None, [row.source, row.target]))
        move = _Move(row.channel, row.state, row.after, row.started, found.get(row.source), found.get(row.target))
        why = _obstacle(connection, row, {None, *found})
        if not why:
            _note_alive(connection, move, now_ms)
            return move
        _set_state(connection, move, STOPPED, why)
    return None


def _obstacle(connection: Connection, row: sa.Row[Any], known: set[str | None]) -> str:
    """Why a move cannot go on, "" when it can."""
    if not known >= {row.source, row.target}:
        return "its owner has had the hub forget one of the two buckets"
    try:
        check_readers(connection, row.channel, row.target)
    except KacheryError as error:  # the channel has become private
        return error.message
    return ""


def _note_alive(connection: Connection, move: _Move, now_ms: int) -> None:
    connection.execute(bucket_moves.update().where(_is(move)).values(changed=now_ms))


def _note_failure(connection: Connection, move: _Move, why: str, now_ms: int) -> None:
    connection.execute(bucket_moves.update().where(_is(move)).values(why=why, changed=now_ms))


def _note(connection: Connection, move: _Move, page: _Page, now_ms: int) -> _Noted:
    """Note what was copied, and what comes next."""
    copied, table = page.copied, bucket_moves
    noted = connection.execute(table.update().where(_is(move)).values(
        after=page.last, why="", changed=now_ms, objects=table.c.objects + copied.objects,
        size_bytes=table.c.size_bytes + copied.size_bytes, damaged=table.c.damaged + copied.damaged)).rowcount
    if not noted:  # stopped meanwhile
        return _Noted(deleted=connection.execute(
            sa.select(table.c.channel).where(table.c.channel == move.channel)).first() is None)
    if page.last:
        return _Noted()
    if move.state != FOLLOWING:
        _set_state(connection, move, DONE if move.state == SWITCHED else FOLLOWING)
        return _Noted()
    target = None if move.target is None else move.target.id
    try:
        check_readers(connection, move.channel, target)
    except KacheryError as error:
        _set_state(connection, move, STOPPED, error.message)
        return _Noted()
    connection.execute(channels.update().where(channels.c.name == move.channel).values(bucket=target))
    _set_state(connection, move, SWITCHED)
    return _Noted(switched=True)


def _is(move: _Move) -> sa.ColumnElement[bool]:
    """The row, as long as it is as it was read."""
    table = bucket_moves
    return sa.and_(table.c.channel == move.channel, table.c.state == move.state, table.c.after == move.after,
                   table.c.started == move.started)


def _set_state(connection: Connection, move: _Move, state: str, why: str = "") -> None:
    connection.execute(bucket_moves.update().where(bucket_moves.c.channel == move.channel).values(state=state, why=why))


def _name(row: EngineRow | None) -> str:
    return "the hub's own" if row is None else repr(row.name)

"""Channels that move from one bucket to another while they are used: what is there is copied, then nodes go there.

A hub does it page by page, each page noted in the registry, so that it goes on after a restart, at whichever of several
hubs looks first. What its SHA-1 shows to be damaged is left behind. What nodes bring to the old bucket while it is
copied is copied in the end; what they bring there later is asked for again, as a bucket is a cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..config import Settings
from ..embedded.bucket_names import is_hashed
from ..errors import KacheryError, ObjectMissing
from ..protocol.manifest import CHUNK_SIZE_BYTES_MAX
from .buckets import Buckets, EngineRow
from .engine_actions import check_readers
from .engines import BucketEngine, ObjectRecord
from .registry import Registry
from .tables import bucket_moves, channels, engines
from .uploads import result_size_bytes_max

__all__ = ["COPYING", "RUNNING", "STOPPED", "Mover", "set_bucket"]

_log = logging.getLogger("kachery_fast.hub")

# All that is there; what came, or was replaced, meanwhile; and, once nodes use the new bucket, what came to the old one
# until then, which replaces nothing that is newer.
COPYING, FOLLOWING, SWITCHED = RUNNING = ("copying", "following", "switched")
DONE, STOPPED = "done", "stopped"
PAGE = 100
_AT_ONCE = 4
# How often a hub looks for moves that another one has begun, or left; and who has not said a word for so long has.
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
    """What became of a page: its last name, "" when it was the last one."""

    last: str
    copied: _Copied


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
        retry_seconds, mine = RETRY_SECONDS, dict[str, int]()
        while True:
            self._awake.clear()
            pause = LOOK_SECONDS
            try:
                now_ms = self._now_ms()
                move = await self._registry.call(_claim, mine, now_ms, shared=self._registry.shared)
                if move is not None:
                    went_well = await self._go_on(move, now_ms)
                    mine[move.channel] = now_ms
                    if went_well:
                        retry_seconds = RETRY_SECONDS
                        continue
                    pause = min(retry_seconds, RETRY_SECONDS_MAX)
                    retry_seconds = 2 * pause
            except Exception:
                _log.exception("a channel could not be moved to another bucket; it is tried again")
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._awake.wait(), pause)

    async def _go_on(self, move: _Move, now_ms: int) -> bool:
        """Do the next page of a move, and what follows from it; False when it has to be tried again."""
        try:
            source, target = self._buckets.use(move.source), self._buckets.use(move.target)
            page = await self._copy_page(move, source, target)
        except KacheryError as error:
            _log.warning("channel %s: its move to another bucket is held up: %s", move.channel, error)
            await self._registry.call(_note_failure, move, error.message, now_ms)
            return False
        if await self._registry.call(_note, move, page, now_ms):
            _log.info("channel %s: its bucket is %s now", move.channel, _name(move.target))
            self._switched(move.channel)
        return True

    async def _copy_page(self, move: _Move, source: BucketEngine, target: BucketEngine) -> _Page:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, partial(source.objects, move.channel, after=move.after, limit=PAGE))
        last = found[-1].name if len(found) == PAGE else ""
        if move.state != COPYING:
            found = [item for item in found if item.created * 1000 >= move.started - _CLOCKS_MS]
        copying = [loop.run_in_executor(self._threads, self._copy, move.state, item, source, target)
                   for item in found]
        try:
            copied = await asyncio.gather(*copying)
        finally:
            for left in copying:
                left.cancel()
        return _Page(last, _Copied(*map(sum, zip(*copied, strict=True))) if copied else _Copied())

    def _copy(self, state: str, found: ObjectRecord, source: BucketEngine, target: BucketEngine) -> _Copied:
        name, hashed = found.name, is_hashed(found.name)
        there = target.size(name)
        if there == found.size_bytes if hashed else there is not None and state == SWITCHED:
            return _Copied()
        try:
            data = source.read(name, self._limit_bytes)[0]
        except ObjectMissing:  # removed meanwhile
            return _Copied()
        if hashed and hashlib.sha1(data, usedforsecurity=False).hexdigest() != name.rpartition("/")[2]:
            _log.warning("the object %s is damaged, and stays behind", name)
            return _Copied(damaged=int(state == COPYING))
        if there == len(data) and not hashed and target.read(name, self._limit_bytes)[0] == data:
            return _Copied()
        return _Copied(1, len(data)) if target.write(name, data, replace=not hashed) else _Copied()

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


def _claim(connection: Connection, mine: dict[str, int], now_ms: int, *, shared: bool) -> _Move | None:
    """The move to go on with, the one first that has waited longest; runs inside ``Registry.call``.

    :param mine: by channel, when this hub last noted something. Of several hubs one goes on with another one's only
        when that has been silent.
    """
    for row in connection.execute(sa.select(bucket_moves).where(bucket_moves.c.state.in_(RUNNING))
                                  .order_by(bucket_moves.c.changed)).all():
        if shared and row.changed != mine.get(row.channel) and 0 <= now_ms - row.changed < _SILENCE_MS and row.after:
            continue
        found = {row.id: EngineRow(*row) for row in connection.execute(
            sa.select(*(engines.c[name] for name in EngineRow._fields)).where(
                engines.c.id.in_([row.source, row.target])))}
        move = _Move(row.channel, row.state, row.after, row.started, found.get(row.source), found.get(row.target))
        if {None, *found} >= {row.source, row.target}:
            return move
        _set_state(connection, move, STOPPED, "its owner has had the hub forget one of the two buckets")
    return None


def _note_failure(connection: Connection, move: _Move, why: str, now_ms: int) -> None:
    connection.execute(bucket_moves.update().where(_is(move)).values(why=why, changed=now_ms))


def _note(connection: Connection, move: _Move, page: _Page, now_ms: int) -> bool:
    """Note what was copied, and what comes next; whether the channel has another bucket from now on."""
    copied, table = page.copied, bucket_moves
    noted = connection.execute(table.update().where(_is(move)).values(
        after=page.last, why="", changed=now_ms, objects=table.c.objects + copied.objects,
        size_bytes=table.c.size_bytes + copied.size_bytes, damaged=table.c.damaged + copied.damaged)).rowcount
    if not noted or page.last:  # stopped meanwhile, or there is more
        return False
    if move.state != FOLLOWING:
        _set_state(connection, move, DONE if move.state == SWITCHED else FOLLOWING)
        return False
    source, target = (None if row is None else row.id for row in (move.source, move.target))
    if connection.execute(sa.select(channels.c.bucket).where(
            channels.c.name == move.channel)).scalar_one() != source:
        _set_state(connection, move, STOPPED, "the channel was given another bucket meanwhile")
        return False
    try:
        set_bucket(connection, move.channel, target)
    except KacheryError as error:
        set_bucket(connection, move.channel, source)
        _set_state(connection, move, STOPPED, error.message)
        return False
    _set_state(connection, move, SWITCHED)
    return True


def set_bucket(connection: Connection, channel: str, engine_id: str | None) -> None:
    """Have a channel use a bucket. :raises InvalidArgument: everybody may read there, and the channel is private."""
    connection.execute(channels.update().where(channels.c.name == channel).values(bucket=engine_id))
    check_readers(connection, channel)


def _is(move: _Move) -> sa.ColumnElement[bool]:
    """The row, as long as it is as it was read."""
    table = bucket_moves
    return sa.and_(table.c.channel == move.channel, table.c.state == move.state, table.c.after == move.after,
                   table.c.started == move.started)


def _set_state(connection: Connection, move: _Move, state: str, why: str = "") -> None:
    connection.execute(bucket_moves.update().where(bucket_moves.c.channel == move.channel).values(state=state, why=why))


def _name(row: EngineRow | None) -> str:
    return "the hub's own" if row is None else repr(row.name)

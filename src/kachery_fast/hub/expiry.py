"""Objects that nobody has read for as many days as the channel's owner has set are removed.

A little at a time: one page of objects, then as long a pause as that took.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import DiskError, KacheryError
from .buckets import Buckets, EngineRow, rows_of
from .engines import BucketEngine
from .registry import Registry
from .tables import channels

__all__ = ["Expiry"]

_log = logging.getLogger("kachery_fast.hub")

_PAGE = 500
_DAY_SECONDS = 24 * 3600


class _Page(NamedTuple):
    """What became of one page; ``last`` is its last name, "" when there are no more."""

    last: str
    removed: int
    removed_bytes: int


class Expiry:
    """Looks for unread objects again and again. One for each hub, used on its event loop.

    :param interval_seconds: the pause between two rounds. :param clock: seconds since the epoch.
    """

    def __init__(
        self, registry: Registry, buckets: Buckets, interval_seconds: float, clock: Callable[[], float]
    ) -> None:
        self._registry = registry
        self._buckets = buckets
        self._interval_seconds = interval_seconds
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, with a first round at once."""
        self._task = asyncio.get_running_loop().create_task(self._expire_for_ever())

    async def stop(self) -> None:
        """End after the page under way."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _expire_for_ever(self) -> None:
        while True:
            try:
                for channel, days, row in await self._registry.call(_expiring):
                    await self._go_through_all(channel, days, row)
            except Exception:
                _log.exception("unread objects could not be looked for; the next round will")
            await asyncio.sleep(self._interval_seconds)

    async def _go_through_all(self, channel: str, days: int, row: EngineRow | None) -> None:
        """Look into the channel's bucket, and at what it has left in the hub's own if it was there before."""
        for place in {row, None}:
            try:
                bucket = self._buckets.use(place)
                if bucket.notes_reads:
                    await self._go_through(channel, bucket, days)
            except KacheryError as error:
                _log.warning("channel %s: unread objects could not be looked for: %s", channel, error)
            except Exception:
                _log.exception("channel %s: unread objects could not be looked for", channel)

    async def _go_through(self, channel: str, bucket: BucketEngine, days: int) -> None:
        loop = asyncio.get_running_loop()
        after, removed, removed_bytes = "", 0, 0
        while True:
            started = loop.time()
            page = await self._buckets.run(self._expire_page, channel, bucket, after, days, own=bucket.watched)
            removed, removed_bytes = removed + page.removed, removed_bytes + page.removed_bytes
            if not page.last:
                break
            after = page.last
            await asyncio.sleep(loop.time() - started)
        if removed:
            _log.info("channel %s: %d objects (%d bytes), unread for %d days, were removed",
                      channel, removed, removed_bytes, days)

    def _expire_page(self, channel: str, bucket: BucketEngine, after: str, days: int) -> _Page:
        unread_since = self._clock() - days * _DAY_SECONDS
        page = bucket.objects(channel, after=after, limit=_PAGE)
        removed = removed_bytes = 0
        for found in page:
            if found.last_read is None or found.last_read >= unread_since:
                continue
            try:
                if bucket.expire(found.name, unread_since):
                    removed, removed_bytes = removed + 1, removed_bytes + found.size_bytes
            except DiskError as error:
                _log.warning("channel %s: %s", channel, error)
        return _Page(page[-1].name if len(page) == _PAGE else "", removed, removed_bytes)


def _expiring(connection: Connection) -> list[tuple[str, int, EngineRow | None]]:
    rows = connection.execute(sa.select(channels.c.name, channels.c.unread_days_max, channels.c.bucket)
                              .where(channels.c.unread_days_max.is_not(None)).order_by(channels.c.name)).all()
    buckets = rows_of(connection, {row.bucket for row in rows if row.bucket is not None})
    return [(row.name, row.unread_days_max, buckets.get(row.bucket)) for row in rows]

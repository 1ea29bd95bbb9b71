"""What moves through the bucket: per channel, day (UTC) and node, how many uploads and downloads, of how many bytes.

Counted in memory by the threads that move it, and added to the registry every few seconds and at the hub's end: as
increments, so that several hubs can share a registry. A hub that is killed loses the last seconds.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import KacheryError
from .registry import Registry, insert_into
from .tables import channels, usage

__all__ = ["KEPT_DAYS", "Moved", "Place", "Usage", "day_of", "node_day_bytes"]

_log = logging.getLogger("kachery_fast.hub")

WRITE_SECONDS = 5.0
KEPT_DAYS = 400
_DAY_SECONDS = 24 * 3600
# Of one statement: SQLite takes 32,766 values.
_ROWS_MAX = 500


class Place(NamedTuple):
    """What is counted for itself. ``day``: since the epoch, of UTC. ``node``: "" where it cannot be told."""

    channel: str
    day: int
    node: str


class Moved(NamedTuple):
    """What has moved."""

    uploads: int = 0
    upload_bytes: int = 0
    downloads: int = 0
    download_bytes: int = 0

    def plus(self, other: Moved) -> Moved:
        """Both together."""
        return Moved(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


_NOTHING = Moved()


def day_of(seconds: float) -> int:
    """The day (UTC) of a time, both since the epoch."""
    return int(seconds // _DAY_SECONDS)


class Usage:
    """Counts for one hub. ``arrived`` and ``sent`` are called from any thread, the rest on the hub's event loop.

    :param clock: seconds since the epoch.
    """

    def __init__(self, registry: Registry, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._clock = clock
        self._lock = threading.Lock()
        self._counted: dict[Place, Moved] = {}
        self._on_its_way: dict[Place, Moved] = {}
        self._writing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write every few seconds."""
        self._task = asyncio.get_running_loop().create_task(self._write_for_ever())

    async def stop(self) -> None:
        """Write what is left. Nothing may move any more."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self.write()

    def arrived(self, object_name: str, node_id: str, size_bytes: int) -> None:
        """An object was uploaded."""
        self._add(object_name, node_id, Moved(1, size_bytes, 0, 0))

    def sent(self, object_name: str, node_id: str, size_bytes: int) -> None:
        """A part of an object, or all of it, was sent."""
        self._add(object_name, node_id, Moved(0, 0, 1, size_bytes))

    def unwritten(self, place: Place) -> Moved:
        """Return what has moved and is not in the registry yet, at this hub."""
        with self._lock:
            return self._counted.get(place, _NOTHING).plus(self._on_its_way.get(place, _NOTHING))

    def forget(self, channel: str) -> None:
        """Drop what is not written yet of a channel that is deleted."""
        with self._lock:
            self._counted = {place: moved for place, moved in self._counted.items() if place.channel != channel}

    async def since(self, channel: str, first_day: int) -> dict[Place, Moved]:
        """Return what has moved on a channel since a day: here until now, at other hubs until they wrote it last.

        :raises DiskError: the registry failed.
        """
        await self.write()
        return await self._registry.call(_since, channel, first_day)

    async def write(self) -> None:
        """Add what was counted to the registry; when that fails it is kept for the next time."""
        async with self._writing:
            with self._lock:
                batch, self._counted = self._counted, {}
                self._on_its_way = batch
            if not batch:
                return
            left = batch
            try:
                await self._registry.call(_record, batch, day_of(self._clock()))
                left = {}
            except KacheryError as error:
                _log.warning("what moved could not be written down; it is kept for later: %s", error)
            finally:
                with self._lock:
                    self._on_its_way = {}
                    for place, moved in left.items():
                        self._counted[place] = self._counted.get(place, _NOTHING).plus(moved)

    def _add(self, object_name: str, node_id: str, moved: Moved) -> None:
        place = Place(object_name.partition("/")[0], day_of(self._clock()), node_id)
        with self._lock:
            self._counted[place] = self._counted.get(place, _NOTHING).plus(moved)

    async def _write_for_ever(self) -> None:
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            await self.write()


# --- functions that run inside ``Registry.call``


def _since(connection: Connection, channel: str, first_day: int) -> dict[Place, Moved]:
    """Return what has moved on a channel since a day."""
    rows = connection.execute(sa.select(usage).where(usage.c.channel == channel, usage.c.day >= first_day))
    return {Place(row.channel, row.day, row.node): Moved(*(getattr(row, name) for name in Moved._fields))
            for row in rows}


def node_day_bytes(connection: Connection, place: Place) -> int:
    """Return how many bytes a node has uploaded to a channel in a day."""
    return int(connection.execute(sa.select(usage.c.upload_bytes).where(
        usage.c.channel == place.channel, usage.c.day == place.day, usage.c.node == place.node)).scalar() or 0)


def _record(connection: Connection, batch: dict[Place, Moved], today: int) -> None:
    # What was counted of a channel that is deleted by now must not turn up with another one of its name.
    known = set(connection.execute(sa.select(channels.c.name).where(
        channels.c.name.in_({place.channel for place in batch}))).scalars())
    rows = [{**place._asdict(), **moved._asdict()} for place, moved in sorted(batch.items()) if place.channel in known]
    for start in range(0, len(rows), _ROWS_MAX):
        connection.execute(_increment(connection, rows[start:start + _ROWS_MAX]))
    if rows:
        connection.execute(usage.delete().where(usage.c.day < today - KEPT_DAYS))


def _increment(connection: Connection, rows: list[dict[str, Any]]) -> Any:
    """The statement that adds to rows, or makes them."""
    statement = insert_into(connection, usage).values(rows)
    return statement.on_conflict_do_update(
        index_elements=[usage.c.channel, usage.c.day, usage.c.node],
        set_={name: usage.c[name] + statement.excluded[name] for name in Moved._fields})

"""How much a channel may hold, and a node may upload in a day: upload URLs beyond that are refused.

What counts is what is in the bucket, and what may still come by URLs that were signed and have not been used. Where the
channel's owner lets unread objects go (``unread_days_max``), those that nobody has read for longest make room.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import DiskError, QuotaExceeded
from .buckets import Buckets
from .engines import BucketEngine, ObjectRecord
from .tables import channels
from .usage import Place, Usage, node_day_bytes

__all__ = ["Limits", "Promises", "Quotas", "find_limits"]

_log = logging.getLogger("kachery_fast.hub")

# What was used so lately is not removed to make room: it may be on its way to somebody. A bucket may round the time of
# a read by an hour.
RECENT_SECONDS = 2 * 3600.0
# Objects are removed by so many at once at most, and so much of the quota more than is needed, so that not each upload
# to a full channel goes through all of its objects.
_VICTIMS_MAX = 10_000
_SPARE_PART = 1 / 20
# After going through all in vain, not sooner again.
_RETRY_SECONDS = 60.0
_PAGE = 1000


class Limits(NamedTuple):
    """What holds for one node on one channel; None: no limit. ``day_bytes``: what the node has uploaded today, as far
    as it is in the registry."""

    size_bytes_max: int | None
    unread_days_max: int | None
    node_day_bytes_max: int | None
    day_bytes: int = 0

    @property
    def any(self) -> bool:
        """Whether uploads are limited at all."""
        return self.size_bytes_max is not None or self.node_day_bytes_max is not None


# Made once, as every upload that is signed runs it.
_FIND_LIMITS = sa.select(
    channels.c.size_bytes_max, channels.c.unread_days_max, channels.c.node_day_bytes_max
).where(channels.c.name == sa.bindparam("channel"))


def find_limits(connection: Connection, place: Place) -> Limits:
    """Return what holds for a node on a channel on a day; runs inside ``Registry.call``."""
    row = connection.execute(_FIND_LIMITS, {"channel": place.channel}).first()
    if row is None:
        return Limits(None, None, None)
    limits = Limits(*row)
    if limits.node_day_bytes_max is None:
        return limits
    return limits._replace(day_bytes=node_day_bytes(connection, place))


class _Promise(NamedTuple):
    node_id: str
    size_bytes: int
    expires: float


class Promises:
    """What may still arrive: uploads that were signed, until they arrive or their URLs expire. Thread-safe.

    :param life_seconds: that of every URL. :param clock: seconds since the epoch.
    """

    def __init__(self, life_seconds: float, clock: Callable[[], float]) -> None:
        self._life_seconds = life_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._promised: OrderedDict[str, _Promise] = OrderedDict()  # in the order in which they expire
        self._bytes: Counter[tuple[str, str]] = Counter()

    def add(self, node_id: str, sizes_bytes: Mapping[str, int]) -> None:
        """A node may upload these objects, each so much more than there is."""
        expires = self._clock() + self._life_seconds
        with self._lock:
            for name, size_bytes in sizes_bytes.items():
                self._drop(name)
                self._promised[name] = _Promise(node_id, size_bytes, expires)
                for key in _keys(name, node_id):
                    self._bytes[key] += size_bytes

    def release(self, object_name: str) -> None:
        """An object is there."""
        with self._lock:
            self._drop(object_name)

    def bytes(self, channel: str, node_id: str = "") -> int:
        """Return how much may still arrive on a channel, from one node when one is named."""
        now = self._clock()
        with self._lock:
            while self._promised:
                name, promise = next(iter(self._promised.items()))
                if promise.expires > now:
                    break
                self._drop(name)
            return self._bytes[channel, node_id]

    def new_bytes(self, sizes_bytes: Mapping[str, int]) -> int:
        """Return how much more these objects are than what is promised of them."""
        with self._lock:
            return sum(max(0, size - (self._promised[name].size_bytes if name in self._promised else 0))
                       for name, size in sizes_bytes.items())

    def _drop(self, name: str) -> None:
        promise = self._promised.pop(name, None)
        if promise is not None:
            for key in _keys(name, promise.node_id):
                self._bytes[key] -= promise.size_bytes
                if not self._bytes[key]:
                    del self._bytes[key]


def _keys(object_name: str, node_id: str) -> set[tuple[str, str]]:
    channel = object_name.partition("/")[0]
    return {(channel, ""), (channel, node_id)}


class Quotas:
    """Decides on uploads. One for each hub, used on its event loop."""

    def __init__(
        self, usage: Usage, promises: Promises, buckets: Buckets, clock: Callable[[], float]
    ) -> None:
        self._buckets = buckets
        self._usage = usage
        self._promises = promises
        self._clock = clock
        self._closing = threading.Event()
        self._making_room: dict[str, asyncio.Lock] = {}
        self._in_vain: dict[str, float] = {}

    def close(self) -> None:
        """Break off the search for what can go."""
        self._closing.set()

    def refusal(
        self, bucket: BucketEngine, place: Place, limits: Limits, sizes_bytes: Mapping[str, int]
    ) -> QuotaExceeded | None:
        """Say why these uploads cannot be, None when they can. Quick: no I/O.

        :param sizes_bytes: by the objects' names, how much more each is than what is there under its name.
        """
        added = self._promises.new_bytes(sizes_bytes)
        if not added:
            return None
        if self._excess(bucket, place.channel, limits, added) > 0:
            return _full(place.channel, limits, self._used(bucket, place.channel), added,
                         expire=_may_expire(bucket, limits))
        if limits.node_day_bytes_max is not None:
            used = limits.day_bytes + self._promises.bytes(place.channel, place.node)
            used += self._usage.unwritten(place).upload_bytes
            if used + added > limits.node_day_bytes_max:
                return _day_full(place, limits, used, added)
        return None

    def promise(self, bucket: BucketEngine, place: Place, limits: Limits, sizes_bytes: Mapping[str, int]) -> None:
        """These uploads are about to be signed.

        Where the hub does not see what arrives, they count as what their node has uploaded from now on, and no more as
        what it still may.
        """
        if not bucket.watched:
            for name, size_bytes in sizes_bytes.items():
                if self._promises.new_bytes({name: size_bytes}):
                    self._usage.arrived(name, place.node, size_bytes)
        if limits.any:
            self._promises.add(place.node if bucket.watched else "", sizes_bytes)

    async def without_present(self, bucket: BucketEngine, sizes_bytes: Mapping[str, int]) -> dict[str, int]:
        """Look which objects are in the bucket already; return how much more each will be than now."""
        return await self._buckets.run(_added, bucket, dict(sizes_bytes), own=bucket.watched)

    async def make_room(
        self, bucket: BucketEngine, place: Place, limits: Limits, sizes_bytes: Mapping[str, int]
    ) -> None:
        """Remove what nobody has read for longest, if the channel's owner lets unread objects go."""
        if limits.size_bytes_max is None or not _may_expire(bucket, limits):
            return
        channel = place.channel
        async with self._making_room.setdefault(channel, asyncio.Lock()):
            excess = self._excess(bucket, channel, limits, self._promises.new_bytes(sizes_bytes))
            if excess <= 0 or time.monotonic() < self._in_vain.get(channel, 0.0):
                return
            wanted = excess + int(limits.size_bytes_max * _SPARE_PART)
            freed = await self._buckets.run(self._free, bucket, channel, wanted, own=bucket.watched)
            if freed < excess:
                self._in_vain[channel] = time.monotonic() + _RETRY_SECONDS
            else:
                self._in_vain.pop(channel, None)

    def _excess(self, bucket: BucketEngine, channel: str, limits: Limits, added_bytes: int) -> int:
        if limits.size_bytes_max is None:
            return 0
        return self._used(bucket, channel) + added_bytes - limits.size_bytes_max

    def _used(self, bucket: BucketEngine, channel: str) -> int:
        return bucket.totals(channel).size_bytes + self._promises.bytes(channel)

    def _free(self, bucket: BucketEngine, channel: str, wanted_bytes: int) -> int:
        """Remove objects until so many bytes are free; return how many are."""
        unread_since = self._clock() - RECENT_SECONDS
        victims = heapq.nsmallest(_VICTIMS_MAX, self._unread(bucket, channel, unread_since), key=lambda found: found[0])
        freed = count = 0
        for _, found in victims:
            if freed >= wanted_bytes or self._closing.is_set():
                break
            try:
                if bucket.expire(found.name, unread_since):
                    freed += found.size_bytes
                    count += 1
            except DiskError as error:
                _log.warning("channel %s: %s", channel, error)
        _log.info("channel %s: %d objects that were unread for longest (%d bytes) made room", channel, count, freed)
        return freed

    def _unread(
        self, bucket: BucketEngine, channel: str, unread_since: float
    ) -> Iterator[tuple[float, ObjectRecord]]:
        after = ""
        while not self._closing.is_set():
            page = bucket.objects(channel, after=after, limit=_PAGE)
            for found in page:
                if found.last_read is not None and found.last_read < unread_since:
                    yield found.last_read, found
            if len(page) < _PAGE:
                return
            after = page[-1].name


def _added(bucket: BucketEngine, sizes_bytes: dict[str, int]) -> dict[str, int]:
    return {name: max(0, size - (bucket.size(name) or 0)) for name, size in sizes_bytes.items()}


def _may_expire(bucket: BucketEngine, limits: Limits) -> bool:
    return bucket.notes_reads and limits.unread_days_max is not None


def _full(channel: str, limits: Limits, used_bytes: int, added_bytes: int, *, expire: bool) -> QuotaExceeded:
    why = "what it holds was all used lately" if expire else "nothing makes room, as its objects do not expire"
    return QuotaExceeded(
        what=f"The bucket of the channel {channel!r}", limit=limits.size_bytes_max, used=used_bytes, needed=added_bytes,
        why=why, advice=f"The channel's owner can set another quota (kachery-fast channel set {channel} "
                        f"--size-max SIZE), or remove objects (kachery-fast channel objects {channel}).")


def _day_full(place: Place, limits: Limits, used_bytes: int, added_bytes: int) -> QuotaExceeded:
    return QuotaExceeded(
        what=f"Node {place.node[:16]} on the channel {place.channel!r}, today,", limit=limits.node_day_bytes_max,
        used=used_bytes, needed=added_bytes, why=f"the day ends at {_midnight(place)} UTC",
        advice=f"Try again then; or the channel's owner can set another limit (kachery-fast channel set "
               f"{place.channel} --node-day-max SIZE).")


def _midnight(place: Place) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime((place.day + 1) * 24 * 3600))

"""Performs what ``protocol.sharing.FeedSharer`` decides for one channel: read the log, upload, answer, push."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..errors import (
    BadMessage,
    BucketUnreachable,
    DatabaseUnusable,
    DiskError,
    DiskFull,
    FeedForked,
    FeedUnknown,
    KacheryError,
    NotPermitted,
    ObjectMissing,
    TooLarge,
    UploadRefused,
    UrlExpired,
)
from ..protocol.access import Permission
from ..protocol.feed_bodies import FeedFailed, FeedMessages, FeedShared, FeedSubscribe, Segment
from ..protocol.feed_segments import encode_index, encode_segment
from ..protocol.hub_bodies import SignedObject
from ..protocol.sharing import FeedSharer, ShareLimits
from ..protocol.sharing_events import (
    Appended,
    Asked,
    Event,
    Forgotten,
    Listen,
    Overheard,
    ReadRest,
    RestRead,
    Said,
    Share,
    SharedSome,
    ShareEnded,
    Tick,
    Withdrawn,
)
from ..store.feeds import Appended as AppendedToLog
from .ending import begin_task, end_tasks
from .faults import logged_fault
from .feed_index import read_index
from .link import ChannelLink
from .rules import feed_key
from .threads import in_thread
from .tools import FeedTools
from .uploading import crc32c_of, put_signed

__all__ = ["FeedSharing"]

log = logging.getLogger("kachery_fast.node")

# Questions that are being looked up; a flood beyond is dropped, and the honest ask again.
_LOOKUPS_MAX = 1024
# Subfeeds of whose objects this node remembers that they are in the bucket, and objects of all of them together.
_KNOWN_SUBFEEDS_MAX = 1000
_KNOWN_OBJECTS_MAX = 1_000_000
# Segments that are announced together: so that a reader begins while the next ones are being uploaded.
_ANNOUNCED_MAX = 16
_REASONS: tuple[tuple[type[KacheryError], str], ...] = (
    (FeedUnknown, "deleted"),
    (FeedForked, "forked"),
    (NotPermitted, "not-permitted"),
    (DiskError, "disk-error"),
    (DiskFull, "disk-error"),
    (DatabaseUnusable, "disk-error"),
    (BucketUnreachable, "bucket"),
    (UploadRefused, "bucket"),
    (UrlExpired, "bucket"),
)


@dataclass
class _Known:
    """What the bucket has of one subfeed, as far as this node knows: of the segments that it has itself, by SHA-1; and
    what the index tells of, without segments unless they are the very same."""

    segments: set[str] = field(default_factory=set)
    looked: bool = False
    index: tuple[int, tuple[Segment, ...]] = (0, ())


class FeedSharing:
    """Shares the feeds of this node, and the copies that it holds, on one channel.

    :param owns: whether this node owns a feed. :param on_close: called once, at the end.
    :param uniform: draws how much longer than ``feed_relay_wait_seconds`` this node waits with its copies.
    """

    def __init__(self, link: ChannelLink, tools: FeedTools, *, owns: Callable[[str], bool],
                 on_close: Callable[[], Awaitable[object]],
                 uniform: Callable[[float, float], float] = random.uniform) -> None:
        settings = tools.settings
        self.link = link
        self._tools = tools
        self._owns = owns
        self._on_close = on_close
        self._uniform = uniform
        self._sign_batch_max = settings.sign_batch_max
        self._upload_concurrency = settings.upload_concurrency
        self._rest_size_bytes_max = settings.message_size_bytes_max // 2
        self._machine = FeedSharer(ShareLimits(
            subscription_seconds=settings.feed_subscription_seconds,
            relay_wait_seconds=settings.feed_relay_wait_seconds,
            push_interval_seconds=settings.feed_push_interval_seconds,
            rest_size_bytes_max=self._rest_size_bytes_max))
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._known: OrderedDict[tuple[str, str], _Known] = OrderedDict()
        self._listening: set[str] = set()
        self._lookups = 0
        self._closed = False
        link.on_members.append(self._members_changed)

    def heard(self, body: Any, sender: str) -> None:
        """A node asks for a subfeed."""
        if (isinstance(body, FeedSubscribe) and self._tools.log.has(body.feed_id, body.subfeed)
                and self._lookups < _LOOKUPS_MAX):
            self._lookups += 1
            begin_task(self._asked(body, sender), self._tasks)

    def appended(self, feed_id: str, subfeed: str, appended: AppendedToLog) -> None:
        """Messages were made durable in a subfeed of this node's own."""
        if self.link.may(Permission.PROVIDE_FEEDS) and self._machine.listened_to((feed_id, subfeed), self._loop.time()):
            self._post(Appended((feed_id, subfeed), appended.first, appended.signed, appended.head))

    def forget(self, feed_id: str) -> None:
        """A feed was deleted here."""
        for key in [key for key in self._known if key[0] == feed_id]:
            del self._known[key]
        self._post(Forgotten(feed_id))

    async def close(self) -> None:
        """Stop; uploads under way are broken off."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self.link.on_members.remove(self._members_changed)
        for key in list(self._listening):
            self.link.unlisten(key, self._overheard)
        await end_tasks(self._tasks)
        await self._on_close()

    # --- events

    def _post(self, event: Event) -> None:
        if self._closed:
            return
        for effect in self._machine.handle(event, self._loop.time()):
            if isinstance(effect, Said):
                self.link.say(effect.kind, effect.fields)
            elif isinstance(effect, ReadRest):
                begin_task(self._read_rest(effect), self._tasks)
            elif isinstance(effect, Share):
                begin_task(self._share(effect), self._tasks)
            elif isinstance(effect, Listen):
                self._listen(effect)
        deadline = self._machine.deadline
        if deadline != self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = deadline
            self._timer = None if deadline is None else self._loop.call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._timer = self._timer_at = None
        self._post(Tick())

    def _listen(self, effect: Listen) -> None:
        key = feed_key(*effect.key)
        if effect.on:
            self._listening.add(key)
            self.link.listen(key, self._overheard)
        else:
            self._listening.discard(key)
            self.link.unlisten(key, self._overheard)

    def _overheard(self, body: Any, sender: str) -> None:
        if isinstance(body, (FeedMessages, FeedShared)):
            self._post(Overheard(body))

    def _members_changed(self) -> None:
        self._post(Withdrawn(frozenset(
            member.node_id for member in self.link.info.members
            if Permission.REQUEST_FEEDS.value in member.permissions)))

    async def _asked(self, body: FeedSubscribe, sender: str) -> None:
        def look() -> tuple[int, bool]:
            tail = self._tools.log.tail(body.feed_id, body.subfeed)
            return tail.count, bool(self._tools.log.forks(body.feed_id, body.subfeed))

        try:
            count, forked = await in_thread(self._tools.threads, look)
        except KacheryError as error:
            reason, detail = self._reason(error, "disk-error")
            if self._owns(body.feed_id) and not self._closed:  # of a copy there may be others
                self.link.say(FeedFailed, {"request": body.request, "feed_id": body.feed_id, "subfeed": body.subfeed,
                                           "reason": reason, "detail": detail})
            return
        finally:
            self._lookups -= 1
        self._post(Asked(body, sender, self._owns(body.feed_id), count, forked, self._uniform(0.0, 1.0)))

    # --- what is left for a reader

    async def _read_rest(self, effect: ReadRest) -> None:
        try:
            self._post(await in_thread(self._tools.threads, self._rest, effect))
        except Exception as error:
            reason, detail = self._reason(error, "disk-error")
            self._post(RestRead(effect.key, effect.position, None, reason=reason, detail=detail))

    def _rest(self, effect: ReadRest) -> RestRead:
        # A message of the band carries far fewer; each takes 250 bytes at least.
        count_max = self._rest_size_bytes_max // 250 + 1
        head = self._tools.log.head(*effect.key)  # before the messages, so that it never tells of more than they are
        messages: list[bytes] | None = []
        count = self._tools.log.tail(*effect.key).count
        if effect.position < count:
            messages = self._tools.log.read(*effect.key, effect.position, count_max, self._rest_size_bytes_max)
            if sum(map(len, messages)) > self._rest_size_bytes_max or effect.position + len(messages) < count:
                messages = None
        return RestRead(effect.key, min(effect.position, count), messages, head)

    # --- the bucket

    async def _share(self, effect: Share) -> None:
        try:
            end = await self._put_all(effect)
        except Exception as error:
            self._post(ShareEnded(effect.key, 0, *self._reason(error, "hub")))
        else:
            self._post(ShareEnded(effect.key, end))

    async def _put_all(self, effect: Share) -> int:
        """Upload what is missing: first what the reader waits for, then what comes before it, then the index."""
        key = effect.key
        head = await in_thread(self._tools.threads, self._tools.log.head, *key)
        segments = await in_thread(self._tools.threads, self._tools.log.segments, *key)
        if not segments:
            raise FeedUnknown(feed=f"feed://{key[0]}", advice="Its owner may have deleted it.")
        known = await self._look_at_index(key, segments)
        wanted = [part for part in segments if part.end > effect.position]
        if effect.distrust:
            known.segments.difference_update(part.sha1 for part in wanted)
            known.index = (0, ())
        for start in range(0, len(wanted), _ANNOUNCED_MAX):
            part = wanted[start:start + _ANNOUNCED_MAX]
            await self._put_segments(key, known, part)
            self._post(SharedSome(key, part, head))
        await self._put_segments(key, known, segments)
        await self._put_index(key, known, segments, head)
        return segments[-1].end

    async def _look_at_index(self, key: tuple[str, str], segments: list[Segment]) -> _Known:
        """Return what of ``segments`` is known to be in the bucket. At first that is what the index says; when it lies,
        readers ask again, and then it is not believed."""
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Known()
        self._known.move_to_end(key)
        while len(self._known) > 1 and (len(self._known) > _KNOWN_SUBFEEDS_MAX or sum(
                len(other.segments) for other in self._known.values()) > _KNOWN_OBJECTS_MAX):
            self._known.popitem(last=False)
        if known.looked and self._owns(key[0]):
            return known  # nobody else puts a longer one there
        try:
            index = await read_index(self.link, *key, self._tools)
        except ObjectMissing:
            known.index = (0, ())
        except (BadMessage, TooLarge, UploadRefused) as error:
            log.warning("channel %s: the index of feed://%s is no good: %s", self.link.name, key[0], error)
            known.index = (0, ())
        else:
            known.index = index.count, index.segments if index.segments == tuple(segments) else ()
            known.segments |= {part.sha1 for part in index.segments}.intersection(part.sha1 for part in segments)
        known.looked = True
        return known

    async def _put_segments(self, key: tuple[str, str], known: _Known, segments: Iterable[Segment]) -> None:
        missing = [part for part in segments if part.sha1 not in known.segments]
        for start in range(0, len(missing), self._sign_batch_max):
            batch = missing[start:start + self._sign_batch_max]
            pending = list(zip(batch, await self._sign(key, batch), strict=True))

            async def put_next(pending: list[tuple[Segment, SignedObject]] = pending) -> None:
                while pending:
                    part, leave = pending.pop(0)
                    await self._put_segment(key, part, leave)
                    known.segments.add(part.sha1)

            workers = [self._loop.create_task(put_next()) for _ in range(min(self._upload_concurrency, len(batch)))]
            try:
                await asyncio.gather(*workers)
            finally:
                await end_tasks(workers)

    async def _put_segment(self, key: tuple[str, str], part: Segment, leave: SignedObject) -> None:
        async with self._tools.segments:
            data = await in_thread(self._tools.threads, self._segment_bytes, key, part)
            await self._put(leave, data, lambda: self._sign(key, [part]))

    def _segment_bytes(self, key: tuple[str, str], part: Segment) -> bytes:
        data = encode_segment(self._tools.log.read(*key, part.first, part.end - part.first, part.size))
        if len(data) != part.size:
            raise FeedUnknown(feed=f"feed://{key[0]}", advice="It was deleted, or cut short by a fork, meanwhile.")
        return data

    async def _put_index(self, key: tuple[str, str], known: _Known, segments: list[Segment],
                         head: dict[str, Any] | None) -> None:
        """Write the index, unless it says the same; a copy never takes the place of one that tells of more."""
        count = segments[-1].end
        if known.index == (count, tuple(segments)) or (known.index[0] > count and not self._owns(key[0])):
            return
        data = encode_index(count, head, segments)
        sign = partial(self._sign, key, [], data)
        (leave,) = await sign()
        await self._put(leave, data, sign)
        known.index = count, tuple(segments)

    async def _sign(self, key: tuple[str, str], segments: list[Segment], index: bytes | None = None,
                    ) -> list[SignedObject]:
        specs = [(part.sha1, part.size, await in_thread(
            self._tools.threads, lambda part=part: crc32c_of(self.link, self._segment_bytes(key, part))
        ) if self.link.info.crc32c else None) for part in segments]
        return await self.link.hub.sign_feed_uploads(
            self.link.name, *key, specs, *(() if index is None else (len(index), crc32c_of(self.link, index))))

    async def _put(self, leave: SignedObject, data: bytes, sign: Callable[[], Awaitable[list[SignedObject]]]) -> None:
        if await put_signed(self.link, leave, lambda leave: self.link.bucket.put_bytes(leave, data), sign):
            self._tools.traffic.uploaded_objects += 1
            self._tools.traffic.uploaded_bytes += len(data)

    # --- small parts

    def _reason(self, error: Exception, otherwise: str) -> tuple[str, str]:
        if not isinstance(error, KacheryError):
            return otherwise, logged_fault(error, f"channel {self.link.name}: sharing a feed")
        log.warning("channel %s: a feed could not be shared: %s", self.link.name, error)
        return next((reason for kind, reason in _REASONS if isinstance(error, kind)), otherwise), error.message

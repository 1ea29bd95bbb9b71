"""The feeds of a node: its log, who waits for news of it, and what it follows and shares on its channels."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

from ..config import Settings
from ..errors import Cancelled, FeedForked, InvalidArgument, KacheryError
from ..protocol.feed_bodies import FeedSubscribe
from ..store.feeds import Appended, FeedInfo, FeedLog, ForkRecord
from .ending import begin_task, end_tasks
from .feed_following import Following
from .feed_sharing import FeedSharing
from .link import ChannelLink
from .threads import in_thread
from .tools import FeedTools, Traffic

__all__ = ["Feeds", "Reading", "Watch"]

T = TypeVar("T")

# They verify signatures and read the log; two would do for two cores, the others wait for the disk.
_THREADS = 4
# Segments that are loaded, checked or shared at once: each may be 8 MiB, and 25 times that once it is read as JSON.
_SEGMENTS_MAX = 2
# Long indexes that are read at once.
_INDEXES_MAX = 1
_SUBSCRIBE = FeedSubscribe.__struct_config__.tag
# What one answer to a reader holds.
_ANSWER_SIZE_BYTES_MAX = 4 * 1024 * 1024
# Readers that wait at once, each for any number of subfeeds.
_READERS_MAX = 10_000


class Watch(NamedTuple):
    """One subfeed that a client reads from ``position`` on.

    ``following`` is how it comes to this node; None: it is this node's own, or is read as far as it is held here.
    """

    feed_id: str
    subfeed: str
    position: int
    following: Following | None = None


@dataclass(frozen=True)
class Reading:
    """What a client gets: signed messages from its position on, how many are known to be, and whether it exists.

    ``why`` says, when nothing came, what was tried.
    """

    messages: list[bytes]
    count: int
    known: bool
    why: str = ""


class Feeds:
    """Every feed of one node. ``open`` before anything else, ``close`` at the end.

    :param traffic: counts what is uploaded and downloaded.
    """

    def __init__(self, settings: Settings, traffic: Traffic) -> None:
        self._settings = settings
        self._traffic = traffic
        self._threads = ThreadPoolExecutor(_THREADS, "feeds")
        self._segments = asyncio.Semaphore(_SEGMENTS_MAX)
        self._indexes = asyncio.Semaphore(_INDEXES_MAX)
        self._log: FeedLog | None = None
        self._followings: OrderedDict[tuple[ChannelLink, str, str], Following] = OrderedDict()
        self._sharings: list[FeedSharing] = []
        self._readers: dict[tuple[str, str], set[asyncio.Future[None]]] = {}
        self._waiting = 0
        self._endings: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Open the log. :raises DatabaseUnusable, DiskError: it is damaged, or the disk refuses."""
        self._log = await self._in_thread(partial(
            FeedLog, self._settings.storage_dir,
            message_size_bytes_max=self._settings.feed_message_size_bytes_max))

    async def close(self) -> None:
        """Stop following, make durable what was appended, and close the log."""
        await asyncio.gather(*(following.close() for following in list(self._followings.values())))
        await end_tasks(self._endings)
        if self._log is not None:
            await self._in_thread(self._log.close)
        self._threads.shutdown(wait=True)

    @property
    def log(self) -> FeedLog:
        """The log of this node."""
        if self._log is None:
            raise AssertionError("the feeds are used before they are opened")
        return self._log

    def owns(self, feed_id: str) -> bool:
        """Whether this node made a feed, and extends it."""
        return self.log.owns(feed_id)

    def concerns(self, body: dict[str, Any]) -> bool:
        """Whether a question on a band, not yet verified, is of another kind, or about a subfeed that is here."""
        if body.get("type") != _SUBSCRIBE:
            return True
        feed_id, subfeed = body.get("feedId"), body.get("subfeed")
        return self._log is not None and isinstance(feed_id, str) and isinstance(subfeed, str) and (
            self._log.has(feed_id, subfeed))

    # --- feeds

    async def create(self, name: str | None) -> tuple[str, bool]:
        """As ``FeedLog.create``."""
        return await self._in_thread(self.log.create, name)

    async def find(self, name: str) -> str:
        """As ``FeedLog.find``."""
        return await self._in_thread(self.log.find, name)

    async def all(self) -> list[FeedInfo]:
        """As ``FeedLog.feeds``."""
        return await self._in_thread(self.log.feeds)

    async def info(self, feed_id: str) -> FeedInfo:
        """As ``FeedLog.info``."""
        return await self._in_thread(self.log.info, feed_id)

    async def count(self, feed_id: str, subfeed: str) -> int:
        """Return how many messages of a subfeed are held here."""
        return (await self._in_thread(self.log.tail, feed_id, subfeed)).count

    async def forks(self, feed_id: str, subfeed: str) -> list[ForkRecord]:
        """As ``FeedLog.forks``."""
        return await self._in_thread(self.log.forks, feed_id, subfeed)

    async def delete(self, feed_id: str) -> None:
        """As ``FeedLog.delete``; whoever reads it here sees an empty feed from then on."""
        await asyncio.gather(*(following.close() for (_, followed, _), following in list(self._followings.items())
                               if followed == feed_id))
        await self._in_thread(self.log.delete, feed_id)
        for sharing in self._sharings:
            sharing.forget(feed_id)

    # --- appending

    def append(self, feed_id: str, subfeed: str, messages: list[dict[str, Any]], name: Any) -> Awaitable[Appended]:
        """Append messages to a subfeed of an own feed; done when they are on the disk. It cannot be taken back: a
        cancelled caller only does not hear of it.

        :raises KacheryError: as ``FeedLog.append``.
        """
        done = asyncio.wrap_future(self.log.append(feed_id, subfeed, messages, name))
        # A callback, so that readers hear of it also when the caller is gone.
        done.add_done_callback(partial(self._appended, feed_id, subfeed))
        return asyncio.shield(done)

    def _appended(self, feed_id: str, subfeed: str, done: asyncio.Future[Appended]) -> None:
        if done.cancelled() or done.exception() is not None:
            return
        self._wake(feed_id, subfeed)
        for sharing in self._sharings:
            sharing.appended(feed_id, subfeed, done.result())

    # --- reading

    async def follow(self, link: ChannelLink, feed_id: str, subfeed: str) -> Following:
        """Follow another node's subfeed on a channel from now on, for ``feed_subscription_seconds``.

        The subfeed that nobody has read for the longest is let go when there are too many.
        """
        key = (link, feed_id, subfeed)
        following = self._followings.get(key)
        if following is None:
            tail = await self._in_thread(self.log.tail, feed_id, subfeed)
            following = self._followings.get(key)
        if following is None:
            while len(self._followings) >= self._settings.feed_followed_max:
                self._let_go(next(iter(self._followings.values())))
            following = self._followings[key] = Following(
                link, feed_id, subfeed, tail.count, secrets.token_hex(16), self._tools(),
                on_end=partial(self._followings.pop, key, None))
        self._followings.move_to_end(key)
        following.want()
        return following

    async def read(self, watches: list[Watch], wait_seconds: float, count_max: int) -> list[Reading]:
        """Return what is new of some subfeeds, in their order, as soon as there is anything of any of them.

        :param wait_seconds: how long to wait for news; 0.0: return what is here. :param count_max: messages of each.
        :raises FeedForked: nothing is new, and one of the positions is at or behind a fork.
        :raises NotPermitted: nothing is new, and one of them cannot be followed any more.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_seconds
        renew_seconds = self._settings.feed_subscription_seconds / 2
        keys = {(watch.feed_id, watch.subfeed) for watch in watches}
        while True:
            news = self._expect(keys)
            try:
                found = await self._in_thread(self._read_all, watches, count_max)
                left = end - loop.time()
                if left <= 0 or any(isinstance(reading, KacheryError) or reading.messages for reading in found) or any(
                        watch.following is not None and watch.following.error is not None for watch in watches):
                    return self._settle(watches, found)
                await asyncio.wait([news], timeout=min(left, renew_seconds))
            finally:
                self._forget(keys, news)
            for watch in watches:
                if watch.following is not None:
                    watch.following.want()

    async def held(self, feed_id: str, subfeed: str, position: int, count_max: int) -> list[bytes]:
        """Return what is held here from a position on, as much as one answer holds; none: that is the end.

        :raises FeedForked: the position is at or behind a fork.
        """
        return await self._in_thread(self.log.read, feed_id, subfeed, position, count_max, _ANSWER_SIZE_BYTES_MAX)

    def _read_all(self, watches: list[Watch], count_max: int) -> list[Reading | KacheryError]:
        found: list[Reading | KacheryError] = []
        size_bytes = 0
        for watch in watches:
            room = _ANSWER_SIZE_BYTES_MAX - size_bytes
            try:
                messages = self.log.read(watch.feed_id, watch.subfeed, watch.position, count_max if room > 0 else 0,
                                         room)
                count = self.log.tail(watch.feed_id, watch.subfeed).count
            except FeedForked as error:
                found.append(error)
                continue
            size_bytes += sum(map(len, messages))
            found.append(Reading(messages, count, count > 0 or self.owns(watch.feed_id)))
        return found

    def _settle(self, watches: list[Watch], found: list[Reading | KacheryError]) -> list[Reading]:
        readings: list[Reading] = []
        errors: list[KacheryError] = []
        for watch, reading in zip(watches, found, strict=True):
            following = watch.following
            if isinstance(reading, KacheryError):
                errors.append(reading)
                readings.append(Reading([], 0, True, reading.message))
            elif following is None:
                readings.append(reading)
            elif reading.messages:
                readings.append(replace(reading, count=max(reading.count, following.count)))
            else:
                if following.error is not None:
                    errors.append(following.error)
                readings.append(Reading([], max(reading.count, following.count), reading.known or following.known,
                                        following.account()))
        if errors and not any(reading.messages for reading in readings):
            raise errors[0]
        return readings

    def _expect(self, keys: Iterable[tuple[str, str]]) -> asyncio.Future[None]:
        if self._waiting >= _READERS_MAX:
            raise InvalidArgument(what=f"{_READERS_MAX} readers wait at this node already. Ask again later.")
        self._waiting += 1
        news = asyncio.get_running_loop().create_future()
        for key in keys:
            self._readers.setdefault(key, set()).add(news)
        return news

    def _forget(self, keys: Iterable[tuple[str, str]], news: asyncio.Future[None]) -> None:
        self._waiting -= 1
        for key in keys:
            readers = self._readers.get(key, set())
            readers.discard(news)
            if not readers:
                self._readers.pop(key, None)

    def _wake(self, feed_id: str, subfeed: str) -> None:
        for news in self._readers.get((feed_id, subfeed), ()):
            if not news.done():
                news.set_result(None)

    # --- channels

    def serve(self, link: ChannelLink) -> FeedSharing:
        """Share this node's feeds, and the copies that it holds, on a channel; when that is closed, nothing is
        followed there any more."""
        async def leave() -> None:
            self._sharings.remove(sharing)
            ended = Cancelled(what=f"Following a feed on the channel {link.name!r}, which this node has left,")
            await asyncio.gather(*(following.close(ended) for (on, _, _), following in list(self._followings.items())
                                   if on is link))

        sharing = FeedSharing(link, self._tools(), owns=self.owns, on_close=leave)
        self._sharings.append(sharing)
        return sharing

    def _tools(self) -> FeedTools:
        return FeedTools(self.log, self._settings, self._threads, self._segments, self._indexes,
                         self._traffic, self._grown)

    def _grown(self, feed_id: str, subfeed: str, count: int, forked: bool) -> None:
        """A copy was extended, or turned out to be forked, or is followed no more."""
        self._wake(feed_id, subfeed)
        for sharing in self._sharings:  # one for each channel
            following = self._followings.get((sharing.link, feed_id, subfeed))
            if following is not None:
                following.grown(count, forked)

    def _let_go(self, following: Following) -> None:
        limit = self._settings.feed_followed_max
        following.let_go(InvalidArgument(what=f"More than {limit} subfeeds are followed at once (feed_followed_max)"))
        begin_task(following.close(), self._endings)

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await in_thread(self._threads, work, *arguments)

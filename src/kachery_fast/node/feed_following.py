"""Performs what ``protocol.following.Follower`` decides: following one subfeed of another node's on one channel."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from typing import Any

from ..errors import (
    BadMessage,
    FeedChainBroken,
    FeedForked,
    HeadInvalid,
    KacheryError,
    NodeError,
    ObjectMissing,
)
from ..protocol.access import Permission
from ..protocol.feed_bodies import FeedSubscribe, Segment
from ..protocol.feed_segments import SEGMENT_SIZE_BYTES_MAX, parse_segment
from ..protocol.following import Follower, FollowLimits
from ..protocol.following_events import (
    BandRestored,
    Effect,
    End,
    Event,
    Grown,
    Heard,
    IndexRead,
    KeepHead,
    Load,
    Loaded,
    LookAtIndex,
    Parted,
    SayFailed,
    Subscribe,
    Take,
    Taken,
    Tick,
    Wanted,
)
from ..protocol.inquiry import Inquiry
from ..protocol.names import FeedUri, segment_object_name
from ..store.feeds import Extended
from .ending import begin_task, end_tasks
from .faults import logged_fault
from .feed_index import read_index
from .link import ChannelLink
from .rules import feed_key
from .threads import in_thread
from .tools import FeedTools

__all__ = ["Following"]

log = logging.getLogger("kachery_fast.node")


class Following:
    """One subfeed, as it comes over one channel. It begins at once, and ends by itself when nobody wants it any more.

    :param position: how many messages are held.
    :param request: the beginning of the ids of its questions, random.
    :param on_end: called once, when it is over.
    """

    def __init__(self, link: ChannelLink, feed_id: str, subfeed: str, position: int, request: str, tools: FeedTools,
                 on_end: Callable[[], object]) -> None:
        self.error: KacheryError | None = None
        self._link = link
        self._feed_id = feed_id
        self._subfeed = subfeed
        self._tools = tools
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._inquiry = Inquiry(str(FeedUri(feed_id, None, subfeed)), link.name,
                                link.providers(Permission.PROVIDE_FEEDS), thing="the feed")
        self._machine = Follower(feed_id, subfeed, position, request, self._inquiry, FollowLimits(
            answer_wait_seconds=tools.settings.offer_wait_seconds,
            renew_seconds=tools.settings.feed_renew_seconds))
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False
        link.listen(feed_key(feed_id, subfeed), self._heard)
        link.on_restored.append(self._band_restored)
        link.on_members.append(self._members_changed)

    @property
    def count(self) -> int:
        """How many messages the subfeed has, as far as its owner has told."""
        return self._machine.count

    @property
    def known(self) -> bool:
        """Whether there is such a subfeed."""
        return self._machine.known

    def account(self) -> str:
        """Say, for people, what was tried."""
        return self._inquiry.tried()

    def want(self) -> None:
        """Somebody reads: go on for ``feed_subscription_seconds``."""
        if not self._ended:
            self._post(Wanted(self._loop.time() + self._tools.settings.feed_subscription_seconds))

    def grown(self, count: int, forked: bool) -> None:
        """The subfeed was extended by other ways, or turned out to be forked."""
        if not self._ended:
            self._post(Grown(count, forked))

    async def close(self, error: KacheryError | None = None) -> None:
        """End it, as ``let_go``, and wait for the end of what was under way."""
        self.let_go(error)
        await end_tasks(self._tasks)

    def let_go(self, error: KacheryError | None) -> None:
        """End it; ``error`` tells readers why. What is under way is broken off."""
        if self._ended:
            return
        self._ended, self.error = True, error
        if self._timer is not None:
            self._timer.cancel()
        self._link.unlisten(feed_key(self._feed_id, self._subfeed), self._heard)
        self._link.on_restored.remove(self._band_restored)
        self._link.on_members.remove(self._members_changed)
        for task in self._tasks:
            task.cancel()
        self._on_end()
        self._tools.on_grown(self._feed_id, self._subfeed, self._machine.position, False)

    # --- events

    def _heard(self, body: Any, sender: str) -> None:
        self._post(Heard(body, sender))

    def _band_restored(self) -> None:
        self._post(BandRestored())

    def _members_changed(self) -> None:
        self._inquiry.change_providers(self._link.providers(Permission.PROVIDE_FEEDS))
        refusal = self._link.refusal(Permission.REQUEST_FEEDS)
        if refusal is not None:
            self.let_go(refusal)

    def _post(self, event: Event) -> None:
        if self._ended:
            return
        for effect in self._machine.handle(event, self._loop.time()):
            self._perform(effect)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._machine.deadline
        if deadline is not None and not self._ended:
            self._timer = self._loop.call_at(deadline, self._post, Tick())

    # --- effects

    def _perform(self, effect: Effect) -> None:
        if isinstance(effect, LookAtIndex):
            begin_task(self._look_at_index(), self._tasks)
        elif isinstance(effect, Load):
            begin_task(self._load(effect.segment), self._tasks)
        elif isinstance(effect, Take):
            begin_task(self._take(effect), self._tasks)
        elif isinstance(effect, KeepHead):
            begin_task(self._keep_head(effect), self._tasks)
        elif isinstance(effect, Subscribe):
            self._link.say(FeedSubscribe, effect.fields, lambda error: self._post(SayFailed(error)))
        elif isinstance(effect, End):
            self.let_go(None)

    async def _look_at_index(self) -> None:
        try:
            self._post(IndexRead(await read_index(self._link, self._feed_id, self._subfeed, self._tools)))
        except ObjectMissing:
            self._post(IndexRead(None, "has no index of it"))
        except KacheryError as error:
            self._post(IndexRead(None, error.message))
        except Exception as error:
            self._post(IndexRead(None, self._fault(error)))

    async def _load(self, segment: Segment) -> None:
        try:
            self._post(await self._loaded(segment))
        except KacheryError as error:
            self._post(Loaded(segment, self._machine.position, error.message, trouble=True))
        except Exception as error:
            self._post(Loaded(segment, self._machine.position, self._fault(error), trouble=True))

    async def _loaded(self, segment: Segment) -> Loaded:
        channel, feed_id, subfeed = self._link.name, self._feed_id, self._subfeed
        ahead = (segment_object_name(channel, feed_id, subfeed, following.sha1)
                 for following in self._machine.segments_after(segment))
        async with self._tools.segments:
            try:
                data = await self._link.bucket.get_small(
                    segment_object_name(channel, feed_id, subfeed, segment.sha1), SEGMENT_SIZE_BYTES_MAX, ahead=ahead)
            except ObjectMissing:
                return Loaded(segment, self._machine.position, f"lacks the segment {segment.sha1}")
            found = hashlib.sha1(data, usedforsecurity=False).hexdigest()
            if found == segment.sha1:
                outcome = await in_thread(self._tools.threads, self._extend_by, segment, data)
                self._tools.traffic.downloaded_objects += 1
                self._tools.traffic.downloaded_bytes += len(data)
                self._tell(outcome)
                return outcome
        # What was removed is put there anew by whoever has it.
        text = f"the segment {segment.sha1} is damaged (its bytes have the SHA-1 {found})"
        try:
            removed = await self._link.hub.report_corrupt(self._link.name, segment.sha1, found, feed_id=self._feed_id,
                                                          subfeed=self._subfeed)
            text += "; the hub removed it" if removed else "; the hub did not find it so"
        except KacheryError as error:
            text += f"; it could not be reported: {error.message}"
        log.warning("channel %s: %s", self._link.name, text)
        return Loaded(segment, self._machine.position, text)

    def _extend_by(self, segment: Segment, data: bytes) -> Loaded:
        try:
            messages = parse_segment(data)
        except BadMessage as error:
            return Loaded(segment, self._machine.position, f"a segment was refused: {error.message}", useless=True)
        done = self._tools.log.extend(self._feed_id, self._subfeed, segment.first, messages)
        if done.error is None:
            return Loaded(segment, done.count)
        return Loaded(segment, done.count, f"a segment was refused: {done.error.message}", useless=True,
                      forked=isinstance(done.error, FeedForked))

    async def _take(self, effect: Take) -> None:
        try:
            done = await in_thread(self._tools.threads, self._extend, effect)
            outcome = Taken(done.count)
            if done.error is not None:
                log.warning("channel %s: refused messages of %s: %s", self._link.name, effect.sender[:16], done.error)
                outcome = Taken(done.count, f"sent a message that was refused: {done.error.message}",
                                isinstance(done.error, FeedForked))
            self._tell(outcome)
            self._post(outcome)
            if isinstance(done.error, FeedChainBroken):
                self._post(Parted(done.error.details["number"] - 1))
        except KacheryError as error:
            self._post(Taken(self._machine.position, error.message))
        except Exception as error:
            self._post(Taken(self._machine.position, self._fault(error)))

    def _extend(self, effect: Take) -> Extended:
        return self._tools.log.extend(self._feed_id, self._subfeed, effect.first, effect.messages())

    async def _keep_head(self, effect: KeepHead) -> None:
        try:
            await in_thread(self._tools.threads, self._tools.log.keep_head, self._feed_id, self._subfeed,
                            effect.head.signed)
        except KacheryError as error:
            log.warning("the head of %s could not be kept: %s", self._inquiry.uri, error)
            if isinstance(error, HeadInvalid):  # its signature was good, so it is of another history
                self._post(Parted(effect.head.count - 1))

    # --- small parts

    def _tell(self, outcome: Loaded | Taken) -> None:
        if outcome.count > self._machine.position or outcome.forked:
            self._tools.on_grown(self._feed_id, self._subfeed, outcome.count, outcome.forked)

    def _fault(self, error: Exception) -> str:
        return NodeError(what=logged_fault(error, f"following {self._inquiry.uri}")).message

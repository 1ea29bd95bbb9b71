"""Owners, relays and readers of one subfeed by their real machines; a network and a bucket that do what they are told.

Nothing sleeps: time is a number, and whatever is due is done in the order of its time.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
from collections.abc import Callable
from typing import Any

from kachery_fast.protocol.feed_bodies import FeedFailed, FeedMessages, FeedShared, FeedSubscribe, Segment
from kachery_fast.protocol.feed_segments import Index, cut, encode_segment, parse_segment
from kachery_fast.protocol.feeds import Extension, Tail, extend, sign_head, sign_messages
from kachery_fast.protocol.following import Follower, FollowLimits
from kachery_fast.protocol.following_events import (
    BandRestored,
    End,
    Heard,
    IndexRead,
    KeepHead,
    Load,
    Loaded,
    LookAtIndex,
    Subscribe,
    Take,
    Taken,
    Wanted,
)
from kachery_fast.protocol.following_events import Tick as FollowerTick
from kachery_fast.protocol.inquiry import Inquiry
from kachery_fast.protocol.sharing import FeedSharer, ShareLimits
from kachery_fast.protocol.sharing_events import (
    Appended,
    Asked,
    Listen,
    Overheard,
    ReadRest,
    RestRead,
    Said,
    Share,
    SharedSome,
    ShareEnded,
)
from kachery_fast.protocol.sharing_events import Tick as SharerTick

from .chains import FEED, KEY, START, SUBFEED, TIME_MS

PLACE = (FEED, SUBFEED)
FOLLOW = FollowLimits(answer_wait_seconds=3.0, renew_seconds=20.0)
SHARE = ShareLimits(subscription_seconds=60.0, relay_wait_seconds=1.0, push_interval_seconds=0.02,
                    rest_size_bytes_max=3000)
DELAY_SECONDS = 0.001
_numbers = itertools.count()


class World:
    """One channel. ``passes(kind, sender, receiver)`` says how often a message arrives there: 0 loses it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.objects: dict[str, bytes] = {}
        self.index: Index | None = None
        self.puts: list[str] = []
        self.said: list[tuple[str, Any]] = []
        self.nodes: dict[str, Sharing | Reading] = {}
        self.passes: Callable[[Any, str, str], int] = lambda body, sender, receiver: 1
        self.delays: Callable[[], float] = lambda: DELAY_SECONDS
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self.now + seconds, next(_numbers), work))

    def say(self, sender: str, body: Any) -> None:
        self.said.append((sender, body))
        for name, node in list(self.nodes.items()):
            if name != sender:
                for _ in range(self.passes(body, sender, name)):
                    self.later(self.delays(), lambda node=node: node.hear(body, sender))  # type: ignore[misc]

    def run(self, seconds: float) -> None:
        """Let everything happen that is due within so many seconds."""
        end = self.now + seconds
        while True:
            due = [node.deadline for node in self.nodes.values() if node.deadline is not None]
            times = [*due, *([self._agenda[0][0]] if self._agenda else [])]
            if not times or min(times) > end:
                self.now = end
                return
            self.now = max(self.now, min(times))
            if self._agenda and self._agenda[0][0] <= self.now:
                heapq.heappop(self._agenda)[2]()
            else:
                for node in list(self.nodes.values()):
                    if node.deadline is not None and node.deadline <= self.now:
                        node.tick()

    def spoken(self, kind: Any, sender: str | None = None) -> list[Any]:
        return [body for by, body in self.said if isinstance(body, kind) and sender in (None, by)]


class _Holder:
    """A node with messages of the subfeed."""

    chain: list[bytes]
    machine: FeedSharer | Follower

    @property
    def tail(self) -> Tail:
        if not self.chain:
            return START
        return Tail(FEED, SUBFEED, len(self.chain), json.loads(self.chain[-1])["signature"], 2)

    @property
    def deadline(self) -> float | None:
        return self.machine.deadline


class Sharing(_Holder):
    """A node with a subfeed: its owner, or a relay with a copy."""

    machine: FeedSharer

    def __init__(self, world: World, name: str, chain: list[bytes] | None = None, *, own: bool = True,
                 limits: ShareLimits = SHARE, jitter: float = 0.0) -> None:
        self.world = world
        self.name = name
        self.own = own
        self.chain = list(chain or [])
        self.head_count: int | None = None
        self.present: set[str] = set()
        self.listening = False
        self.shares: list[Share] = []
        self.hold_shares = False
        self.failing = ""
        self.jitter = jitter
        self.machine = FeedSharer(limits)
        world.nodes[name] = self

    def head(self) -> dict[str, Any] | None:
        return sign_head(self.tail, KEY, TIME_MS) if self.own else None

    def append(self, count: int, size: int = 10) -> None:
        first = len(self.chain)
        signed, _ = sign_messages(self.tail, [{"i": first + n, "text": "x" * size} for n in range(count)], KEY, TIME_MS)
        self.chain += signed
        self.post(Appended(PLACE, first, signed, self.head() or {}))

    def tick(self) -> None:
        self.post(SharerTick())

    def hear(self, body: Any, sender: str) -> None:
        if isinstance(body, FeedSubscribe) and (self.own or self.chain):
            self.post(Asked(body, sender, self.own, len(self.chain), False, self.jitter))
        elif isinstance(body, (FeedMessages, FeedShared)) and self.listening:
            self.post(Overheard(body))

    def post(self, event: Any) -> None:
        for effect in self.machine.handle(event, self.world.now):
            if isinstance(effect, Said):
                self.world.say(self.name, effect.kind(time=0, id="", **effect.fields))
            elif isinstance(effect, ReadRest):
                self.world.later(DELAY_SECONDS, lambda effect=effect: self.read(effect))  # type: ignore[misc]
            elif isinstance(effect, Share):
                self.shares.append(effect)
                if not self.hold_shares:
                    self.world.later(0.05, lambda effect=effect: self.share(effect))  # type: ignore[misc]
            elif isinstance(effect, Listen):
                self.listening = effect.on

    def read(self, effect: ReadRest) -> None:
        rest: list[bytes] | None = self.chain[effect.position:]
        if sum(map(len, rest or [])) > SHARE.rest_size_bytes_max:
            rest = None
        self.post(RestRead(PLACE, min(effect.position, len(self.chain)), rest, self.head()))

    def segments(self) -> list[tuple[Segment, bytes]]:
        made = []
        for first, end, size, _ in cut(map(len, self.chain), 0):
            data = encode_segment(self.chain[first:end])
            made.append((Segment(first, end, size, hashlib.sha1(data).hexdigest()), data))
        return made

    def share(self, effect: Share) -> None:
        if self.failing:
            self.post(ShareEnded(PLACE, 0, self.failing, "it failed"))
            return
        made = self.segments()
        for part, data in made:
            if part.sha1 not in self.present or (effect.distrust and part.end > effect.position):
                self.present.add(part.sha1)
                if part.sha1 not in self.world.objects:
                    self.world.puts.append(part.sha1)
                    self.world.objects[part.sha1] = data
        parts = tuple(part for part, _ in made)
        self.world.index = Index(len(self.chain), self.head(), parts)
        self.post(SharedSome(PLACE, [part for part in parts if part.end > effect.position], self.head()))
        self.post(ShareEnded(PLACE, len(self.chain)))


class Reading(_Holder):
    """A node that follows the subfeed."""

    machine: Follower

    def __init__(self, world: World, name: str, held: list[bytes] | None = None) -> None:
        self.world = world
        self.name = name
        self.chain = list(held or [])
        self.errors: list[str] = []
        self.heads: list[int] = []
        self.loads: list[Segment] = []
        self.looks = 0
        self.ended = False
        self.machine = Follower(FEED, SUBFEED, len(self.chain), f"{name}-", Inquiry("feed://x", "lab"), FOLLOW)
        world.nodes[name] = self

    def want(self, seconds: float = 60.0) -> None:
        self.post(Wanted(self.world.now + seconds))

    def tick(self) -> None:
        self.post(FollowerTick())

    def restored(self) -> None:
        self.post(BandRestored())

    def hear(self, body: Any, sender: str) -> None:
        if isinstance(body, (FeedMessages, FeedShared, FeedFailed)) and not self.ended:
            self.post(Heard(body, sender))

    def post(self, event: Any) -> None:
        for effect in self.machine.handle(event, self.world.now):
            if isinstance(effect, Subscribe):
                self.world.say(self.name, FeedSubscribe(time=0, id="", **effect.fields))
            elif isinstance(effect, LookAtIndex):
                self.looks += 1
                self.world.later(DELAY_SECONDS, lambda: self.post(IndexRead(self.world.index, "no index")))
            elif isinstance(effect, Load):
                self.loads.append(effect.segment)
                self.world.later(DELAY_SECONDS, lambda effect=effect: self.load(effect.segment))  # type: ignore[misc]
            elif isinstance(effect, Take):
                self.world.later(DELAY_SECONDS, lambda effect=effect: self.take(effect))  # type: ignore[misc]
            elif isinstance(effect, KeepHead):
                assert effect.head.count <= len(self.chain)
                self.heads.append(effect.head.count)
            elif isinstance(effect, End):
                self.ended = True

    def extend(self, first: int, messages: list[Any]) -> str:
        found = extend(self.tail, first, messages, lambda number: self.chain[number])
        assert isinstance(found, Extension), "nobody forks here"
        self.chain += found.new
        if found.error is not None:
            self.errors.append(found.error.message)
            return found.error.message
        return ""

    def take(self, effect: Take) -> None:
        why = self.extend(effect.first, effect.messages())
        self.post(Taken(len(self.chain), why))

    def load(self, segment: Segment) -> None:
        data = self.world.objects.get(segment.sha1)
        if data is None:
            self.post(Loaded(segment, len(self.chain), "absent"))
        elif hashlib.sha1(data).hexdigest() != segment.sha1:
            del self.world.objects[segment.sha1]  # as the hub does, when it is told
            self.post(Loaded(segment, len(self.chain), "damaged"))
        else:
            why = self.extend(segment.first, parse_segment(data))
            self.post(Loaded(segment, len(self.chain), why, useless=bool(why)))

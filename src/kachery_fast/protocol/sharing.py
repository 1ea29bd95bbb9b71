"""The provider of feeds: how a node answers for its own feeds, and for the copies that it holds, on one channel.

A pure state machine beside ``following.Follower``: ``FeedSharer.handle(event, now)`` returns the effects. The owner
answers at once; a node with a copy (a relay) waits, and keeps silent when somebody answers with as much as it has.
What is left for a reader goes in one message where it fits, else by the bucket: segments of many messages. Nothing is
put there before a node that may request feeds has asked; a reader that begins at 0 always gets segments, so that those
who come later find them while nobody is there to ask.

What is appended while somebody listens is pushed, at most each ``push_interval_seconds``; what is too long for a
message goes by the bucket too. Questions that come together are answered together.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

from . import plain_json
from .feed_bodies import FeedFailed, FeedMessages, FeedShared
from .sharing_events import (
    Appended,
    Asked,
    Effect,
    Event,
    Forgotten,
    Key,
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

__all__ = ["SEGMENTS_PER_MESSAGE_MAX", "FeedSharer", "ShareLimits"]

SEGMENTS_PER_MESSAGE_MAX = 256
"""Segments that one ``FeedShared`` names: about 25 kB."""

# Subfeeds that somebody asked for; the one that nobody has asked for the longest is forgotten first.
_PLACES_MAX = 10_000
# Nodes that wait for, listen to or were told of one subfeed.
_SENDERS_MAX = 1024
# Subfeeds that are put into the bucket at the same time.
_SHARES_MAX = 4
# A long append is pushed by the bucket: each time the open segment is put there anew.
_SHARE_INTERVAL_SECONDS = 1.0
# A push by the bucket that failed is tried again after so long.
_RETRY_SECONDS = 5.0
# A reader that asks again for what it was told of by then has missed it; sooner, the question may have crossed the
# answer.
_CROSSING_SECONDS = 1.0
_PUSH = ""  # stands among the senders for the push to those who listen


@dataclass(frozen=True)
class ShareLimits:
    """The provider's share of the settings; times in seconds.

    ``rest_size_bytes_max``: the longest messages, as canonical JSON, that go in one message on a band.
    """

    subscription_seconds: float
    relay_wait_seconds: float
    push_interval_seconds: float
    rest_size_bytes_max: int


@dataclass(frozen=True)
class _Ask:
    """One question, or (of nobody, without a request) the push of what is too long for a message."""

    sender: str
    request: str
    position: int
    at: float
    due: float
    count: int = 0
    patient: bool = True


@dataclass
class _Place:
    """One subfeed, and who wants it. ``asks`` wait for an answer, ``bulky`` ones for the bucket."""

    key: Key
    own: bool
    asks: dict[str, _Ask] = field(default_factory=dict)
    bulky: dict[str, _Ask] = field(default_factory=dict)
    reading: list[_Ask] = field(default_factory=list)
    sharing: list[_Ask] = field(default_factory=list)
    live: dict[str, float] = field(default_factory=dict)
    told: dict[str, tuple[int, float]] = field(default_factory=dict)
    hushed: dict[str, int] = field(default_factory=dict)
    listening: bool = False
    distrusting: bool = False
    count: int = 0
    queue: list[bytes] = field(default_factory=list)
    queue_first: int = 0
    queue_head: dict[str, Any] | None = None
    pushed_at: float = float("-inf")
    shared_at: float = float("-inf")

    @property
    def idle(self) -> bool:
        """Whether nobody waits for anything."""
        return not (self.asks or self.bulky or self.reading or self.sharing or self.queue)

    @property
    def pushing(self) -> bool:
        """Whether a push goes by the bucket."""
        return _PUSH in self.asks or _PUSH in self.bulky or any(
            not ask.sender for ask in (*self.reading, *self.sharing))


class FeedSharer:
    """Answers on one channel."""

    def __init__(self, limits: ShareLimits) -> None:
        self._limits = limits
        self._places: OrderedDict[Key, _Place] = OrderedDict()
        self._due: dict[Key, float] = {}
        self._sharing: set[Key] = set()
        self._share_line: deque[Key] = deque()
        self._effects: list[Effect] = []

    @property
    def deadline(self) -> float | None:
        """When a ``Tick`` is due, or None."""
        return min(self._due.values(), default=None)

    def listened_to(self, key: Key, now: float) -> bool:
        """Whether somebody wants to be told what is appended to a subfeed."""
        place = self._places.get(key)
        return place is not None and any(until > now for until in place.live.values())

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at the time ``now`` (seconds, monotonic) and return what to do."""
        if isinstance(event, Withdrawn):
            for place in list(self._places.values()):
                _withdraw(place, event.allowed)
                self._advance(place, now)
        elif isinstance(event, Forgotten):
            self._on_forgotten(event)
        elif isinstance(event, Tick):
            for key in [key for key, due in self._due.items() if due <= now]:
                self._advance(self._places[key], now)
        else:
            noted = self._note(event, now)
            if noted is not None:
                self._advance(noted, now)
        self._start_shares()
        effects, self._effects = self._effects, []
        return effects

    # --- what happened

    def _note(self, event: Event, now: float) -> _Place | None:
        if isinstance(event, Asked):
            return self._on_asked(event, now)
        key = (event.body.feed_id, event.body.subfeed) if isinstance(event, Overheard) else getattr(event, "key", None)
        place = None if key is None else self._places.get(key)
        if place is None:
            return None
        if isinstance(event, Appended):
            self._on_appended(place, event, now)
        elif isinstance(event, Overheard):
            self._on_overheard(place, event.body, now)
        elif isinstance(event, RestRead):
            self._on_rest(place, event, now)
        elif isinstance(event, SharedSome) and place.sharing:
            for start in range(0, len(event.segments), SEGMENTS_PER_MESSAGE_MAX):
                part = event.segments[start:start + SEGMENTS_PER_MESSAGE_MAX]
                self._say(place, FeedShared, _asker(place.sharing), segments=part, head=event.head)
        elif isinstance(event, ShareEnded):
            self._on_share_ended(place, event, now)
        return place

    def _on_asked(self, asked: Asked, now: float) -> _Place | None:
        body, sender = asked.body, asked.sender
        if body.position > asked.count and not asked.own:
            return None  # the reader has more than this copy
        place = self._find_place((body.feed_id, body.subfeed), asked.own)
        if place is None:
            return None
        place.count = max(place.count, asked.count)
        ask = _Ask(sender, body.request, body.position, now, now, asked.count)
        if asked.forked:
            self._say(place, FeedFailed, ask, reason="forked", detail=f"its messages up to {asked.count} are good")
            if body.position >= asked.count:
                return None
        if sender not in place.asks and len(place.asks) + len(place.bulky) >= _SENDERS_MAX:
            self._say(place, FeedFailed, ask, reason="busy", detail=f"{_SENDERS_MAX} nodes wait for this subfeed")
            return None
        if asked.own and body.live and (sender in place.live or len(place.live) < _SENDERS_MAX):
            place.live[sender] = now + self._limits.subscription_seconds
        if not asked.own:
            # Somebody who keeps on asking for the same was not helped by the answer that this node left it to.
            patient = place.hushed.get(sender) != body.position
            wait = self._limits.relay_wait_seconds * (1.0 + asked.jitter / 2)
            ask = _Ask(sender, body.request, body.position, now, now + wait, asked.count, patient)
        place.asks[sender] = ask
        return place

    def _on_appended(self, place: _Place, event: Appended, now: float) -> None:
        place.count = max(place.count, event.first + len(event.messages))
        place.live = {sender: until for sender, until in place.live.items() if until > now}
        if not place.live or place.pushing:
            place.queue = []
            return  # a push by the bucket goes on to the end by itself
        if not place.queue:
            place.queue_first = event.first
        place.queue = [*place.queue, *event.messages]
        place.queue_head = event.head
        if sum(map(len, place.queue)) > self._limits.rest_size_bytes_max:
            place.queue = []
            self._push_by_bucket(place, place.queue_first, max(now, place.shared_at + _SHARE_INTERVAL_SECONDS), now)

    def _on_overheard(self, place: _Place, body: FeedMessages | FeedShared, now: float) -> None:
        if isinstance(body, FeedMessages):
            first, end = body.first, body.first + len(body.messages)
        else:
            first = min((part.first for part in body.segments), default=0)
            end = max((part.end for part in body.segments), default=0)
            # Segments are told of as they arrive in the bucket; the head tells how far it will go.
            end = max(end, _claimed_count(body.head))
        for sender, ask in list(place.asks.items()):
            helped = body.request == ask.request or first <= ask.position
            if ask.due > now and ask.patient and helped and end >= ask.count:
                del place.asks[sender]
                _remember(place.hushed, sender, ask.position)

    def _on_rest(self, place: _Place, rest: RestRead, now: float) -> None:
        asks, place.reading = place.reading, []
        if not asks:
            return  # withdrawn meanwhile
        if rest.reason:
            self._fail(place, asks, rest.reason, rest.detail, now)
            return
        if rest.messages is not None and (rest.position > 0 or not rest.messages or not asks[0].sender):
            messages = [plain_json.decode(signed) for signed in rest.messages]
            self._say(place, FeedMessages, _asker(asks), first=rest.position, messages=messages, head=rest.head)
            if any(not ask.sender for ask in asks):
                self._push_the_rest(place, rest.position + len(messages), now)
            return
        for ask in asks:
            if ask.position == rest.position:
                place.bulky[ask.sender] = ask
            else:  # less is left for this one, perhaps little enough
                place.asks.setdefault(ask.sender, ask)
        if place.bulky and place.key not in self._share_line:
            self._share_line.append(place.key)

    def _on_share_ended(self, place: _Place, ended: ShareEnded, now: float) -> None:
        asks, place.sharing = place.sharing, []
        self._sharing.discard(place.key)
        place.shared_at = now
        if place.bulky and place.key not in self._share_line:
            self._share_line.append(place.key)
        if ended.reason:
            self._fail(place, asks, ended.reason, ended.detail, now)
            return
        for ask in asks:
            before, since = place.told.get(ask.sender, (0, now))
            # Who asks for the same again is not told anew: it counts when it heard of that first.
            at = since if ask.position < before and not place.distrusting else now
            _remember(place.told, ask.sender, (ended.end, at))
        if any(not ask.sender for ask in asks):
            self._push_the_rest(place, ended.end, now)

    def _on_forgotten(self, event: Forgotten) -> None:
        for key in [key for key in self._places if key[0] == event.feed_id]:
            place = self._places.pop(key)
            self._due.pop(key, None)
            self._sharing.discard(key)
            if place.listening:
                self._effects.append(Listen(key, False))
            for ask in (*place.asks.values(), *place.bulky.values(), *place.reading, *place.sharing):
                if ask.sender:
                    self._say(place, FeedFailed, ask, reason="deleted", detail="its owner has deleted the feed")

    # --- what to do

    def _advance(self, place: _Place, now: float) -> None:
        """Answer who is due, push what is due, and note when to look again."""
        if not place.reading:
            due = [ask for ask in place.asks.values() if ask.due <= now]
            if due:
                position = due[0].position
                place.reading = [ask for ask in due if ask.position >= position]
                for ask in place.reading:
                    del place.asks[ask.sender]
                self._effects.append(ReadRest(place.key, position))
        push_at = place.pushed_at + self._limits.push_interval_seconds
        if place.queue and push_at <= now:
            messages = [plain_json.decode(signed) for signed in place.queue]
            self._effects.append(Said(FeedMessages, {
                "request": "", "feed_id": place.key[0], "subfeed": place.key[1], "first": place.queue_first,
                "messages": messages, "head": place.queue_head}))
            place.queue, place.pushed_at = [], now
        times = [] if place.reading else [ask.due for ask in place.asks.values()]
        times += [push_at] if place.queue else []
        if times:
            self._due[place.key] = min(times)
        else:
            self._due.pop(place.key, None)
        waits = not place.own and any(ask.due > now for ask in place.asks.values())
        if waits != place.listening:
            place.listening = waits
            self._effects.append(Listen(place.key, waits))

    def _start_shares(self) -> None:
        while self._share_line and len(self._sharing) < _SHARES_MAX:
            place = self._places.get(self._share_line.popleft())
            if place is None or not place.bulky or place.sharing:
                continue  # one that is being shared comes back when that has ended
            place.sharing, place.bulky = list(place.bulky.values()), {}
            position = min(ask.position for ask in place.sharing)
            self._sharing.add(place.key)
            place.distrusting = any(_missed(place, ask) for ask in place.sharing)
            self._effects.append(Share(place.key, position, place.distrusting))

    def _push_by_bucket(self, place: _Place, position: int, due: float, now: float) -> None:
        place.asks[_PUSH] = _Ask(_PUSH, "", position, now, due)

    def _push_the_rest(self, place: _Place, end: int, now: float) -> None:
        if place.count > end and any(until > now for until in place.live.values()):
            self._push_by_bucket(place, end, max(now, place.pushed_at + self._limits.push_interval_seconds,
                                                 place.shared_at + _SHARE_INTERVAL_SECONDS), now)

    def _fail(self, place: _Place, asks: list[_Ask], reason: str, detail: str, now: float) -> None:
        for ask in asks:
            if ask.sender:
                self._say(place, FeedFailed, ask, reason=reason, detail=detail)
            elif any(until > now for until in place.live.values()):
                self._push_by_bucket(place, ask.position, now + _RETRY_SECONDS, now)

    def _say(self, place: _Place, kind: Any, ask: _Ask, **fields: Any) -> None:
        self._effects.append(Said(kind, {"request": ask.request, "feed_id": place.key[0], "subfeed": place.key[1],
                                         **fields}))

    def _find_place(self, key: Key, own: bool) -> _Place | None:
        place = self._places.get(key)
        if place is None:
            if len(self._places) >= _PLACES_MAX:
                # Of subfeeds without a message anybody can make up as many as he likes: these go first.
                oldest = next((known for known in self._places.values() if not known.count and known.idle),
                              None) or next((known for known in self._places.values() if known.idle), None)
                if oldest is None:
                    return None
                del self._places[oldest.key]  # nothing of it is due
            place = self._places[key] = _Place(key, own)
        place.own = own
        self._places.move_to_end(key)
        return place


def _asker(asks: list[_Ask]) -> _Ask:
    """Return whose request an answer to all of these names: somebody's, if there is anybody beside the push."""
    return next((ask for ask in asks if ask.sender), asks[0])


def _missed(place: _Place, ask: _Ask) -> bool:
    """Whether somebody asks for what it was told to be in the bucket."""
    end, at = place.told.get(ask.sender, (0, 0.0))
    return ask.sender != _PUSH and ask.position < end and ask.at > at + _CROSSING_SECONDS


def _withdraw(place: _Place, allowed: frozenset[str]) -> None:
    """Owe nothing more to who may not ask any more."""
    place.live = {sender: until for sender, until in place.live.items() if sender in allowed}
    for asks in (place.asks, place.bulky):
        for sender in [sender for sender in asks if sender != _PUSH and sender not in allowed]:
            del asks[sender]
    if not place.live:
        place.queue = []
        place.asks.pop(_PUSH, None)
        place.bulky.pop(_PUSH, None)


def _remember(notes: dict[str, Any], sender: str, note: Any) -> None:
    """Note something of a sender; the oldest note goes when there are too many."""
    notes.pop(sender, None)
    notes[sender] = note
    if len(notes) > _SENDERS_MAX:
        del notes[next(iter(notes))]


def _claimed_count(head: dict[str, Any] | None) -> int:
    body = (head or {}).get("body")
    count = body.get("count") if isinstance(body, dict) else None
    return count if isinstance(count, int) else 0

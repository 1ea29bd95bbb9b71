"""The reader: how a node follows one subfeed of another node's feed on one channel.

A pure state machine beside ``sharing.FeedSharer``: ``Follower.handle(event, now)`` returns the effects. It looks for
the subfeed's index in the bucket and asks the channel at once; takes messages and segments in whatever order they
come, and asks anew from where it stands when something is missing. Nothing that comes is believed: the caller checks
every message against the chain before it says that the subfeed has grown (``Taken``, ``Loaded``); heads are checked
here.

One message or segment is worked on at a time, the one that reaches farthest first; what waits is bounded, and what
others told does not crowd out the rest. Whoever lies costs the reader one question more, with pauses that double as
long as nothing comes of it, and its segments are tried last from then on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import msgspec

from ..errors import HeadInvalid
from .feed_bodies import FeedFailed, FeedMessages, Segment
from .feed_segments import SEGMENT_MESSAGES_MAX, SEGMENT_SIZE_BYTES_MAX
from .feeds import Head, read_head
from .following_events import (
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
    Wanted,
)
from .inquiry import Inquiry

__all__ = ["FollowLimits", "Follower"]

# Messages of the bands that wait for others before them, and their length as JSON, in which they are kept: objects take
# up to 25 times that. Of more, those farthest ahead of whoever sent the most are dropped, and asked for again.
_PENDING_BODIES_MAX = 16
_PENDING_SIZE_BYTES_MAX = 256 * 1024
# Segments that are known and wait to be loaded, 4 GB of messages; those farthest ahead are dropped and asked for again.
_SEGMENTS_MAX = 4096
# Of so many sources it is noted that what they told of was no good.
_DOUBTED_MAX = 256
# Segments whose content was no good; their names are not tried again.
_REFUSED_MAX = 1024
# The first pause before a question that follows one which brought nothing.
_PAUSE_SECONDS = 0.25
_DOUBLINGS_MAX = 16


@dataclass(frozen=True)
class FollowLimits:
    """The reader's share of the settings; seconds.

    ``answer_wait_seconds``: how long to wait for a first answer before asking again. ``renew_seconds``: how often to
    ask while nothing seems to be missing.
    """

    answer_wait_seconds: float
    renew_seconds: float


class _Pending(NamedTuple):
    """Messages ``first`` to ``end`` (exclusive) of a band, as a JSON list, until their turn comes."""

    first: int
    end: int
    sender: str
    data: bytes


class Follower:
    """Follows one subfeed.

    :param position: how many messages are held.
    :param request: the beginning of the ids of its questions, random, at most 40 characters long.
    :param inquiry: the account of what is tried; its ``providers`` may be changed at any time.
    """

    def __init__(self, feed_id: str, subfeed: str, position: int, request: str, inquiry: Inquiry,
                 limits: FollowLimits) -> None:
        self.position = position
        self.inquiry = inquiry
        self.over = False
        self._feed_id = feed_id
        self._subfeed = subfeed
        self._request = request
        self._limits = limits
        self._head: Head | None = None
        self._head_to_keep: Head | None = None
        self._kept_head: Head | None = None
        self._claimed = 0  # how far others have said it goes, since it was asked last; never believed
        self._forked = False
        self._wanted_until = float("-inf")
        self._working = self._looking = False
        self._pending: list[_Pending] = []  # by their first number
        self._taken_from = ""
        self._segments: dict[tuple[int, str], tuple[Segment, str]] = {}  # by number and SHA-1; and who told of it
        self._doubted: Counter[str] = Counter()  # how often what a source told of was no good
        self._refused: set[str] = set()
        self._asked_at: float | None = None
        self._asked_from = 0
        self._look_back: int | None = None  # ask from here once, to see what the owner signed in its place
        self._looked_back_at = float("-inf")
        self._answered = False
        self._silent = 0  # questions in a row that nobody answered
        self._fruitless = 0  # questions in a row that were answered, and brought nothing that was missing
        self._effects: list[Effect] = []

    @property
    def known(self) -> bool:
        """Whether there is such a subfeed: something of it, or its owner's word on it, was seen."""
        return self.position > 0 or self._head is not None

    @property
    def count(self) -> int:
        """How many messages the subfeed has, as far as its owner has told."""
        return max(self.position, self._head.count if self._head else 0)

    @property
    def deadline(self) -> float | None:
        """When a ``Tick`` is due, or None."""
        if self.over or self._working:
            return None
        due = self._ask_at()
        return self._wanted_until if due is None else min(due, self._wanted_until)

    def segments_after(self, segment: Segment) -> Iterator[Segment]:
        """Yield the segments that are known and will be loaded after this one, nearest first."""
        for first, sha1 in sorted(key for key in self._segments if key[0] >= segment.end):
            yield self._segments[first, sha1][0]

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at the time ``now`` (seconds, monotonic) and return what to do."""
        if not self.over:
            self._note(event, now)
            self._work()
            self._ask(now)
            if now >= self._wanted_until and not self._working:
                self.over = True
                self._effects.append(End())
        effects, self._effects = self._effects, []
        return effects

    # --- what happened

    def _note(self, event: Event, now: float) -> None:
        if isinstance(event, Wanted):
            self._wanted_until = max(self._wanted_until, event.until)
        elif isinstance(event, IndexRead):
            self._on_index(event)
        elif isinstance(event, Heard):
            self._on_heard(event)
        elif isinstance(event, Loaded):
            self._on_loaded(event)
        elif isinstance(event, Taken):
            self._working = False
            if event.why:
                self.inquiry.note(self._taken_from, event.why)
            self._grow(event)
        elif isinstance(event, Grown):
            self._grow(event)
        elif isinstance(event, Parted):
            self._on_parted(event, now)
        elif isinstance(event, BandRestored):
            self._asked_at, self._silent = None, 0
        elif isinstance(event, SayFailed):
            self.inquiry.bands = event.error.message

    def _on_index(self, event: IndexRead) -> None:
        self._looking = False
        if event.index is None:
            self.inquiry.bucket = event.why
            return
        self.inquiry.bucket = f"has an index of {event.index.count} messages"
        self._know_head(event.index.head, "", keep=True)
        self._know_segments(event.index.segments, "")

    def _on_heard(self, heard: Heard) -> None:
        body, sender = heard.body, heard.sender
        is_mine = body.request.startswith(self._request)
        if isinstance(body, FeedFailed):
            if is_mine:
                self._answer(sender, f"{body.reason}: {body.detail}" if body.detail else body.reason)
            return
        if isinstance(body, FeedMessages):
            first, end = body.first, body.first + len(body.messages)
            text = f"has no more than {first}" if first == end else f"sent messages up to {end}"
            if first < end:
                self._keep_pending(body, sender)
        else:
            first = min((part.first for part in body.segments), default=0)
            end = max((part.end for part in body.segments), default=0)
            text = f"shared messages up to {end}"
            self._know_segments(body.segments, sender)
        self._know_head(body.head, sender, keep=bool(body.request))
        self._claimed = max(self._claimed, end)
        if is_mine or (body.request and first <= self.position <= end):
            self._answer(sender, text)

    def _answer(self, sender: str, text: str) -> None:
        self.inquiry.note(sender, text)
        self.inquiry.bands = ""
        self._answered, self._silent = True, 0

    def _keep_pending(self, body: FeedMessages, sender: str) -> None:
        data = msgspec.json.encode(body.messages)
        self._pending.append(_Pending(body.first, body.first + len(body.messages), sender, data))
        self._pending.sort(key=lambda known: known.first)
        while len(self._pending) > _PENDING_BODIES_MAX or sum(
                len(known.data) for known in self._pending[1:]) > _PENDING_SIZE_BYTES_MAX:
            [(crowd, _)] = Counter(known.sender for known in self._pending).most_common(1)
            del self._pending[max(at for at, known in enumerate(self._pending) if known.sender == crowd)]

    def _know_segments(self, segments: Sequence[Segment], source: str) -> None:
        """Note segments. :param source: the node that told of them, "" for the index."""
        useful = (segment for segment in segments if segment.end > self.position
                  and segment.sha1 not in self._refused and 0 < segment.size <= SEGMENT_SIZE_BYTES_MAX
                  and segment.end - segment.first <= SEGMENT_MESSAGES_MAX)
        for segment in islice(useful, _SEGMENTS_MAX):
            self._segments.setdefault((segment.first, segment.sha1), (segment, source))
        if len(self._segments) > _SEGMENTS_MAX:
            nearest = sorted(self._segments.items(), key=lambda item: (self._doubted[item[1][1]], item[0][0]))
            self._segments = dict(nearest[:_SEGMENTS_MAX])

    def _know_head(self, head: dict[str, Any] | None, source: str, *, keep: bool) -> None:
        """Check a head, if it is worth it: one that tells of no more than is known already costs but a look.

        :param source: the node that sent it, "" for the index. :param keep: to be kept once all of it is held; those
            that come with every push are not, for the sake of the disk.
        """
        if head is None:
            return
        body = head.get("body")
        count = body.get("count") if isinstance(body, dict) else None
        if not isinstance(count, int):
            return
        if self._head is None or count > self._head.count:
            try:
                self._head = read_head(head, self._feed_id, self._subfeed)
            except HeadInvalid as error:
                text = f"sent a head that was refused ({error.details.get('why')})"
                if source:
                    self.inquiry.note(source, text)
                else:
                    self.inquiry.bucket = text
                return
        if keep and self._head is not self._kept_head:
            self._head_to_keep = self._head

    def _on_loaded(self, event: Loaded) -> None:
        self._working = False
        segment = event.segment
        if event.why or event.count < segment.end:
            _, source = self._segments.pop((segment.first, segment.sha1), (segment, ""))
            if not event.trouble and (len(self._doubted) < _DOUBTED_MAX or source in self._doubted):
                self._doubted[source] += 1
            if event.useless:
                if len(self._refused) >= _REFUSED_MAX:
                    self._refused.clear()
                self._refused.add(segment.sha1)
            if event.why:
                self.inquiry.bucket = event.why
        self._grow(event)

    def _on_parted(self, event: Parted, now: float) -> None:
        """Ask for the other message, which proves the fork. (Of 2022, a liar can show messages that only seem to part:
        they are asked about no more often than the rest.)"""
        if event.number < self.position and now >= self._looked_back_at + self._limits.renew_seconds:
            self._looked_back_at = now
            self._look_back = max(1, event.number)  # from 0 on, it would be told of the bucket
            self._asked_at = None

    def _grow(self, event: Loaded | Taken | Grown) -> None:
        self.position = max(self.position, event.count)
        self._forked = self._forked or event.forked

    # --- what to do

    @property
    def _is_behind(self) -> bool:
        return max(self._claimed, self.count, *(known.end for known in self._pending)) > self.position

    def _work(self) -> None:
        head = self._head_to_keep
        if head is not None and head.count <= self.position:
            self._head_to_keep, self._kept_head = None, head
            self._effects.append(KeepHead(head))
        if self._working or self._forked:
            return
        take = self._next_messages()
        if take is not None:
            self._working, self._taken_from = True, take.sender
            self._effects.append(take)
            return
        segment = self._next_segment()
        if segment is not None:
            self._working = True
            self._effects.append(Load(segment))

    def _next_messages(self) -> Take | None:
        """Take the messages that continue what is held, those that follow without a gap together.

        Messages that are held already are looked at too: of another signed one the caller makes a fork.
        """
        taken: list[_Pending] = []
        left = []
        for known in self._pending:
            if known.first == taken[-1].end if taken else known.first <= self.position:
                taken.append(known)
            else:
                left.append(known)
        self._pending = left
        return Take(taken[0].first, tuple(known.data for known in taken), taken[0].sender) if taken else None

    def _next_segment(self) -> Segment | None:
        best: tuple[int, int] | None = None
        found: Segment | None = None
        for key, (segment, source) in list(self._segments.items()):
            rank = -self._doubted[source], segment.end
            if segment.end <= self.position:
                del self._segments[key]
            elif segment.first <= self.position and (best is None or rank > best):
                best, found = rank, segment
        return found

    def _ask_at(self) -> float | None:
        """When to ask next; None while something is worked on."""
        if self._forked or self._working:
            return None
        if self._asked_at is None:
            return float("-inf")
        limits = self._limits
        if not self._answered:
            pause = limits.answer_wait_seconds * 2.0 ** min(self._silent, _DOUBLINGS_MAX)
        elif self._is_behind:
            pause = _PAUSE_SECONDS * 2.0 ** min(self._fruitless - 1, _DOUBLINGS_MAX) if self._fruitless else 0.0
        else:
            pause = limits.renew_seconds
        return self._asked_at + min(pause, limits.renew_seconds)

    def _ask(self, now: float) -> None:
        due = self._ask_at()
        if due is None or now < due or now >= self._wanted_until:
            return
        if self._asked_at is None or not self._answered:
            self._silent += self._asked_at is not None
            if not self._looking:  # the bucket may have what nobody here is there to tell
                self._looking = True
                self._effects.append(LookAtIndex())
        elif self._is_behind and self.position == self._asked_from:
            self._fruitless += 1
        else:
            self._fruitless = 0
        self._asked_at, self._asked_from, self._answered, self._claimed = now, self.position, False, 0
        self.inquiry.rounds += 1
        position, self._look_back = self.position if self._look_back is None else self._look_back, None
        self._effects.append(Subscribe({
            "request": f"{self._request}{self.inquiry.rounds}", "feed_id": self._feed_id, "subfeed": self._subfeed,
            "position": position, "live": True}))

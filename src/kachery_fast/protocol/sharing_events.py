"""What happens to a node that shares feeds (``sharing.FeedSharer``), and what it wants done."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from .feed_bodies import FeedMessages, FeedShared, FeedSubscribe, Segment

__all__ = [
    "Appended", "Asked", "Effect", "Event", "Forgotten", "Listen", "Overheard", "ReadRest", "RestRead", "Said", "Share",
    "ShareEnded", "SharedSome", "Tick", "Withdrawn",
]

Key = tuple[str, str]  # feed id, subfeed


class Asked(Struct, frozen=True):
    """A node that may request feeds asks for a subfeed that this node knows.

    ``own``: this node owns the feed. ``count``: how many messages are here. ``forked``: its owner signed two histories.
    ``jitter``: a random number, 0.0 to 1.0.
    """

    body: FeedSubscribe
    sender: str
    own: bool
    count: int
    forked: bool
    jitter: float


class Appended(Struct, frozen=True):
    """Messages from number ``first`` on, canonical and signed, were made durable in a subfeed of this node's own."""

    key: Key
    first: int
    messages: list[bytes]
    head: dict[str, Any]


class Overheard(Struct, frozen=True):
    """Another node has answered somebody's question about a subfeed that ``Listen`` has named."""

    body: FeedMessages | FeedShared


class RestRead(Struct, frozen=True):
    """``ReadRest`` has ended: with all messages from ``position`` on, or None: too many for a message on a band.

    ``reason``, ``detail``: why they could not be read, as of ``FeedFailed``.
    """

    key: Key
    position: int
    messages: list[bytes] | None
    head: dict[str, Any] | None = None
    reason: str = ""
    detail: str = ""


class SharedSome(Struct, frozen=True):
    """These segments of ``Share`` are in the bucket; without a gap from the one that holds the position on."""

    key: Key
    segments: list[Segment]
    head: dict[str, Any] | None = None


class ShareEnded(Struct, frozen=True):
    """``Share`` has ended: everything up to message ``end`` is in the bucket; or it failed, as of ``FeedFailed``."""

    key: Key
    end: int
    reason: str = ""
    detail: str = ""


class Withdrawn(Struct, frozen=True):
    """Only these nodes may request feeds from now on."""

    allowed: frozenset[str]


class Forgotten(Struct, frozen=True):
    """A feed was deleted."""

    feed_id: str


class Tick(Struct, frozen=True):
    """The time that ``deadline`` named has come."""


Event = (Asked | Appended | Overheard | RestRead | SharedSome | ShareEnded | Withdrawn | Forgotten | Tick)


class ReadRest(Struct, frozen=True):
    """Read all messages from ``position`` on, if they fit a message; answer by ``RestRead``."""

    key: Key
    position: int


class Share(Struct, frozen=True):
    """Put the missing segments and the index in the bucket, those from ``position`` on first.

    Answer by ``SharedSome``, perhaps several times, and in the end ``ShareEnded``. ``distrust``: a reader has missed
    something that should be there; put everything from ``position`` on anew.
    """

    key: Key
    position: int
    distrust: bool


class Said(Struct, frozen=True):
    """Say a body of this kind with these fields."""

    kind: Any
    fields: dict[str, Any]


class Listen(Struct, frozen=True):
    """Tell by ``Overheard`` what others answer about a subfeed; no more when not ``on``."""

    key: Key
    on: bool


Effect = ReadRest | Share | Said | Listen
